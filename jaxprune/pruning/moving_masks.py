"""Masks that move while the kernels are tuned: which weights stay is chosen anew a few times.

Meanwhile every weight has a value, those that are masked as well, from half of the dense model's on. The forward pass
takes the masked kernel, and all weights move along the gradient by it. A kernel then keeps those weights w_ij for which
w_ij²·r_i·c_j is largest, r and c the shares of the inputs and of the outputs in the gradients' squares over some tens
of steps: what the loss would lose without them, to the second order. It keeps as many as its pattern wants, so each is
chosen where its step is taken. In the end the values that are masked become zero.

From the dense model's whole values on, too many weights would change place; from zero on, none: see
docs/notes/quality.md.

References:
    LeCun, Denker and Solla, "Optimal Brain Damage" (NIPS 1989), for the saliency. Bengio, Léonard and Courville,
    "Estimating or Propagating Gradients Through Stochastic Neurons" (arXiv 1308.3432), for gradients passed straight
    through. Lin et al., "Dynamic Model Pruning with Feedback" (arXiv 2006.07253), for masked weights that move along.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from convert import Params
from jaxprune.methods.linalg import masked
from jaxprune.models import Layer
from jaxprune.pruning.adafactor import Fixed, Kernels, Moving, unpacked
from jaxprune.pruning.results import LayerResult
from jaxprune.pruning.rules import TargetOf
from jaxprune.sharding import fetch
from jaxprune.sparsity.masks import pack
from jaxprune.sparsity.patterns import Pattern, Unstructured, by_section, in_sections
from jaxprune.sparsity.selection import Selector

BEGIN = 0.5
"""Where masked weights begin, in those of the dense model."""
MOVED = "moved"
"""Among the metrics of a kernel: the share of its kept weights that its solve had masked."""
Selectors = Mapping[str, Sequence[Selector | None]]
"""Name of a kernel -> what chooses its mask, or those of the experts that are stacked in it; None: it stays."""


def selectors_of(layer: Layer, result: LayerResult, target_of: TargetOf) -> Selectors:
    """Returns what chooses the masks of a pruned layer: as many zeros as were wanted of each kernel, in its pattern.

    Args:
        layer: its kind.
        result: what became of it.
        target_of: (layer index, path of the linear layer) -> its pattern.
    """
    found: dict[str, list[Selector | None]] = {}
    for path, shape in layer.kernels.items():
        one, (name, _) = None, layer.sources[path]
        if path in result.masks and (kernel := result.kernels[path]).wanted < kernel.size:
            pattern = target_of(result.index, path)
            assert isinstance(pattern, Pattern)
            if isinstance(pattern, Unstructured) and not pattern.per_output:  # its sparsity may be `allocate`'s
                pattern = Unstructured(kernel.wanted / kernel.size)
            one = in_sections(pattern, layer.sections.get(path, ())).selector(shape)
        found.setdefault(f"{name}.kernel", []).append(one)
    return found


def begin(kernels: Kernels, dense: Params) -> Kernels:
    """Gives all weights of a layer's kernels a value, before the first step; on the host.

    Args:
        kernels: as `adafactor.init` gives them.
        dense: name -> the dense model's kernel; experts' are stacked.
    """
    moving, fixed = {}, {}
    for name, one in kernels.moving.items():
        value = np.where(one.value != 0, one.value, (BEGIN * dense[name].astype(np.float32)).astype(one.value.dtype))
        *_, n, m = value.shape
        counts = kernels.fixed[name].row_counts, kernels.fixed[name].column_counts
        moving[name] = one._replace(value=value)
        fixed[name] = kernels.fixed[name]._replace(
            row_counts=np.full_like(counts[0], m), column_counts=np.full_like(counts[1], n)
        )
    return Kernels(moving, fixed)


def choose(kernels: Kernels, selectors: Selectors) -> dict[str, Fixed]:
    """Returns what steps do not change of a layer's kernels, with masks that are chosen anew.

    Args:
        kernels: on the device.
        selectors: name -> what chooses its mask, or those of its experts.
    """
    fixed = {}
    for name, one in kernels.fixed.items():
        parts: list[tuple[Moving, Array]] = [(kernels.moving[name], one.mask)]
        if stacked := one.mask.ndim == 3:
            parts = [jax.tree.map(lambda leaf, at=at: leaf[at], parts[0]) for at in range(len(one.mask))]
        # One at a time: several processes would wait for each other in different ones, for they exchange counts.
        masks = [
            own if selector is None else jax.block_until_ready(chosen(moving, own, selector))
            for (moving, own), selector in zip(parts, selectors[name], strict=True)
        ]
        fixed[name] = one._replace(mask=jnp.stack(masks) if stacked else masks[0])
    return fixed


@jax.jit
def chosen(kernel: Moving, mask: UInt8[Array, "_ m"], selector: Selector) -> UInt8[Array, "_ m"]:
    """Returns the bits, as `Fixed` has them, of the mask of the weights that matter most to the loss.

    Args:
        kernel: one, not stacked.
        mask: its own, which it keeps where there was no gradient yet: an expert may have had no tokens.
        selector: what chooses.
    """
    of_gradients = kernel.row_shares[:, None] * kernel.column_shares[None, :]
    new = jnp.packbits(selector(jnp.square(kernel.value.astype(jnp.float32)) * of_gradients), axis=-2)
    return jnp.where(jnp.any(kernel.row_shares > 0), new, mask)


def settle(kernels: Kernels) -> Kernels:
    """Ends the moving of a layer's masks: what is masked becomes zero. On the device; a second time changes nothing."""
    moving, fixed = {}, {}
    for name, one in kernels.moving.items():
        moving[name], fixed[name] = settled(one, kernels.fixed[name])
    return Kernels(moving, fixed)


@jax.jit
def settled(kernel: Moving, fixed: Fixed) -> tuple[Moving, Fixed]:
    """Returns one kernel whose mask no longer moves."""
    kept = unpacked(fixed.mask, kernel.value.shape[-2])
    rows, columns = (jnp.sum(kept, axis=axis, dtype=jnp.float32) for axis in (-1, -2))
    return kernel._replace(value=masked(kept, kernel.value)), fixed._replace(row_counts=rows, column_counts=columns)


def with_own_masks(layer: Layer, result: LayerResult) -> LayerResult:
    """Returns a layer with the masks that its kernels have now, with their zeros, and with `MOVED` among their metrics.

    Args:
        layer: its kind.
        result: what became of it, with the masks of its solves.
    """
    masks, kernels = {}, dict(result.kernels)
    for path, before in result.masks.items():
        kept = result.params[f"layers.{result.index}.{path}.kernel"] != 0
        zeros, own = np.count_nonzero(~kept, axis=0), kernels[path]
        masks[path] = fetch(pack(jnp.asarray(kept)))
        moved = int(np.bitwise_count(masks[path] & ~before).sum()) / max(1, int(kept.sum()))
        sections = by_section(zeros, layer.sections.get(path, ()))
        kernels[path] = own._replace(zeros=int(zeros.sum()), sections=sections, metrics=own.metrics | {MOVED: moved})
    return dataclasses.replace(result, masks=masks, kernels=kernels)
