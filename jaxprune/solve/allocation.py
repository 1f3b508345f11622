r"""A sparsity of its own for every linear, by one threshold over all of them.

The saliency of a weight is W²_ij · Σ_t x²_ti · c_j: what zeroing it alone costs the model's loss,
to second order and with the diagonals of both Kronecker factors of its curvature (see
`sensitivity`). In these units linear layers are comparable, so one threshold over the whole model
says how many weights each of them loses. A linear stays within a distance of the target, and the
total is exact.

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
from jaxprune.solve.sensitivity import Sensitivity
from jaxprune.solve.targets import Counts, count_weights
from jaxprune.sparsity.patterns import Pattern, Unstructured, partly
from jaxprune.streaming.model import StreamedModel

BIN_BITS = 16
"""Of a float32 saliency; weights whose leading 16 bits agree (within 1/128) are told apart by
interpolation."""
Histogram = tuple[int, Int[np.ndarray, "_"]]
"""How many weights have which saliency: the first bin, the least salient, and the counts from there
on."""


def allocate(
    model: StreamedModel,
    sensitivity: Sequence[Sensitivity],
    sparsity: float,
    spread: float,
    named: Mapping[tuple[int, str], Pattern | None] = MappingProxyType({}),
    late: float = 0.0,
) -> dict[tuple[int, str], Pattern]:
    """Returns (layer index, path of the linear) -> its pattern, of all that have none of their own.

    Args:
        model: the dense model.
        sensitivity: the sensitivity of its layers.
        sparsity: the sparsity of all linear layers together; zeros are rounded to the nearest whole
            weight.
        spread: the most by which a linear's sparsity may differ from what the others have to have
            for it.
        named: linear layers with a pattern of their own, or None: those stay dense. The others make
            up for them.
        late: of that sparsity what is not to be there yet: a linear has those zeros by now that a
            threshold for the rest of it gives.

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
        for tap, paths in part.inputs.items():
            for path in paths:
                if (index, path) not in counts.unnamed:
                    continue
                kernel = model.devices.replicate(part.sources[path].of(params, ".kernel"))
                inputs = layer.inputs[tap] * _share_of_tokens(layer, tap, part.sources[tap].name)
                histograms.append(_used(fetch(_histogram(kernel, inputs, layer.outputs[path]))))
                linears.append((index, path))
    in_the_end = share_zeros(histograms, zeros, spread)
    by_now = in_the_end
    if late:
        by_now = np.minimum(
            share_zeros(histograms, max(0, zeros - round(late * counts.weights)), spread),
            in_the_end,
        )
    sizes = [counts.unnamed[which] for which in linears]
    each = zip(by_now, in_the_end, sizes, strict=True)
    patterns = [partly(Unstructured(int(z) / size), int(z - now) / size) for now, z, size in each]
    return dict(zip(linears, patterns, strict=True))


def zeros_to_allocate(counts: Counts, sparsity: float) -> int:
    """Returns the number of zeros that linear layers which no rule names have to have together; 0
    where there are none.

    Args:
        counts: of the model and the rules.
        sparsity: the sparsity of all linear layers together.

    Raises:
        InputError: they cannot have so few or so many.
    """
    zeros, weights = round(sparsity * counts.weights) - counts.zeros, sum(counts.unnamed.values())
    if not counts.unnamed:
        return 0
    if not 0 <= zeros < weights:
        raise InputError(
            f"a sparsity of {sparsity:g} in total leaves {zeros} zeros for the {weights} weights "
            "that no rule names",
            options={"sparsity": Change.OTHER},
        )
    return zeros


def _used(histogram: Int[np.ndarray, "bins"]) -> Histogram:
    """Returns the part of a histogram that is not empty: a model may have many experts."""
    filled = np.flatnonzero(histogram)
    return int(filled[0]), histogram[filled[0] : filled[-1] + 1].copy()


def _share_of_tokens(layer: Sensitivity, tap: str, source: str) -> np.float32:
    """Returns how many times more tokens all are than those of an expert: Σ x² Σ g² over T tokens
    is T times Σ x²g²."""
    if tap not in layer.given:
        return np.float32(1)
    return np.float32(layer.tokens[source].size) / np.maximum(layer.given[tap][0], np.float32(1))


def share_zeros(histograms: Sequence[Histogram], zeros: int, spread: float) -> Int[np.ndarray, "l"]:
    """Returns the zeros of each linear: its weights below one threshold, within bounds, so that the
    total is exact. One weight of each stays, unless that leaves too few zeros.

    Args:
        histograms: of each linear.
        zeros: the number of zeros in total.
        spread: see `allocate`.
    """
    sizes = np.array([counts.sum(dtype=np.int64) for _, counts in histograms])
    target = zeros / sizes.sum()
    # Rounding must not leave the target itself out of reach.
    least = np.minimum(
        np.ceil(np.maximum(target - spread, 0) * sizes), np.floor(target * sizes)
    ).astype(np.int64)
    most = np.maximum(
        np.minimum(np.floor((target + spread) * sizes), sizes - 1), np.ceil(target * sizes)
    )
    most = most.astype(np.int64)
    first = min(start for start, _ in histograms)
    bins = max(start + len(counts) for start, counts in histograms) - first
    below = np.zeros(bins + 1, np.int64)  # how many zeros all have if those before a bin are
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
    """Returns whole numbers between start and end at the same fraction of the way, with this
    total."""
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
    # The bits of a non-negative float order like an integer.
    bins = jax.lax.bitcast_convert_type(saliency, jnp.int32) >> BIN_BITS
    return jnp.bincount(bins.reshape(-1), length=1 << (31 - BIN_BITS))
