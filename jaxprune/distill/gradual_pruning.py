"""Late zeros: those that a kernel's solve leaves, and that come while the kernels are tuned.

They come a few times over the first part of the steps, fewer each time: after a share t of these
times 1 − (1 − t)³ of them are there. A kernel then keeps those weights w_ij for which w_ij²·r_i·c_j
is largest, r and c the shares of the inputs and of the outputs in the gradients' squares over some
tens of steps: what the loss would lose without them, to the second order. Until the last time,
those that it does not keep move along the gradient as if it did, and are judged anew each time;
what its solve made zero stays so. In the end it has as many zeros as its pattern wants. Counts are
each kernel's own, so that it is pruned where its step is taken.

References:
    LeCun, Denker and Solla, "Optimal Brain Damage" (NIPS 1989), for the saliency. Zhu and Gupta,
    "To prune, or not to prune" (arXiv 1710.01878), for the schedule. Lin et al., "Dynamic Model
    Pruning with Feedback" (arXiv 2006.07253), for masked weights that move along.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxprune.distill.adafactor import Fixed, Kernels, Moving
from jaxprune.methods.linalg import masked
from jaxprune.models import Layer
from jaxprune.sharding import fetch
from jaxprune.solve.layer_result import LayerResult
from jaxprune.solve.targets import TargetOf
from jaxprune.sparsity.masks import pack
from jaxprune.sparsity.patterns import Unstructured, by_section, cubic, in_sections
from jaxprune.sparsity.selection import Selector

Selectors = Mapping[str, Sequence[Selector | None]]
"""Name of a kernel -> what prunes it on, or the experts that are stacked in it; None: it stays as
it is."""


class LateZeros(NamedTuple):
    """Zeros that come late.

    Attributes:
        target_of: (layer index, path of the linear layer) -> its pattern in the end.
        after: the numbers of the steps after which they come.
    """

    target_of: TargetOf
    after: Sequence[int]

    def selectors(self, layer: Layer, result: LayerResult) -> Selectors:
        """Returns what prunes a layer on: in the end as many zeros as were wanted of each kernel,
        in its pattern.

        Args:
            layer: its kind.
            result: what became of it, with the zeros that its solves made.
        """
        found: dict[str, list[Selector | None]] = {}
        for path, shape in layer.kernels.items():
            one, (name, _) = None, layer.sources[path]
            if path in result.masks:
                kernel, kept = result.kernels[path], int(np.bitwise_count(result.masks[path]).sum())
                if (late := kept - (kernel.size - kernel.wanted)) > 0:
                    pattern = self.target_of(result.index, path)
                    assert isinstance(pattern, Unstructured)
                    if not pattern.per_output:  # its sparsity may be `allocate`'s
                        pattern = Unstructured(
                            min(kernel.wanted / kernel.size, math.nextafter(1, 0))
                        )
                    progress = [
                        1 - late / kernel.wanted * (1 - made) for made in cubic(len(self.after))
                    ]
                    one = in_sections(pattern, layer.sections.get(path, ())).selector(
                        shape, progress
                    )
            found.setdefault(f"{name}.kernel", []).append(one)
        return found


def prune(kernels: Kernels, selectors: Selectors, time: int) -> Kernels:
    """Returns a layer's kernels with more zeros; on the device.

    Args:
        kernels: not to be used again.
        selectors: name -> what prunes it, or its experts.
        time: how often zeros came before.
    """
    moving, fixed = dict(kernels.moving), dict(kernels.fixed)
    for name in moving:
        one = moving[name], fixed[name]
        for expert, selector in enumerate(selectors[name]):
            if selector is not None:
                which = np.int32(expert) if one[0].value.ndim == 3 else None
                one = pruned(*one, selector, np.int32(time), which)
        # One kernel at a time: several processes would wait for each other in different ones, for
        # they exchange counts.
        moving[name], fixed[name] = jax.block_until_ready(one)
    return Kernels(moving, fixed)


@partial(jax.jit, donate_argnums=(0, 1))
def pruned(
    kernel: Moving,
    fixed: Fixed,
    selector: Selector,
    time: Int[Array | np.ndarray, ""],
    expert: Int[Array | np.ndarray, ""] | None = None,
) -> tuple[Moving, Fixed]:
    """Returns a kernel with a mask of the weights that matter most to the loss; the last time
    without the others.

    Args:
        kernel: what steps change of it; not to be used again.
        fixed: what they do not; neither.
        selector: how many zeros it is to have each time, and in which pattern.
        time: how often zeros came before.
        expert: whose kernel of those that are stacked in it is meant; None: none are.
    """
    if expert is None:
        return _pruned(kernel, fixed, selector, time)
    one, its = jax.tree.map(lambda leaf: leaf[expert], (kernel, fixed))
    return jax.tree.map(
        lambda leaf, new: leaf.at[expert].set(new),
        (kernel, fixed),
        _pruned(one, its, selector, time),
    )


def _pruned(
    kernel: Moving, fixed: Fixed, selector: Selector, time: Int[Array, ""]
) -> tuple[Moving, Fixed]:
    moves = kernel.value != 0
    of_gradients = kernel.row_shares[:, None] * kernel.column_shares[None, :]
    # There may have been no gradient yet: an expert may have had no tokens.
    of_gradients = jnp.where(jnp.any(of_gradients > 0), of_gradients, jnp.float32(1))
    saliency = jnp.square(kernel.value.astype(jnp.float32)) * of_gradients
    # What is zero goes first, whatever else matters as little.
    kept = moves & selector(masked(moves, jnp.maximum(saliency, jnp.finfo(jnp.float32).tiny)), time)
    moves = jnp.where(time + 1 == len(selector.zeros), kept, moves)
    rows, columns = (jnp.sum(moves, axis=axis, dtype=jnp.float32) for axis in (-1, -2))
    fixed = fixed._replace(mask=jnp.packbits(kept, axis=-2), row_counts=rows, column_counts=columns)
    return kernel._replace(value=masked(moves, kernel.value)), fixed


def with_own_masks(layer: Layer, result: LayerResult) -> LayerResult:
    """Returns a layer with the masks that its kernels have now, and with their zeros.

    Args:
        layer: its kind.
        result: what became of it, with the masks of its solves.
    """
    masks, kernels = {}, dict(result.kernels)
    for path in result.masks:
        kept = result.params[f"layers.{result.index}.{path}.kernel"] != 0
        zeros = np.count_nonzero(~kept, axis=0)
        masks[path] = fetch(pack(jnp.asarray(kept)))
        sections = by_section(zeros, layer.sections.get(path, ()))
        kernels[path] = dataclasses.replace(
            kernels[path], zeros=int(zeros.sum()), sections=sections
        )
    figures = dataclasses.replace(result.figures, kernels=kernels)
    return dataclasses.replace(result, masks=masks, figures=figures)
