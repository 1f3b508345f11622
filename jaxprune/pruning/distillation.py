r"""Distillation: the kept weights tuned against the dense model's predictions, end to end, masks fixed.

Layer by layer, pruning keeps each linear layer's own output; what remains is an error that grows through the depth of
the model. Here the kept weights of all linear layers are tuned together by Adam to minimise, over the calibration
tokens, the mean of

    KL(p‖q) = Σ_v p_v (log p_v − log q_v),

p and q the next-token distributions of the dense and of the pruned model. Norms, embedding and head stay.

The model streams as in pruning: a step's forward pass keeps each layer's input on the host; from the last layer to the
first, each is run again under `jax.vjp` and updated at once. An epoch costs four forward passes and three products with
the head. The kernels and their moments, 6 bytes a pruned weight, stay on the device where they fit; else the host holds
them, and the device one layer's with its gradients, the one that comes next, and the one that goes. So do a step's
intermediate results of all layers, which saves the second of the four passes.

References:
    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), for the loss.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from convert import Params
from jaxprune import hardware
from jaxprune.errors import Change, InputError
from jaxprune.models import Architecture, Part
from jaxprune.pruning import adam
from jaxprune.pruning.adam import Kernels, Saved
from jaxprune.pruning.journal import Journal
from jaxprune.pruning.results import LayerResult
from jaxprune.recipe import Tuning
from jaxprune.sharding import fetch
from jaxprune.streaming.head import CHUNK, exponentials, in_chunks, kl_divergence, logits
from jaxprune.streaming.model import StreamedModel, apply, apply_layer, in_checkpoint, inside_layer
from jaxprune.streaming.observer import SILENT, Observer

CPU_BYTES = 4e9
"""The most memory for a step's intermediate results where the device is the CPU."""
SHARE = 0.92
"""Of a device's memory that is used; the rest is fragmentation."""


class Placement(NamedTuple):
    """What stays on the device.

    Attributes:
        state: whether kernels and their moments do; else they stay on the host.
        results: whether a step's intermediate results do; else each layer's forward pass is run again before its vjp.
    """

    state: bool
    results: bool


class OuterParams(NamedTuple):
    """Params of the embedding and of the head, on the device."""

    embed: Mapping[str, Array]
    head: Mapping[str, Array]


def distill(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    layers: Iterable[LayerResult],
    tuning: Tuning,
    *,
    seed: int = 0,
    journal: Journal | None = None,
    observer: Observer = SILENT,
) -> Iterator[LayerResult]:
    """Tunes pruned layers. Masks stay; so do the results of the kernels, which are those of their solves.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        layers: all layers, as `loop.prune_layers` gives them; each is let go when it is taken up.
        tuning: how.
        seed: the seed of the order of windows.
        journal: where the state is kept now and then, and taken from where it is kept already; None: nothing is kept.
        observer: is told the divergence of each epoch.

    Raises:
        InputError: the loss is not finite.
    """
    architecture = model.architecture
    batches = _batches(tokens, tuning, seed)
    memory = (jax.local_devices()[0].memory_stats() or {}) if not hardware.current().on_cpu else None
    free = None if memory is None else memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
    placement = placement_of(architecture, (len(batches[0]), tokens.shape[1]), model.devices.count, free)
    place = model.devices.shard_outputs if placement.state else _on_host
    results, state, rest, dtypes = [], [], [], []
    for result in layers:
        layer = architecture.layers[result.index]
        params = layer.stack(inside_layer(result.index, result.params))
        sources = [layer.sources[path] for path in result.masks]  # others stay dense
        kernels = {f"{name}.kernel": params.pop(f"{name}.kernel") for name in dict.fromkeys(s.name for s in sources)}
        dtypes.append({name: kernel.dtype for name, kernel in kernels.items()})
        results.append(dataclasses.replace(result, params={}))
        experts: dict[str, list[int | None]] = {f"{s.name}.kernel": [] for s in sources}
        for source in sources:
            experts[f"{source.name}.kernel"].append(source.expert)
        state.append(place(adam.init(kernels, experts)))
        rest.append(params)
    visited, where = np.unique(np.concatenate(batches), return_inverse=True)
    (dense,) = model.final_states(tokens[visited])
    outer = OuterParams(*(model.params_of(part, cast=True) for part in (architecture.embed, architecture.head)))

    steps = len(batches)
    rate = optax.warmup_cosine_decay_schedule(
        tuning.tune_rate / 10, tuning.tune_rate, min(math.ceil(steps / 8), steps - 1), steps, tuning.tune_rate / 20
    )
    saved = Saved(journal)
    begin, divergences = saved.restore(state, place)
    for step, rows in enumerate(where.reshape(steps, -1)):
        if step < begin:
            continue
        chosen = tokens[visited[rows]], dense.read(rows)
        numbers = jnp.float32(step + 1), jnp.float32(rate(step))
        divergences.append(_step(model, placement, outer, rest, state, *chosen, *numbers))
        epoch, within = divmod(step * len(rows), len(tokens))
        if within + len(rows) == len(tokens) or step == steps - 1:
            observer.epoch_done(epoch, float(np.mean(divergences)))
            divergences.clear()
        saved.keep(step + 1, state, divergences)
    for result, params, tuned, kinds in zip(results, rest, state, dtypes, strict=True):
        stored = {name: fetch(adam.rounded(tuned, name, dtype, model.devices)) for name, dtype in kinds.items()}
        params = architecture.layers[result.index].unstack(params | stored)
        yield dataclasses.replace(result, params=in_checkpoint(result.index, params))


def _batches(tokens: Int[np.ndarray, "w t"], tuning: Tuning, seed: int) -> list[Int[np.ndarray, "b"]]:
    """Returns the windows of each step: every epoch visits all, in a new order, and the last may end early."""
    windows = len(tokens)
    count = max(c for c in range(1, min(tuning.tune_windows, windows) + 1) if windows % c == 0)
    steps = max(1, round(tuning.tune_epochs * windows / count))
    generator = np.random.default_rng(seed)
    epochs = [generator.permutation(windows).reshape(-1, count) for _ in range(math.ceil(steps * count / windows))]
    return list(np.concatenate(epochs)[:steps])


def placement_of(
    architecture: Architecture, window: tuple[int, int], devices: int = 1, free: float | None = None
) -> Placement:
    """Returns what fits a device, beside what a layer takes while it is visited.

    Args:
        architecture: of the model whose kernels are tuned.
        window: windows of a step, and their length.
        devices: how many the kernels are spread over.
        free: bytes of a device; None: it is a CPU, which has all that the host has.
    """
    dtype = np.dtype(architecture.config.dtype)
    rows = window[0] if window[0] % devices else window[0] // devices
    x = jax.ShapeDtypeStruct((rows, window[1], architecture.width), dtype)
    state = results = visit = largest = 0
    for layer, count in Counter(architecture.layers).items():
        values = {f"{path}.kernel": jax.ShapeDtypeStruct(s, jnp.float32) for path, s in layer.linears.items()}
        rest = {name: shape for name, shape in layer.spec.items() if name not in values}
        kept = _bytes(jax.eval_shape(partial(forward_and_vjp, layer), values, rest, x)[1])
        own = _bytes(jax.eval_shape(lambda values: {n: adam.moving_of(v) for n, v in values.items()}, values))
        state, results, largest = state + count * own, results + count * kept, max(largest, own)
        visit = max(visit, 2 * kept + _bytes(values) // 4 * dtype.itemsize)  # and gradients
    if free is None:
        return Placement(True, results < CPU_BYTES)
    outer = sum(shape.size for part in (architecture.embed, architecture.head) for shape in part.spec.values())
    logits = 6 * 4 * CHUNK // 2 * architecture.config.vocab_size
    free = SHARE * free - visit - logits - outer * dtype.itemsize
    stays = state / devices < free
    return Placement(stays, results < free - (state if stays else 3 * largest) / devices)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _on_host(tree: Any) -> Any:
    """Returns arrays on the host, where they may lie already."""
    return jax.tree.map(lambda leaf: fetch(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def _step(
    model: StreamedModel,
    placement: Placement,
    outer: OuterParams,
    rest: Sequence[Params],
    state: list[Kernels],
    tokens: Int[np.ndarray, "b t"],
    dense: Float[np.ndarray, "b t d"],
    number: Float[Array, ""],
    rate: Float[Array, ""],
) -> float:
    """Updates the state by some windows; returns their mean divergence, before."""
    architecture, devices = model.architecture, model.devices
    x = apply(architecture.embed, outer.embed, devices.shard_first(tokens))
    vjps: list[Any] = []  # of the layers, or their inputs
    values_of_layers = _ahead((kernels.values for kernels in state), devices.shard_outputs)
    for layer, values, others in zip(architecture.layers, values_of_layers, rest, strict=True):
        if placement.results:
            x, vjp = forward_and_vjp(layer, values, others, x)
        else:
            vjp = np.array(fetch(x))  # a copy, for x is donated
            x = apply_layer(layer, others | values, x)
        vjps.append(vjp)
    states = fetch(x).reshape(-1, x.shape[-1])
    divergence, gradient = in_chunks(
        devices,
        lambda *chunk: head_divergence(architecture.head, outer.head, *chunk),
        states,
        dense.reshape(states.shape),
        models=2,
    )
    if not np.isfinite(divergence).all():
        raise InputError(
            "the loss of the distillation holds NaN or infinity",
            options={"tune_rate": Change.LOWER, "dtype": "float32"},
        )
    cotangent = devices.shard_first(gradient.reshape(x.shape))
    going = _Going(state)
    from_last = _ahead(reversed(state), devices.shard_outputs)
    for index, kernels in zip(reversed(range(len(state))), from_last, strict=True):
        gradients, cotangent = pull_back(architecture.layers[index], kernels.values, rest[index], vjps.pop(), cotangent)
        moved = adam.step(kernels, gradients, number, rate)
        if placement.state:
            state[index] = kernels._replace(moving=devices.shard_outputs(moved))
        else:
            going.send(index, moved)
    going.arrive()
    return float(divergence.mean(dtype=np.float64))


def _ahead(items: Iterable[Any], put: Callable[[Any], Any]) -> Iterator[Any]:
    """Yields items on the device, where the next one is on its way already; what is there stays."""
    before = None
    for item in items:
        here = put(item)
        if before is not None:
            yield before
        before = here
    yield before


class _Going:
    """Kernels on their way to the host while the next ones are computed.

    Args:
        state: where they go.
    """

    def __init__(self, state: list[Kernels]) -> None:
        self._state = state
        self._pending: tuple[int, dict[str, adam.Moving]] | None = None

    def send(self, index: int, moved: dict[str, adam.Moving]) -> None:
        """Sends a layer's, once those before them have arrived."""
        for leaf in jax.tree.leaves(moved):
            leaf.copy_to_host_async()
        self.arrive()
        self._pending = index, moved

    def arrive(self) -> None:
        """Returns when they are there."""
        if self._pending:
            index, moved = self._pending
            self._state[index] = self._state[index]._replace(moving=fetch(moved))
            self._pending = None


@partial(jax.jit, static_argnums=0)
def head_divergence(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], dense: Float[Array, "n d"]
) -> tuple[Float[Array, "n"], Float[Array, "n d"]]:
    """Computes KL divergences of tokens, and the gradient of their sum by the pruned model's last states."""
    scores, vjp = jax.vjp(lambda states: logits(head, params, states), states)
    p, q = exponentials(logits(head, params, dense)), exponentials(scores)
    (gradient,) = vjp(q.values / q.total - p.values / p.total)
    return kl_divergence(p, q), gradient


@partial(jax.jit, static_argnums=0)
def forward_and_vjp(
    part: Part, values: Mapping[str, Array], rest: Mapping[str, Array], x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], Any]:
    """Computes a layer's output, and the function from its cotangent to those of the kernels and of the input.

    The kernels themselves are left out of what that function keeps: `pull_back` puts them in again.
    """
    output, vjp = jax.vjp(lambda values, x: part({**rest, **values}, x)[0], dict(values), x)
    vjp.args_res[0] = None
    return output, vjp


@partial(jax.jit, static_argnums=0)
def pull_back(
    part: Part, values: Mapping[str, Array], rest: Mapping[str, Array], vjp: Any, cotangent: Float[Array, "b t d"]
) -> tuple[dict[str, Array], Float[Array, "b t d"]]:
    """Computes the gradients of a layer's kernels, in the dtype of the computation, and the cotangent of its input.

    Args:
        part: the layer.
        values: its kernels.
        rest: its other params.
        vjp: the vjp from `forward_and_vjp`, or the layer's input.
        cotangent: the cotangent of the layer's output.
    """
    backward = vjp if callable(vjp) else forward_and_vjp(part, values, rest, vjp)[1]
    backward.args_res[0] = dict(values)
    gradients, before = backward(cotangent)
    return {name: gradient.astype(cotangent.dtype) for name, gradient in gradients.items()}, before
