"""What a model family is: the one object that each exposes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import DTypeLike

from jaxprune.models.common import decoder
from jaxprune.models.common.configuration import reader


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: how it reads config.json, and its modules. What is not given is LLaMA's.

    Attributes:
        config: (transformers' configuration, dtype of the computation) -> a frozen dataclass with
            at least `kinds` (one for each layer, hashable: layers of one kind share a module and
            its compiled programs), `vocab_size`, `max_positions` (of a window; None: no limit) and
            `dtype`. It raises InputError for what is not implemented.
        inputs: the linear layers to prune, as the name of a capture -> the paths of the linear
            layers whose input it is; or a function of `(config, kind)` that returns this.
        embed: (config, rngs) -> a module: token ids [b, t], `Layout` or None -> hidden states.
        layer: (config, kind, rngs) -> a module: hidden states [b, t, d], `Layout` or None -> hidden
            states, captures.
        head: (config, rngs) -> a module: hidden states -> logits [b, t, vocabulary].
    """

    config: Callable[[Any, DTypeLike], Any] = reader()
    inputs: decoder.LinearInputs | Callable[[Any, Any], decoder.LinearInputs] = decoder.inputs
    embed: Callable[[Any, nnx.Rngs], nnx.Module] = decoder.Embed
    layer: Callable[[Any, Any, nnx.Rngs], nnx.Module] = decoder.DecoderLayer
    head: Callable[[Any, nnx.Rngs], nnx.Module] = decoder.Head

    def inputs_of(self, config: Any, kind: Any) -> decoder.LinearInputs:
        """Returns `inputs` for the layers of a kind."""
        return self.inputs(config, kind) if callable(self.inputs) else self.inputs
