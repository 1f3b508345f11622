"""A checkpoint's model that streams: one layer's params on the device, the next one read in the
background."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Shaped

from convert import Params, Reader, open_checkpoint
from convert.assets import DTYPE_ENTRIES, load_tokenizer, read_config
from convert.casting import CastReader
from convert.checkpoint import config_changes
from convert.names import EXPERT_COUNTS
from jaxprune.calibration import require_ids
from jaxprune.errors import InputError
from jaxprune.models import Architecture, Layout, Part, architecture_of
from jaxprune.sharding import ONE_DEVICE, Devices, fetch
from jaxprune.streaming.head import TokenScores, drawn, in_chunks, most_probable, score
from jaxprune.streaming.hidden_states import HiddenStates, batch_size
from jaxprune.streaming.kept_experts import KeptExperts
from jaxprune.streaming.sweep import sweep


class StreamedModel:
    """A checkpoint, opened: what pruning, distillation and evaluation take.

    Args:
        reader: the reader of the checkpoint.
        dtype: the dtype of the computation; None: float32 on a CPU, the kernels' stored dtype
            elsewhere.
        devices: the devices that it runs on.
        scratch: a folder for hidden states; None: they are kept in memory.
        name: the name of the checkpoint, as it was given.
        source: the folder or file that the reader reads; None: the reader's own folder.

    Attributes:
        reader, devices, scratch, name, source: as given.
        teacher: the model that it was derived from; else itself.
        architecture: its parts and shapes.

    Raises:
        InputError: an unknown architecture, something in it that is not implemented, or tensors
            that do not fit; all of them in one message.
    """

    def __init__(
        self,
        reader: Reader,
        dtype: DTypeLike | None = None,
        devices: Devices = ONE_DEVICE,
        scratch: Path | None = None,
        name: str = "",
        source: Path | None = None,
    ) -> None:
        self.reader, self.devices, self.scratch = reader, devices, scratch
        self.source = source or reader.assets
        self.name = name or str(self.source)
        architecture = architecture_of(reader.assets, dtype, reader.spec, config_changes(reader))
        if architecture.config.routing and devices.mesh:
            architecture = architecture.routed(mesh=devices.mesh)
        self.architecture: Architecture = architecture
        self.teacher = self

    def sibling(self, folder: Path, name: str = "") -> "StreamedModel":
        """Opens another checkpoint of the same architecture on the same devices; see the class for
        the arguments."""
        return StreamedModel(
            open_checkpoint(folder), self.dtype, self.devices, self.scratch, name, folder
        )

    def keeping(self, kept: Mapping[int, Sequence[int]]) -> "StreamedModel":
        """Returns the model without the other experts.

        Args:
            kept: layer index -> the experts that stay, as many in each layer.
        """
        routers = {index: layer.scorers for index, layer in enumerate(self.architecture.layers)}
        count = max(map(len, kept.values()))
        changes = {name: count for name in EXPERT_COUNTS if name in self.hf_config}
        return self.derived(KeptExperts(self.reader, kept, routers, changes))

    def saved_as(self, dtype: DTypeLike) -> "StreamedModel":
        """Returns the model with weights that are stored in another dtype; the dtype of the
        computation stays.

        Args:
            dtype: the dtype that the weights are rounded to.

        Raises:
            InputError: a norm, a bias or an embedding holds a number that is too large for the
                dtype. Kernels are checked when they are read.
        """
        names = [name for name in DTYPE_ENTRIES if name in self.hf_config] or DTYPE_ENTRIES[:1]
        changes = dict.fromkeys(names, np.dtype(dtype).name)
        reader = CastReader(self.reader, dtype, changes)
        reader.require_range()
        return self.derived(reader)

    def derived(self, reader: Reader) -> "StreamedModel":
        """Returns the model with what a reader makes of its checkpoint."""
        made = StreamedModel(reader, self.dtype, self.devices, self.scratch, self.name, self.source)
        made.teacher = self.teacher
        return made

    def routing_all(self) -> "StreamedModel":
        """Returns the model with captures of experts that hold every token for every expert; its
        outputs are the same."""
        other = copy.copy(self)
        other.architecture = self.architecture.routed(route_all=True)
        return other

    @property
    def short_name(self) -> str:
        """The last part of the name: of a path the file's or folder's own name, without a hub's
        owner."""
        return Path(self.name).absolute().name

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.architecture.layers)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the computation."""
        return np.dtype(self.architecture.config.dtype)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, by transformers.

        Raises:
            CheckpointError: there is none, or it cannot be used.
        """
        return load_tokenizer(self.reader.assets)

    @property
    def first_token(self) -> int:
        """The token id that a text begins with which has no other."""
        known = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return next((token for token in known if token is not None), 0)

    @functools.cached_property
    def hf_config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_config(self.reader.assets) | dict(config_changes(self.reader))

    @property
    def changed_entries(self) -> Mapping[str, Any]:
        """The entries of config.json that have other values for this model."""
        return config_changes(self.reader)

    def require_tokens(self, tokens: Int[np.ndarray, "w t"]) -> None:
        """Raises InputError for token ids outside the vocabulary, or windows longer than the model
        was made for."""
        require_ids(tokens, self.architecture.config.vocab_size)
        self.architecture.require_length(tokens.shape[1])

    def layers(self, order: Sequence[int] | None = None) -> Iterator[Params]:
        """Yields the decoder layers' params on the host, as their programs take them; one is read
        ahead of its use.

        Args:
            order: indices of the layers; None: all, from the first.
        """
        order = range(self.num_layers) if order is None else order
        if not order:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
            ahead = pool.submit(self._read_layer, order[0])
            for following in [*order[1:], None]:
                params = ahead.result()
                if following is not None:
                    ahead = pool.submit(self._read_layer, following)
                yield params

    def _read_layer(self, index: int) -> Params:
        layer = self.architecture.layers[index]
        return layer.stack(
            inside_layer(
                index, self.reader.read([f"layers.{index}.{path}" for path in layer.stored])
            )
        )

    def put_layer(self, index: int, params: Params) -> dict[str, Array]:
        """Puts a layer's params on the devices: experts are sharded over them, all else is
        replicated.

        Args:
            index: the index of the layer.
            params: as its program takes them.
        """
        experts = self.architecture.layers[index].experts
        stacks = {
            path: array for path, array in params.items() if path.rpartition(".")[0] in experts
        }
        rest = {path: array for path, array in params.items() if path not in stacks}
        return self.devices.replicate(rest) | self.devices.shard_first(stacks)

    def params_of(self, part: Part, *, cast: bool = False) -> dict[str, Array]:
        """Puts the params of the embedding or of the head on the device.

        Args:
            part: `architecture.embed` or `architecture.head`.
            cast: to the dtype of the computation, for a part that is applied many times.
        """
        params: Mapping[str, Any] = self.reader.read(part.spec)
        if cast:
            params = {path: param.astype(self.dtype) for path, param in params.items()}
        return self.devices.replicate(params)

    def embed(
        self,
        tokens: Int[np.ndarray, "w t"],
        *,
        layout: Layout | None = None,
        at_a_time: int | None = None,
    ) -> HiddenStates:
        """Computes the hidden states before the first layer.

        Args:
            tokens: token ids.
            layout: the layout of all windows, on the host, where they hold several texts.
            at_a_time: tokens that they bring to the device at a time; None: what suits it.

        Raises:
            InputError: see `require_tokens`.
        """
        self.require_tokens(tokens)
        windows, length = tokens.shape
        params = self.params_of(self.architecture.embed)
        batch = batch_size(windows, length, at_a_time, self.devices.count)
        shape = windows, length, self.architecture.width
        hidden = HiddenStates(shape, self.dtype, batch, self.devices, self.scratch)

        def step(rows: slice) -> Array:
            ids = self.devices.shard_first(tokens[rows].astype(np.int32))
            return apply(self.architecture.embed, params, ids, self._layout_of(layout, rows))

        hidden.replace(step)
        return hidden

    def forward(
        self,
        index: int,
        params: Mapping[str, Any],
        hidden: HiddenStates,
        layout: Layout | None = None,
    ) -> None:
        """Moves hidden states through one decoder layer.

        Args:
            index: the index of the layer.
            params: its params, on the device.
            hidden: before the layer; after it when this returns.
            layout: the layout of all windows, on the host, where they hold several texts.
        """

        layer = self.architecture.layers[index]
        hidden.update(lambda x, rows: apply_layer(layer, params, x, self._layout_of(layout, rows)))

    def _layout_of(self, layout: Layout | None, rows: slice) -> Layout | None:
        """Returns the layout of some windows, on the device."""
        return jax.tree.map(lambda field: self.devices.shard_first(field[rows]), layout)

    def final_states(
        self,
        *tokens: Int[np.ndarray, "_ _"],
        layouts: Sequence[Layout] = (),
        layers: int | None = None,
        at_a_time: int | None = None,
        visit: Callable[[int, list[HiddenStates]], None] = lambda index, states: None,
    ) -> list[HiddenStates]:
        """Embeds windows and moves them through the layers; each layer is read once for all of
        them.

        Args:
            tokens: token ids of windows, [windows, length]; several arrays may have several
                lengths.
            layouts: the layouts of each of them, where they hold several texts.
            layers: how many, from the first; None: all.
            at_a_time: see `embed`.
            visit: is called with each layer's index and the hidden states before it.

        Returns:
            The hidden states after the last of the layers, for each of `tokens`.

        Raises:
            InputError: see `require_tokens`.
        """
        every = [*layouts, *[None] * (len(tokens) - len(layouts))]
        states = [
            self.embed(windows, layout=layout, at_a_time=at_a_time)
            for windows, layout in zip(tokens, every, strict=True)
        ]

        def move(index: int, params: Params, _: dict[str, float]) -> None:
            visit(index, states)
            own = self.put_layer(index, params)
            for hidden, layout in zip(states, every, strict=True):
                self.forward(index, own, hidden, layout)

        for _ in sweep(range(self.num_layers if layers is None else layers), self.layers, move):
            pass
        return states

    def logits(self, tokens: Int[np.ndarray, "w t"]) -> Shaped[np.ndarray, "w t v"]:
        """Computes the logits of windows, all of which are kept on the host: for few tokens, as in
        tests.

        Args:
            tokens: token ids of windows, [windows, length].

        Returns:
            [windows, length, vocabulary], in the dtype of the computation.

        Raises:
            InputError: see `require_tokens`.
        """
        (states,) = self.final_states(tokens)
        head = self.params_of(self.architecture.head)
        return np.concatenate(
            [fetch(apply(self.architecture.head, head, batch)) for batch in states.batches()]
        )

    def score_tokens(
        self,
        head: Mapping[str, Array],
        states: Shaped[np.ndarray, "n d"],
        targets: Int[np.ndarray, "n"],
    ) -> TokenScores:
        """Scores tokens, a chunk at a time: the logits of one chunk, [1024, vocabulary], are the
        largest array.

        Args:
            head: params of the head, on the device.
            states: the last layer's output where each token is predicted.
            targets: ids of the tokens.
        """
        step = partial(score, self.architecture.head, head)
        return TokenScores(*in_chunks(self.devices, step, states, targets))

    def next_tokens(
        self,
        head: Mapping[str, Array],
        states: Shaped[np.ndarray, "n d"],
        uniform: Float[np.ndarray, "n"] | None = None,
    ) -> Int[np.ndarray, "n"]:
        """Returns the ids of next tokens.

        Args:
            head: params of the head, on the device.
            states: the last layer's output where each token is predicted.
            uniform: numbers from 0 to 1 by which they are drawn; None: the most probable ones.

        Raises:
            InputError: the predictions hold NaN or infinity.
        """
        function, given = (most_probable, []) if uniform is None else (drawn, [uniform])
        ids, finite = in_chunks(
            self.devices, partial(function, self.architecture.head, head), states, *given
        )
        if not finite.all():
            raise InputError(
                "the model's predictions hold NaN or infinity", options={"dtype": "float32"}
            )
        return ids


def inside_layer(index: int, params: Params) -> Params:
    """Returns a layer's params under their paths inside the layer."""
    return {path.removeprefix(f"layers.{index}."): array for path, array in params.items()}


def in_checkpoint(index: int, params: Params) -> Params:
    """Returns a layer's params under their paths in the checkpoint."""
    return {f"layers.{index}.{path}": array for path, array in params.items()}


@partial(jax.jit, static_argnums=0)
def apply(part: Part, params: Mapping[str, Array], x: Array, layout: Layout | None = None) -> Array:
    """Applies the embedding, to token ids as they lie in their windows, or the head."""
    return part(params, x) if layout is None else part(params, x, layout)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def apply_layer(
    layer: Part, params: Mapping[str, Array], x: Float[Array, "b t d"], layout: Layout | None = None
) -> Float[Array, "b t d"]:
    """Applies a layer; x is donated."""
    return layer(params, x, layout)[0]
