"""Arcee: LLaMA whose feed-forward network has no gate (Hugging Face's ArceeForCausalLM)."""

from collections.abc import Mapping

from flax import nnx
from jaxtyping import Array, Float

from jaxprune.models.common import decoder
from jaxprune.models.common.activations import ACTIVATIONS
from jaxprune.models.common.configuration import Config, Kind
from jaxprune.models.common.decoder import ATTENTION_INPUTS, Embed, Head, Taps, linear

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


def inputs(config: Config, kind: Kind) -> Mapping[str, tuple[str, ...]]:
    """Returns the linear layers to prune: tap -> those that read it."""
    return {**ATTENTION_INPUTS, "mlp_input": ("mlp.up_proj",), "mlp_hidden": ("mlp.down_proj",)}


class MLP(nnx.Module):
    """Feed-forward network; returns its output and its tap."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up_proj = linear(
            config, config.hidden_size, config.intermediate_size, rngs, bias=config.mlp_bias
        )
        self.down_proj = linear(
            config, config.intermediate_size, config.hidden_size, rngs, bias=config.mlp_bias
        )
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Taps]:
        hidden = ACTIVATIONS[self.activation](self.up_proj(x))
        return self.down_proj(hidden), {"mlp_hidden": hidden}


class DecoderLayer(decoder.DecoderLayer):
    """LLaMA's layer with that network; the names of its taps are LLaMA's."""

    feed_forward = MLP
