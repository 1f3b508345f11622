"""Texts continued, all together, one token of each at a time; keys and values of the tokens before
are kept.

The layers stay on the device where they fit it; else one is there at a time, and every token reads
the model once, for all texts. What a layer keeps of the texts stays on the device.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune import hardware
from jaxprune.models import Architecture, Layout, Part
from jaxprune.models.common.cache import Cache
from jaxprune.sharding import fetch
from jaxprune.streaming.model import StreamedModel, apply
from jaxprune.streaming.observer import SILENT, Observer

STAY = 0.75
"""Of the memory, the most that layers may take to stay: from a device's own memory they are read
tens of times as fast as from the host's, so few texts at a time beside them are sooner done than
many without."""
TEXTS = 0.5
"""Of the memory that is left then, the most that may be kept of texts."""
MOST_TOKENS = 2**14
"""Tokens of prompts that go through a layer at a time, padding included."""
BLOCK = 32
"""Windows and capacities are multiples of it, so that few programs serve all lengths."""
Finished = Callable[[int, list[int]], bool]
"""(Number of a text, its new tokens) -> whether it ends with them."""


def generate(
    model: StreamedModel,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    finished: Finished,
    observer: Observer = SILENT,
) -> list[list[int]]:
    """Returns the most probable continuation of each prompt, token by token; arguments and errors
    as for `in_batches`."""
    made = {
        number: new
        for batch in in_batches(model, prompts, most, finished, observer)
        for number, new in batch.items()
    }
    return [made[number] for number in range(len(prompts))]


def in_batches(
    model: StreamedModel,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    finished: Finished,
    observer: Observer = SILENT,
    *,
    seed: int | None = None,
    made: Set[int] = frozenset(),
) -> Iterator[dict[int, list[int]]]:
    """Yields a continuation of each prompt, by its number, as many together as have room.

    Args:
        model: continues them.
        prompts: token ids, at least one each.
        most: new tokens of each, at most.
        finished: says where one ends.
        observer: is notified of each token as a layer that was visited.
        seed: tokens are drawn as the model has them, by numbers that the seed and the prompt's
            place fix; None: each is the most probable one.
        made: numbers of prompts that are left out.

    Raises:
        InputError: ids outside the vocabulary, or more tokens than the model was made for.
    """
    layers = _Layers(model)
    batches = [*_batches(model, prompts, most, made, TEXTS * layers.room)]
    steps = [max(most[number] for number in numbers) for numbers in batches]
    what = f"generating {sum(map(len, batches))} texts of at most {max(steps, default=0)} tokens"
    observer.started(f"{what} with {model.short_name}", sum(steps), "steps")
    for numbers in batches:
        ends = {number: most[number] for number in numbers if most[number] > 0}
        longest = max(len(prompts[number]) + most[number] for number in numbers)
        uniform = (
            None if seed is None else _uniform_numbers(seed, numbers, max(ends.values(), default=0))
        )
        tokens = _continued(
            model, layers, [prompts[number] for number in numbers], longest, uniform
        )
        new: dict[int, list[int]] = {number: [] for number in numbers}
        while ends:
            observer.layer_visited(0)
            for number, token in zip(numbers, next(tokens), strict=True):
                if number in ends:
                    new[number].append(token)
                    if len(new[number]) >= ends[number] or finished(number, new[number]):
                        del ends[number]
        yield new


def _uniform_numbers(seed: int, numbers: Sequence[int], count: int) -> Float[np.ndarray, "c n"]:
    """Returns numbers from 0 to 1, a row for each token, by which those of some prompts are
    drawn."""
    return np.stack(
        [np.random.default_rng([seed, number]).random(count, np.float32) for number in numbers],
        axis=1,
    )


class _Layers:
    """The layers' params on the device, one after the other.

    Args:
        model: whose they are.

    Attributes:
        room: bytes of the memory beside them, where they stay.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._model, memory = model, _memory()
        size = sum(
            p.size * p.dtype.itemsize
            for layer in model.architecture.layers
            for p in layer.spec.values()
        )
        stay = size <= STAY * memory
        self._kept: list[Mapping[str, Array]] | None = [] if stay else None
        self.room = memory - stay * size

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Array]]]:
        if self._kept:
            yield from enumerate(self._kept)
            return
        for index, params in enumerate(self._model.layers()):
            own = self._model.put_layer(index, params)
            if self._kept is not None:
                self._kept.append(own)
            yield index, own


def _memory() -> int:
    """Returns the bytes of the device's memory; on a CPU, two thirds of the host's."""
    if hardware.current().on_cpu:
        return hardware.host_memory() * 2 // 3
    return hardware.device_memory() or 0


def _batches(
    model: StreamedModel,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    made: Set[int],
    room: float,
) -> Iterator[Sequence[int]]:
    """Yields numbers of prompts of similar length, as many as what is kept of them has room for."""
    order = sorted(
        set(range(len(prompts))) - made, key=lambda number: (len(prompts[number]), number)
    )
    longest = 0
    batch: list[int] = []
    for number in order:
        longest = max(longest, len(prompts[number]) + most[number])
        kept = (len(batch) + 1) * _bytes_of_text(model.architecture, _rounded(longest))
        tokens = (len(batch) + 1) * _rounded(len(prompts[number]))  # the last one is the longest
        if batch and (kept > room or tokens > MOST_TOKENS):
            yield batch
            batch, longest = [], len(prompts[number]) + most[number]
        batch.append(number)
    if batch:
        yield batch


@functools.lru_cache(maxsize=256)
def _bytes_of_text(architecture: Architecture, capacity: int) -> int:
    """Returns the bytes that all layers keep of one text."""
    x = jax.ShapeDtypeStruct((1, 1, architecture.width), architecture.config.dtype)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    total = 0
    for layer, count in Counter(architecture.layers).items():
        _, kept = jax.eval_shape(partial(begin, layer, capacity=capacity), layer.spec, x, lengths)
        total += count * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return total


def _rounded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _continued(
    model: StreamedModel,
    layers: _Layers,
    prompts: Sequence[Sequence[int]],
    longest: int,
    uniform: Float[np.ndarray, "c n"] | None,
) -> Iterator[list[int]]:
    """Yields the next token of each prompt, then the one after that, and so on."""
    architecture, devices = model.architecture, model.devices
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    architecture.require_length(longest)
    windows = np.zeros((len(prompts), int(lengths.max())), np.int32)
    for row, prompt in zip(windows, prompts, strict=True):
        row[: len(prompt)] = prompt
    model.require_tokens(windows)
    windows = np.pad(windows, ((0, 0), (0, _rounded(windows.shape[1]) - windows.shape[1])))
    embed, head = (model.params_of(part) for part in (architecture.embed, architecture.head))
    capacity = _rounded(max(longest, windows.shape[1]))
    x = apply(architecture.embed, embed, devices.shard_first(windows))
    kept: list[Any] = []
    for index, params in layers:
        x, own = begin(
            architecture.layers[index], params, x, devices.shard_first(lengths), capacity=capacity
        )
        kept.append(own)
    x = jnp.take_along_axis(x, jnp.asarray(lengths)[:, None, None] - 1, axis=1)
    for number in range(capacity):
        tokens = model.next_tokens(
            head, fetch(x[:, 0]), None if uniform is None else uniform[number]
        )
        yield tokens.tolist()
        places = devices.shard_first(np.minimum(lengths + number, capacity - 1)[:, None])
        at = Layout(places, jnp.zeros_like(places), jnp.zeros_like(places))
        x = apply(
            architecture.embed, embed, devices.shard_first(tokens[:, None].astype(np.int32)), at
        )
        for index, params in layers:
            layer = architecture.layers[index]
            x, kept[index] = go_on(layer, params, x, places, kept[index], capacity=capacity)


@partial(jax.jit, static_argnums=0, static_argnames="capacity")
def begin(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    lengths: Int[Array, "b"],
    *,
    capacity: int,
) -> tuple[Float[Array, "b t d"], tuple[Any, ...]]:
    """Applies a layer to the beginnings of texts; returns what it keeps of them, too.

    Args:
        layer: the layer.
        params: its params.
        x: the hidden states of windows, a text each, with padding after it.
        lengths: the texts' tokens.
        capacity: tokens of the longest text in the end.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    cache = Cache(positions, lengths, capacity)
    y, _ = layer(params, x, cache)
    return y, tuple(cache.after)


@partial(jax.jit, static_argnums=0, static_argnames="capacity", donate_argnums=4)
def go_on(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b 1 d"],
    positions: Int[Array, "b 1"],
    kept: Any,
    *,
    capacity: int,
) -> tuple[Float[Array, "b 1 d"], tuple[Any, ...]]:
    """Applies a layer to one more token of each text.

    Args:
        layer: the layer.
        params: its params.
        x: the tokens' hidden states.
        positions: where they are in their texts.
        kept: what the layer kept of the tokens before.
        capacity: as in `begin`.
    """
    cache = Cache(positions, positions[:, 0], capacity, kept)
    y, _ = layer(params, x, cache)
    return y, tuple(cache.after)
