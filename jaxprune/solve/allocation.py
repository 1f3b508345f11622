r"""Allocates a sparsity to each linear layer by one threshold over the whole model.

The saliency of a weight is W²_ij · Σ_t x²_ti · c_j. It estimates to second order how much the loss
grows if this weight alone becomes zero. It uses the diagonals of both Kronecker factors of the
curvature (see `sensitivity`). Saliencies of different linear layers are comparable, so one
threshold decides how many weights each layer loses. A maximum deviation bounds how far a layer's
sparsity is from the target. The total number of zeros is exact.

References:
    LeCun et al., "Optimal Brain Damage", NeurIPS 1989, for the saliency.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.errors import Change, InputError
from jaxprune.sharding import fetch
from jaxprune.solve.rules import Counts, count_weights
from jaxprune.solve.sensitivity import Sensitivity
from jaxprune.sparsity.patterns import Pattern, Unstructured, partly
from jaxprune.streaming.model import StreamedModel

BIN_BITS = 16
"""Low bits of a float32 saliency that the histogram drops. Saliencies whose upper 16 bits agree
(within 1/128) share a bin; zeros are interpolated inside a bin."""
Histogram = tuple[int, Int[np.ndarray, "_"]]
"""Histogram of saliencies: the index of the first bin (the smallest saliency), and the counts from
there on."""


def allocate(
    model: StreamedModel,
    sensitivity: Sequence[Sensitivity],
    sparsity: float,
    max_deviation: float,
    named: Mapping[tuple[int, str], Pattern | None] = MappingProxyType({}),
    gradual: float = 0.0,
) -> dict[tuple[int, str], Pattern]:
    """Allocates patterns to the linear layers that no rule names.

    Args:
        model: the dense model.
        sensitivity: the sensitivity of each layer.
        sparsity: the sparsity of all linear layers together. The number of zeros is rounded to the
            nearest integer.
        max_deviation: the maximum deviation of a layer's sparsity from the average over the layers
            that no rule names.
        named: linear layers that rules name -> pattern, or None if they stay dense. The other
            layers compensate for them.
        gradual: the part of `sparsity` that gradual pruning adds later. The zeros that a layer has
            until then come from a threshold for the remaining part.

    Returns:
        (layer index, path of the linear layer) -> pattern.

    Raises:
        InputError: as for `zeros_to_allocate`.
    """
    counts = count_weights(model.architecture, named)
    zeros = zeros_to_allocate(counts, sparsity)
    if not counts.unnamed:
        return {}
    linears: list[tuple[int, str]] = []
    histograms: list[Histogram] = []
    for index, (params, layer) in enumerate(zip(model.layers(), sensitivity, strict=True)):
        part = model.architecture.layers[index]
        for capture, paths in part.inputs.items():
            for path in paths:
                if (index, path) not in counts.unnamed:
                    continue
                kernel = model.devices.replicate(part.sources[path].of(params, ".kernel"))
                inputs = layer.inputs[capture] * _share_of_tokens(
                    layer, capture, part.sources[capture].name
                )
                histograms.append(_used(fetch(_histogram(kernel, inputs, layer.outputs[path]))))
                linears.append((index, path))
    in_the_end = share_zeros(histograms, zeros, max_deviation)
    by_now = in_the_end
    if gradual:
        by_now = np.minimum(
            share_zeros(histograms, max(0, zeros - round(gradual * counts.weights)), max_deviation),
            in_the_end,
        )
    sizes = [counts.unnamed[which] for which in linears]
    each = zip(by_now, in_the_end, sizes, strict=True)
    patterns = [partly(Unstructured(int(z) / size), int(z - now) / size) for now, z, size in each]
    return dict(zip(linears, patterns, strict=True))


def zeros_to_allocate(counts: Counts, sparsity: float) -> int:
    """Returns the total number of zeros of the linear layers that no rule names.

    The number is 0 if rules name every linear layer.

    Args:
        counts: counts of the model under the rules.
        sparsity: the sparsity of all linear layers together.

    Raises:
        InputError: the number is negative, or leaves no weight.
    """
    zeros, weights = round(sparsity * counts.weights) - counts.zeros, sum(counts.unnamed.values())
    if not counts.unnamed:
        return 0
    if not 0 <= zeros < weights:
        raise InputError(
            f"a total sparsity of {sparsity:g} needs {zeros} zeros among the {weights} weights "
            "that no rule names",
            options={"sparsity": Change.OTHER},
        )
    return zeros


def _used(histogram: Int[np.ndarray, "bins"]) -> Histogram:
    """Trims empty bins at both ends of a histogram: a model may have many experts."""
    filled = np.flatnonzero(histogram)
    return int(filled[0]), histogram[filled[0] : filled[-1] + 1].copy()


def _share_of_tokens(layer: Sensitivity, capture: str, source: str) -> np.float32:
    """Returns the number of all tokens over the number of an expert's tokens.

    The product Σ x² Σ g² over T tokens is about T times Σ x²g², so the saliencies of experts need
    this factor.
    """
    if capture not in layer.given:
        return np.float32(1)
    return np.float32(layer.tokens[source].size) / np.maximum(
        layer.given[capture][0], np.float32(1)
    )


def share_zeros(
    histograms: Sequence[Histogram], zeros: int, max_deviation: float
) -> Int[np.ndarray, "l"]:
    """Returns the number of zeros of each linear layer.

    They are the weights below one threshold, within bounds, with an exact total. Each layer keeps
    at least one weight, unless that leaves too few zeros.

    Args:
        histograms: the histogram of each linear layer.
        zeros: the total number of zeros.
        max_deviation: see `allocate`.
    """
    sizes = np.array([counts.sum(dtype=np.int64) for _, counts in histograms])
    target = zeros / sizes.sum()
    # Rounding must not exclude the target itself.
    least = np.minimum(
        np.ceil(np.maximum(target - max_deviation, 0) * sizes), np.floor(target * sizes)
    ).astype(np.int64)
    most = np.maximum(
        np.minimum(np.floor((target + max_deviation) * sizes), sizes - 1), np.ceil(target * sizes)
    )
    most = most.astype(np.int64)
    first = min(start for start, _ in histograms)
    bins = max(start + len(counts) for start, counts in histograms) - first
    below = np.zeros(bins + 1, np.int64)  # total zeros if the bins before are zeroed
    for (start, counts), low, high in zip(histograms, least, most, strict=True):
        own = np.zeros(bins + 1, np.int64)
        own[start - first + 1 : start - first + 1 + len(counts)] = counts
        below += np.clip(np.cumsum(own), low, high)
    after = int(np.searchsorted(below, zeros))
    if after == 0:
        return _top_up(least, most, zeros)

    def before(end: int) -> Int[np.ndarray, "l"]:
        own = [
            counts[: max(0, end + first - start)].sum(dtype=np.int64)
            for start, counts in histograms
        ]
        return np.clip(own, least, most)

    return _top_up(before(after - 1), before(after), zeros)


def _top_up(
    start: Int[np.ndarray, "l"], end: Int[np.ndarray, "l"], total: int
) -> Int[np.ndarray, "l"]:
    """Interpolates between `start` and `end` at one fraction, in integers with this total."""
    missing, room = total - int(start.sum()), end - start
    exact = room * (missing / max(1, int(room.sum())))
    added = np.floor(exact).astype(np.int64)
    left = missing - int(added.sum())
    # The largest remainders get one more each.
    order = np.argsort(-(exact - added) * (added < room), kind="stable")
    added[order[:left]] += 1
    return start + added


@jax.jit
def _histogram(
    kernel: Float[Array, "n m"], inputs: Float[Array, "n"], outputs: Float[Array, "m"]
) -> Int[Array, "bins"]:
    scales = jnp.sqrt(inputs)[:, None] * jnp.sqrt(outputs)[None, :]
    saliency = jnp.abs(kernel.astype(jnp.float32)) * scales
    # The bits of non-negative floats sort like integers.
    bins = jax.lax.bitcast_convert_type(saliency, jnp.int32) >> BIN_BITS
    return jnp.bincount(bins.reshape(-1), length=1 << (31 - BIN_BITS))
