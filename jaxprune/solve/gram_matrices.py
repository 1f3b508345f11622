"""Sums the Gram matrices of a layer's inputs over the calibration windows.

One forward pass of the dense layer suffices, except for experts whose Gram matrices do not fit the
device together: these take one pass for each group. Gram matrices of experts are stacked.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape
from jaxtyping import Array, Float, Int

from jaxprune import hardware
from jaxprune.errors import InputError
from jaxprune.methods import gram
from jaxprune.models import Layer, Part
from jaxprune.models.common.expert_dispatch import Routed, on_each, ring_pass
from jaxprune.sharding import ONE_DEVICE, Devices, fetch
from jaxprune.solve.calibration_states import CalibrationStates

SHARE = 0.25
"""Maximum fraction of a device's memory for experts' Gram matrices. For a CPU, see
`hardware.cpu_budget`."""


class ExpertTotals(NamedTuple):
    """Sums for consecutive experts of a layer.

    Attributes:
        gram: their Gram matrices; only the lower blocks, up to the diagonal, are complete.
        tokens: number of tokens routed to each expert.
        first: index of the first expert.
    """

    gram: Float[Array, "g n n"]
    tokens: Int[Array, "g"]
    first: Int[Array, ""]


Totals = dict[str, Any]
"""Captured activation of the program -> [n, n], [devices, n, n] with one partial sum per device, or
`ExpertTotals`."""


class Grams:
    """The Gram matrices of a layer's inputs.

    Args:
        layer: the layer.
        totals: the sums.

    Attributes:
        totals: the sums that `take` has not returned yet.
    """

    def __init__(self, layer: Layer, totals: Totals) -> None:
        self.totals, self._sources = totals, layer.sources
        self._tokens = {
            capture: (int(total.first), fetch(total.tokens))
            for capture, total in totals.items()
            if isinstance(total, ExpertTotals)
        }

    def tokens(self, capture: str) -> int | None:
        """Returns the number of tokens routed to an expert; None if all tokens contribute."""
        name, expert = self._sources[capture]
        if expert is None:
            return None
        first, counts = self._tokens[name]
        return int(counts[expert - first])

    def take(self, capture: str) -> Float[Array, "n n"]:
        """Returns a Gram matrix. Each can be taken only once, which frees its memory."""
        name, expert = self._sources[capture]
        if expert is None:
            return self.totals.pop(name)
        return gram.symmetric(self.totals[name].gram[expert - self._tokens[name][0]])


def groups(
    layer: Layer, captures: Sequence[str], most: float, devices: Devices = ONE_DEVICE
) -> Iterator[list[str]]:
    """Yields groups of captured activations whose Gram matrices are summed in one pass.

    The Gram matrices of a group's experts, from the first to the last, take at most `most` bytes. A
    group has at least one expert. Activations outside experts are in the first group. On several
    devices each holds the sums of some experts, so all experts form one group.

    Args:
        layer: the layer.
        captures: the captured activations whose Gram matrices are needed.
        most: bytes for experts' Gram matrices on a device.
        devices: the devices of the run.
    """
    if devices.count > 1:
        most = math.inf
    group, spans = (
        [capture for capture in captures if layer.sources[capture].expert is None],
        dict[str, tuple[int, int]](),
    )
    for capture in captures:
        name, expert = layer.sources[capture]
        if expert is None:
            continue
        wider = spans | {name: (spans.get(name, (expert, expert))[0], expert)}
        size = sum(
            4 * layer.features(own) ** 2 * (last + 1 - first)
            for own, (first, last) in wider.items()
        )
        if spans and size > most:
            yield group
            group, wider = [], {name: (expert, expert)}
        group.append(capture)
        spans = wider
    if group:
        yield group


def most_bytes(device_bytes: float | None = None) -> float:
    """Returns the memory budget for experts' Gram matrices on a device, in bytes.

    Args:
        device_bytes: the memory of the device; None: that of this machine's device.
    """
    if device_bytes is None:
        device_bytes = hardware.device_memory()
    return hardware.cpu_budget() if device_bytes is None else SHARE * device_bytes


def gram_matrices(
    states: CalibrationStates,
    index: int,
    params: Mapping[str, Array],
    weights: Mapping[str, Float[np.ndarray, "w t"]] | None = None,
    captures: Sequence[str] | None = None,
) -> tuple[Grams, dict[str, Float[Array, "n n"]]]:
    """Sums the Gram matrices XᵀX or Xᵀ diag(w) X of a layer's inputs, in float32.

    The Gram matrix of an expert covers the tokens that are routed to it. Each token counts with its
    squared routing weight.

    Args:
        states: the model and its states before the layer. The dense model's states move to the
            layer's output.
        index: the index of the layer.
        params: the params of the dense layer, on the device.
        weights: captured activation -> w, one weight per token. Tokens of other activations have
            weight 1.
        captures: the captured activations whose Gram matrices are needed; None: all.

    Returns:
        The Gram matrices and the activation shifts X̂ᵀ(X − X̂). X̂ are the inputs after pruned
        layers and X those of the dense model. There are no shifts without dense states.

    Raises:
        InputError: an activation is NaN or infinite. Weights are checked when they are read.
    """
    devices, layer = states.model.devices, states.model.architecture.layers[index]
    hidden, dense = states.pruned, states.dense
    shapes = partial(sums, layer, layer.inputs if captures is None else captures, devices)
    empty, every = partial(_empty, devices), shapes(1)
    weights = {capture: weight for capture, weight in (weights or {}).items() if capture in every}
    experts = {
        capture: empty(one) for capture, one in every.items() if isinstance(one, ExpertTotals)
    }
    sums_of: dict[int, tuple[Totals, Totals]] = {}

    def totals_for(rows: slice) -> tuple[int, Totals, Totals]:
        """Returns one sum per device if the rows can be split over all devices, else one sum."""
        parts = 1 if (rows.stop - rows.start) % devices.count else devices.count
        if parts not in sums_of:
            plain = {
                capture: shape for capture, shape in shapes(parts).items() if capture not in experts
            }
            sums_of[parts] = empty(plain), empty(plain) if dense else {}
        return parts, *sums_of.pop(parts)

    def weights_of(rows: slice) -> dict[str, Array]:
        return {capture: devices.shard_first(weight[rows]) for capture, weight in weights.items()}

    def move_dense(before: Array, rows: slice) -> Array:
        x = hidden.batch(rows)
        parts, *totals = totals_for(rows)
        after, sums_of[parts] = accumulate_shift(layer, params, x, before, weights_of(rows), totals)
        return after

    if dense:
        dense.update(move_dense)
    else:
        for rows, x in zip(hidden.slices(), hidden.batches(), strict=True):
            parts, totals, _ = totals_for(rows)
            totals = accumulate(layer, params, x, weights_of(rows), totals | experts)
            experts = {capture: totals.pop(capture) for capture in experts}
            sums_of[parts] = totals, {}
    if devices.count > 1:
        plain, shifts = devices.replicate(_total(list(sums_of.values())))
    else:
        plain, shifts = sums_of[1]
    del sums_of
    found = {capture: gram.symmetric(plain.pop(capture)) for capture in list(plain)} | experts
    if bad := [capture for capture, good in fetch(_finite(found)).items() if not good]:
        raise InputError(
            f"activations are NaN or infinite in {', '.join(sorted(bad))}: the calibration text is "
            "unusual or the dtype too narrow",
            options={"dtype": "float32"},
        )
    return Grams(layer, found), shifts


def sums(layer: Layer, captures: Iterable[str], devices: Devices, parts: int) -> Totals:
    """Returns what the Gram matrices of some captures are summed in, as shapes and dtypes.

    Those of experts are for all from the first to the last that are wanted; on several devices,
    over which all of a layer are spread evenly, for all. Of `first` this is the number.

    Args:
        layer: the layer.
        captures: the inputs whose Gram matrices are wanted.
        devices: the devices of the run.
        parts: how many devices sum their own windows apart from the others: all, or 1.
    """
    found: Totals = {}
    for capture, experts in layer.programs_of(captures).items():
        n = layer.features(capture)
        if experts is None:
            shape = Shape((n, n) if parts == 1 else (parts, n, n), jnp.float32)
            found[capture] = devices.abstract(shape, None if parts == 1 else 0)
            continue
        every = range(min(experts), max(experts) + 1)
        if devices.count > 1:
            every = range(layer.experts[layer.reads[capture][0]])
        found[capture] = ExpertTotals(
            devices.abstract(Shape((len(every), n, n), jnp.float32), 0),
            devices.abstract(Shape((len(every),), jnp.int32), None),
            np.int32(every.start),
        )
    return found


def _empty(devices: Devices, totals: Any) -> Any:
    """Returns zeros of such shapes, on the devices, and numbers as they are."""

    def zeros(leaf: Any) -> Any:
        if isinstance(leaf, Shape):
            return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        return devices.replicate(leaf)

    return jax.tree.map(zeros, totals)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def accumulate(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    weights: Mapping[str, Float[Array, "b t"]],
    totals: Totals,
) -> Totals:
    """Adds a batch to the Gram matrices; see `Totals`.

    Only the lower blocks, up to the diagonal, are complete; see `gram.add_gram`.
    """
    _, captures = layer(params, x)
    return {
        capture: _add_routed(total, captures[capture], weights.get(capture))
        if isinstance(total, ExpertTotals)
        else _add(gram.add_gram, total, captures[capture], weights.get(capture))
        for capture, total in totals.items()
    }


def _add_routed(total: ExpertTotals, capture: Routed, weights: Array | None) -> ExpertTotals:
    """Adds slots of experts, weighted by squared routing weights and by token weights."""
    of_rows = capture.weights()
    if weights is not None:
        of_rows = of_rows * capture.slots_of_tokens(weights)
    group = _group(capture.plan.expert_ids, total.first, len(total.tokens))
    own = jnp.arange(len(total.tokens), dtype=jnp.int32)[:, None] == group[None, :]
    filled = capture.filled().astype(jnp.int32)[:, 0]
    tokens = total.tokens + jnp.sum(
        jnp.where(own, filled[None, :], jnp.int32(0)), axis=1, dtype=jnp.int32
    )
    if capture.mesh is None:
        return total._replace(
            gram=gram.add_grouped(total.gram, capture.x, of_rows, group), tokens=tokens
        )
    added = on_each(capture.mesh, _add_by_ring)(
        total.gram, capture.x, of_rows, capture.plan.expert_ids
    )
    return total._replace(gram=added, tokens=tokens)


def _group(expert_ids: Int[Array, "N"], first: Array, count: int) -> Int[Array, "N"]:
    """Returns the index of each block's expert among `count` experts from `first`; -1: none."""
    group = expert_ids - first
    return jnp.where(group < count, group, jnp.int32(-1))


def _add_by_ring(
    total: Float[Array, "e n n"],
    x: Float[Array, "N B n"],
    weights: Float[Array, "N B"],
    expert_ids: Int[Array, "N"],
) -> Float[Array, "e n n"]:
    """Adds each device's rows to the sums of all experts in a ring pass."""

    def step(total: Array, first: Array, carry: Array) -> tuple[Array, Array]:
        return gram.add_grouped(total, x, weights, _group(expert_ids, first, len(total))), carry

    return ring_pass(total, jnp.int32(0), step)[0]


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def accumulate_shift(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    dense: Float[Array, "b t d"],
    weights: Mapping[str, Float[Array, "b t"]],
    sums: Sequence[Totals],
) -> tuple[Float[Array, "b t d"], tuple[Totals, Totals]]:
    """Adds a batch to the Gram matrices and to the activation shifts.

    Args:
        layer: the layer; static.
        params: its params.
        x: the input after pruned layers.
        dense: the input after dense layers.
        weights: as for `gram_matrices`.
        sums: Gram matrices and activation shifts; donated.

    Returns:
        The layer's output for `dense`, and the new sums.
    """
    grams, shifts = sums
    (_, captures), (after, dense_captures) = layer(params, x), layer(params, dense)
    grams = {
        capture: _add(gram.add_gram, total, captures[capture], weights.get(capture))
        for capture, total in grams.items()
    }
    shifts = {
        capture: _add(
            gram.add_shift, total, captures[capture], dense_captures[capture], weights.get(capture)
        )
        for capture, total in shifts.items()
    }
    return after, (grams, shifts)


def _add(add: Callable[..., Array], total: Array, *arrays: Array | None) -> Array:
    """Adds the product over all tokens, or each device's product to its own partial sum."""
    if total.ndim == 2:
        return add(total, *arrays)
    parts = [None if a is None else a.reshape(len(total), -1, *a.shape[1:]) for a in arrays]
    return jax.vmap(add)(total, *parts)


@jax.jit
def _total(sums: Sequence[tuple[Totals, Totals]]) -> tuple[Totals, Totals]:
    """Returns the sums over all devices and batches."""
    whole = jax.tree.map(lambda total: total if total.ndim == 2 else jnp.sum(total, axis=0), sums)
    return jax.tree.map(lambda *totals: sum(totals[1:], totals[0]), *whole)


@jax.jit
def _finite(totals: Totals) -> dict[str, Array]:
    return {
        capture: jnp.all(jnp.isfinite(total.gram if isinstance(total, ExpertTotals) else total))
        for capture, total in totals.items()
    }
