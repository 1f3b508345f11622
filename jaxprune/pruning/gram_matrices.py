"""The Gram matrices of a layer's inputs, summed over the calibration windows in one pass of the dense layer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.errors import InputError
from jaxprune.methods import gram
from jaxprune.models import Part
from jaxprune.sharding import fetch
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel

Grams = dict[str, Float[Array, "n n"]]
"""Tap -> Gram matrix of what it taps."""


def gram_matrices(
    model: StreamedModel,
    index: int,
    params: Mapping[str, Array],
    hidden: HiddenStates,
    dense: HiddenStates | None = None,
    weights: Mapping[str, Float[np.ndarray, "w t"]] | None = None,
    taps: Collection[str] | None = None,
) -> tuple[Grams, Grams]:
    """Sums the Gram matrices of a layer's linears' inputs, XᵀX or Xᵀ diag(w) X, float32.

    Args:
        model: the model that the layer belongs to.
        index: the index of the layer.
        params: the params of the dense layer, on the device.
        hidden: states before the layer.
        dense: states before the layer of the dense model, which move on to those behind it; None: there are none.
        weights: tap -> w, one weight a token; taps that are not in it weigh all tokens the same.
        taps: the inputs whose Gram matrices are wanted; None: all.

    Returns:
        The Gram matrices, and the drifts X̂ᵀ(X − X̂) of the inputs X̂ from those of the dense model, X; no drifts where
        `dense` is None.

    Raises:
        InputError: NaN or infinity in the layer's activations; weights are looked at when they are read.
    """
    devices, layer = model.devices, model.architecture.layers[index]
    widths = {tap: n for tap, n in layer.widths.items() if taps is None or tap in taps}
    weights = {tap: weight for tap, weight in (weights or {}).items() if tap in widths}
    sums: dict[int, tuple[Grams, Grams]] = {}

    def totals_for(rows: slice) -> tuple[int, Grams, Grams]:
        """Returns sums on each device where the rows can be split over all of them, else one."""
        parts = 1 if (rows.stop - rows.start) % devices.count else devices.count
        if parts not in sums:
            shapes = {tap: (n, n) if parts == 1 else (parts, n, n) for tap, n in widths.items()}
            zeros = [{tap: devices.zeros(shape) for tap, shape in shapes.items()} for _ in range(1 + bool(dense))]
            sums[parts] = zeros[0], zeros[1] if dense else {}
        return parts, *sums.pop(parts)

    def weights_of(rows: slice) -> dict[str, Array]:
        return {tap: devices.shard_windows(weight[rows]) for tap, weight in weights.items()}

    def move_dense(states: Array, rows: slice) -> Array:
        x = hidden.batch(rows)
        parts, grams, drifts = totals_for(rows)
        after, *sums[parts] = accumulate_drift(layer, params, x, states, weights_of(rows), grams, drifts)
        return after

    if dense:
        dense.update(move_dense)
    else:
        for rows, x in zip(hidden.slices(), hidden.batches(), strict=True):
            parts, grams, _ = totals_for(rows)
            sums[parts] = accumulate(layer, params, x, weights_of(rows), grams), {}
    grams, drifts = devices.replicate(_total(list(sums.values()))) if devices.count > 1 else sums[1]
    del sums
    grams = {tap: gram.symmetric(grams.pop(tap)) for tap in list(grams)}
    if bad := [tap for tap, good in fetch(_finite(grams)).items() if not good]:
        raise InputError(
            f"the activations hold NaN or infinity in {', '.join(sorted(bad))}, by odd calibration text or too narrow "
            "a dtype",
            options={"dtype": "float32"},
        )
    return grams, drifts


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def accumulate(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    weights: Mapping[str, Float[Array, "b t"]],
    grams: dict[str, Array],
) -> dict[str, Array]:
    """Adds what a batch brings to the Gram matrices: [n, n], or [devices, n, n], each device's share on its own.

    They are complete up to the diagonal only; see `gram.add_gram`.
    """
    _, taps = layer(params, x)
    return {tap: _add(gram.add_gram, total, taps[tap], weights.get(tap)) for tap, total in grams.items()}


@partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def accumulate_drift(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    dense: Float[Array, "b t d"],
    weights: Mapping[str, Float[Array, "b t"]],
    grams: dict[str, Array],
    drifts: dict[str, Array],
) -> tuple[Float[Array, "b t d"], dict[str, Array], dict[str, Array]]:
    """Does the same for the states behind pruned layers, x, and those behind dense ones, which move on."""
    (_, taps), (after, dense_taps) = layer(params, x), layer(params, dense)
    grams = {tap: _add(gram.add_gram, total, taps[tap], weights.get(tap)) for tap, total in grams.items()}
    drifts = {
        tap: _add(gram.add_drift, total, taps[tap], dense_taps[tap], weights.get(tap)) for tap, total in drifts.items()
    }
    return after, grams, drifts


def _add(add: Callable[..., Array], total: Array, *arrays: Array | None) -> Array:
    """Adds the product of all tokens, or of each device's to its own, as `total` has them."""
    if total.ndim == 2:
        return add(total, *arrays)
    parts = [None if a is None else a.reshape(len(total), -1, *a.shape[1:]) for a in arrays]
    return jax.vmap(add)(total, *parts)


@jax.jit
def _total(sums: Sequence[tuple[Grams, Grams]]) -> tuple[Grams, Grams]:
    """Returns the sums over all devices and all batches."""
    whole = jax.tree.map(lambda total: total if total.ndim == 2 else jnp.sum(total, axis=0), sums)
    return jax.tree.map(lambda *totals: sum(totals[1:], totals[0]), *whole)


@jax.jit
def _finite(arrays: Grams) -> dict[str, Array]:
    return {name: jnp.all(jnp.isfinite(array)) for name, array in arrays.items()}
