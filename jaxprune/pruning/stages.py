"""The steps of a visit to a layer, each a function (run, layer) -> layer: Gram matrices, solves, the next input."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxprune import sharding as devices
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method, with_more_damping
from jaxprune.methods import gram as stats
from jaxprune.models import Model, Part
from jaxprune.pruning.kernel import LinearResult, solve_linear
from jaxprune.pruning.sensitivity import Weights
from jaxprune.sparsity.masks import StoredMask, pack
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.stream import forward

PatternOf = Callable[[int, str], Pattern | StoredMask]
"""(layer index, path of the linear) -> its pattern, or its mask where that was made elsewhere."""


class Run(NamedTuple):
    """What does not change from layer to layer, but for the hidden states' content.

    Attributes:
        model, method, pattern_of: as given.
        hidden: behind the layers as pruned.
        weights: of the layers' tokens and outputs.
        dense: hidden states behind the dense layers; only where there is an asymmetry.
        asymmetry: share of the inputs' drift that a linear makes up for.
    """

    model: Model
    hidden: HiddenStates
    method: Method
    pattern_of: PatternOf
    weights: Sequence[Weights] | None = None
    dense: HiddenStates | None = None
    asymmetry: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the stages hand on.

    Attributes:
        index: of the layer.
        params: on the device, in the stored dtype; paths inside the layer.
        grams: tap -> Gram matrix of what it taps; consumed by `solve`.
        drifts: tap -> see `stats.add_drift`; empty without an asymmetry; consumed by `solve`.
        linears: outcomes so far.
        masks: packed, of the linears pruned so far.
    """

    index: int
    params: dict[str, Array]
    grams: dict[str, Float[Array, "n n"]]
    drifts: dict[str, Float[Array, "n n"]]
    linears: dict[str, LinearResult]
    masks: dict[str, UInt8[Array, "m _"]]


Stage = Callable[[Run, Layer], Layer]
DAMPING = 1, 10, 100, 1000
"""A solve that fails is tried again with so many times the damping."""


def measure(run: Run, layer: Layer) -> Layer:
    """One pass of the dense layer: the Gram matrices of its linears' inputs.

    Raises:
        InputError: NaN or infinity in the layer's activations; weights are looked at when they are read.
    """
    weights = run.weights[layer.index].tokens if run.weights else {}
    sums: dict[int, tuple[dict[str, Array], dict[str, Array]]] = {}

    def totals_for(rows: slice) -> tuple[int, dict[str, Array], dict[str, Array]]:
        """Sums on each device where the rows can be split over all of them, else one."""
        parts = 1 if (rows.stop - rows.start) % devices.number() else devices.number()
        if parts not in sums:
            shapes = {tap: (n, n) if parts == 1 else (parts, n, n) for tap, n in run.model.widths.items()}
            zeros = [{tap: devices.zeros(shape) for tap, shape in shapes.items()} for _ in range(1 + bool(run.dense))]
            sums[parts] = zeros[0], zeros[1] if run.dense else {}
        return parts, *sums.pop(parts)

    def weights_of(rows: slice) -> dict[str, Array]:
        return {tap: devices.by_windows(weight[rows]) for tap, weight in weights.items()}

    def move_dense(dense: Array, rows: slice) -> Array:
        x = run.hidden.batch(rows)
        parts, grams, drifts = totals_for(rows)
        after, *sums[parts] = _accumulate_both(run.model.layer, layer.params, x, dense, weights_of(rows), grams, drifts)
        return after

    if run.dense:
        run.dense.update(move_dense)
    else:
        for rows, x in zip(run.hidden.slices(), run.hidden.batches(), strict=True):
            parts, grams, _ = totals_for(rows)
            sums[parts] = accumulate(run.model.layer, layer.params, x, weights_of(rows), grams), {}
    grams, drifts = devices.everywhere(_together(list(sums.values()))) if devices.number() > 1 else sums[1]
    del sums
    grams = {tap: stats.symmetric(grams.pop(tap)) for tap in list(grams)}
    if bad := [tap for tap, good in devices.fetch(_finite(grams)).items() if not good]:
        raise InputError(
            f"the activations of layer {layer.index} hold NaN or infinity in {', '.join(sorted(bad))}, by odd "
            "calibration text or too narrow a dtype",
            options={"dtype": "float32"},
        )
    return dataclasses.replace(layer, grams=grams, drifts=drifts)


def solve(run: Run, layer: Layer) -> Layer:
    """Prunes every linear and rounds it to the stored dtype.

    Raises:
        InputError: a Gram matrix is too nearly singular, whatever the damping.
    """
    for tap in run.model.inputs:
        gram, drift = layer.grams.pop(tap), layer.drifts.pop(tap, None)
        for times in DAMPING:
            method = run.method if times == 1 else with_more_damping(run.method, times)
            after = _solve_readers(run, layer, tap, method, gram, drift)
            bad = [path for path in run.model.inputs[tap] if not math.isfinite(after.linears[path].error)]
            if not bad:
                break
        else:
            raise InputError(
                f"layer {layer.index}: {', '.join(bad)} cannot be solved, even with {DAMPING[-1]} times the damping",
                options={"nsamples": Change.RAISE, "damping": Change.RAISE},
            )
        layer = after if times == 1 else _told(after, run.model.inputs[tap], times)
    return layer


def _told(layer: Layer, paths: Sequence[str], times: int) -> Layer:
    """The layer with the raised damping among the figures of some linears."""
    told = {"damping_times": float(times)}
    linears = {path: layer.linears[path]._replace(stats=layer.linears[path].stats | told) for path in paths}
    return dataclasses.replace(layer, linears=layer.linears | linears)


def _solve_readers(
    run: Run,
    layer: Layer,
    tap: str,
    method: Method,
    gram: Float[Array, "n n"],
    drift: Float[Array, "n n"] | None,
) -> Layer:
    """Prunes the linears that read a tap."""
    params, linears, masks = dict(layer.params), dict(layer.linears), dict(layer.masks)
    prepared = method.prepare(gram)
    for path in run.model.inputs[tap]:
        pattern, name = run.pattern_of(layer.index, path), f"{path}.kernel"
        outputs = run.weights[layer.index].outputs.get(path) if run.weights else None
        target = None
        if drift is not None:
            target = stats.drifted_target(gram, drift, params[name].astype(gram.dtype), run.asymmetry)
        params[name], mask, linears[path] = solve_linear(method, prepared, gram, params[name], pattern, outputs, target)
        masks[path] = pack(mask)
    return dataclasses.replace(layer, params=params, linears=linears, masks=masks)


def advance(run: Run, layer: Layer) -> Layer:
    """The second pass: the next layer's input, made with the pruned weights as stored; nothing reads the last one's."""
    if layer.index + 1 < run.model.config.num_layers:
        forward(run.model, layer.params, run.hidden)
    return layer


STAGES: Mapping[str, Stage] = {"gram": measure, "solve": solve, "forward": advance}


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def accumulate(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    weights: Mapping[str, Float[Array, "b t"]],
    grams: dict[str, Array],
) -> dict[str, Array]:
    """Adds what a batch brings to the Gram matrices: [n, n], or [devices, n, n], each device's share on its own.

    They are complete up to the diagonal only; see `stats.add_gram`.
    """
    _, taps = layer(params, x)
    return {tap: _add(stats.add_gram, total, taps[tap], weights.get(tap)) for tap, total in grams.items()}


@partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def _accumulate_both(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    dense: Float[Array, "b t d"],
    weights: Mapping[str, Float[Array, "b t"]],
    grams: dict[str, Array],
    drifts: dict[str, Array],
) -> tuple[Float[Array, "b t d"], dict[str, Array], dict[str, Array]]:
    """The same for the states behind pruned layers and behind dense ones; the latter move on."""
    (_, taps), (after, dense_taps) = layer(params, x), layer(params, dense)
    grams = {tap: _add(stats.add_gram, total, taps[tap], weights.get(tap)) for tap, total in grams.items()}
    drifts = {
        tap: _add(stats.add_drift, total, taps[tap], dense_taps[tap], weights.get(tap)) for tap, total in drifts.items()
    }
    return after, grams, drifts


def _add(add: Callable[..., Array], total: Array, *arrays: Array | None) -> Array:
    """Adds the product of all tokens, or of each device's to its own, as `total` has them."""
    if total.ndim == 2:
        return add(total, *arrays)
    parts = [None if a is None else a.reshape(len(total), -1, *a.shape[1:]) for a in arrays]
    return jax.vmap(add)(total, *parts)


@jax.jit
def _together(sums: Sequence[tuple[dict[str, Array], dict[str, Array]]]) -> tuple[dict[str, Array], dict[str, Array]]:
    """The sums over all devices and all batches."""
    whole = jax.tree.map(lambda total: total if total.ndim == 2 else jnp.sum(total, axis=0), sums)
    return jax.tree.map(lambda *totals: sum(totals[1:], totals[0]), *whole)


@jax.jit
def _finite(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: jnp.all(jnp.isfinite(array)) for name, array in arrays.items()}
