"""Gradual pruning: adds the zeros that the solves leave to the tuning.

Zeros are added several times over the first part of the steps. After a fraction t of these times,
the fraction 1 − (1 − t)³ of them is present. A kernel then keeps the weights w_ij with the largest
saliency w_ij²·r_i·c_j. Here r and c are the relative squared gradients of inputs and outputs,
averaged over some tens of steps. The saliency estimates to second order how much the loss grows
without the weight.

Until the last time, masked weights are still trained, along the gradient of the masked model, and
ranked again each time. Zeros of the solves are permanent. The final number of zeros is that of the
pattern. Each kernel has its own counts, so it can be pruned right after its own update.

References:
    LeCun, Denker and Solla, "Optimal Brain Damage" (NIPS 1989), for the saliency. Zhu and Gupta,
    "To prune, or not to prune" (arXiv 1710.01878), for the schedule. Lin et al., "Dynamic Model
    Pruning with Feedback" (arXiv 2006.07253), for training masked weights.
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
from jaxprune.solve.rules import TargetOf
from jaxprune.sparsity.masks import pack
from jaxprune.sparsity.patterns import Unstructured, by_projection, cubic, in_projections
from jaxprune.sparsity.selection import Selector

Selectors = Mapping[str, Sequence[Selector | None]]
"""Name of a kernel -> its selector, or those of its stacked experts; None: it is not pruned
further."""


class GradualPruning(NamedTuple):
    """The schedule of gradual pruning.

    Attributes:
        target_of: (layer index, path of the linear layer) -> final pattern.
        after: the numbers of the steps after which zeros are added.
    """

    target_of: TargetOf
    after: Sequence[int]

    def selectors(self, layer: Layer, result: LayerResult) -> Selectors:
        """Returns selectors that prune a layer's kernels to the final number of zeros.

        Args:
            layer: the layer.
            result: its result after the solves.
        """
        found: dict[str, list[Selector | None]] = {}
        for path, shape in layer.kernels.items():
            one, (name, _) = None, layer.sources[path]
            if path in result.masks:
                kernel, kept = result.kernels[path], int(np.bitwise_count(result.masks[path]).sum())
                if (late := kept - (kernel.size - kernel.wanted)) > 0:
                    pattern = self.target_of(result.index, path)
                    assert isinstance(pattern, Unstructured)
                    if not pattern.per_output:  # `allocate` may have changed its sparsity
                        pattern = Unstructured(
                            min(kernel.wanted / kernel.size, math.nextafter(1, 0))
                        )
                    progress = [
                        1 - late / kernel.wanted * (1 - made) for made in cubic(len(self.after))
                    ]
                    one = in_projections(pattern, layer.projections.get(path, ())).selector(
                        shape, progress
                    )
            found.setdefault(f"{name}.kernel", []).append(one)
        return found


def prune(kernels: Kernels, selectors: Selectors, time: int) -> Kernels:
    """Returns a layer's kernels with more zeros, on the device.

    Args:
        kernels: the kernels; donated.
        selectors: name -> selectors of the kernel or of its experts.
        time: how many times zeros were added before.
    """
    moving, fixed = dict(kernels.moving), dict(kernels.fixed)
    for name in moving:
        one = moving[name], fixed[name]
        for expert, selector in enumerate(selectors[name]):
            if selector is not None:
                which = np.int32(expert) if one[0].value.ndim == 3 else None
                one = pruned(*one, selector, np.int32(time), which)
        # One kernel at a time: kernels exchange counts between processes, which could otherwise
        # deadlock on different kernels.
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
    """Returns a kernel with a mask of the weights that matter most to the loss.

    The last time, the other weights become zero.

    Args:
        kernel: the part of its state that steps change; donated.
        fixed: the fixed part; donated.
        selector: the number of zeros at each time, and their pattern.
        time: how many times zeros were added before.
        expert: the index of the expert in a stack; None: the kernel is not stacked.
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
    # There is no gradient yet if an expert had no tokens.
    of_gradients = jnp.where(jnp.any(of_gradients > 0), of_gradients, jnp.float32(1))
    saliency = jnp.square(kernel.value.astype(jnp.float32)) * of_gradients
    # Zeros are masked first, before weights with an equally small saliency.
    kept = moves & selector(masked(moves, jnp.maximum(saliency, jnp.finfo(jnp.float32).tiny)), time)
    moves = jnp.where(time + 1 == len(selector.zeros), kept, moves)
    rows, columns = (jnp.sum(moves, axis=axis, dtype=jnp.float32) for axis in (-1, -2))
    fixed = fixed._replace(mask=jnp.packbits(kept, axis=-2), row_counts=rows, column_counts=columns)
    return kernel._replace(value=masked(moves, kernel.value)), fixed


def with_own_masks(layer: Layer, result: LayerResult) -> LayerResult:
    """Returns a layer with masks and zeros counted from its current kernels.

    Args:
        layer: the layer.
        result: its result, with the masks of its solves.
    """
    masks, kernels = {}, dict(result.kernels)
    for path in result.masks:
        kept = result.params[f"layers.{result.index}.{path}.kernel"] != 0
        zeros = np.count_nonzero(~kept, axis=0)
        masks[path] = fetch(pack(jnp.asarray(kept)))
        projections = by_projection(zeros, layer.projections.get(path, ()))
        kernels[path] = dataclasses.replace(
            kernels[path], zeros=int(zeros.sum()), projections=projections
        )
    figures = dataclasses.replace(result.figures, kernels=kernels)
    return dataclasses.replace(result, masks=masks, figures=figures)
