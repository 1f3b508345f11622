"""A checkpoint opened, one kernel pruned: what is done before a whole model, or without one."""

from pathlib import Path

from jaxtyping import Array, DTypeLike, Float

from convert import open_checkpoint
from convert.checked import CheckedReader
from convert.hub import resolve
from jaxprune.methods import Method, Solution
from jaxprune.sharding import ONE_DEVICE, Devices
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming.model import StreamedModel


def load(
    checkpoint: str | Path,
    *,
    dtype: DTypeLike | None = None,
    devices: Devices = ONE_DEVICE,
    scratch: str | Path | None = None,
) -> StreamedModel:
    """Opens a checkpoint; its weights are read when they are needed, a layer at a time.

    Args:
        checkpoint: a folder, a .gguf file, a known name such as llama-7b, or owner/name of a hub.
        dtype: the dtype of the computation; None: float32 on a CPU, the kernels' stored dtype
            elsewhere.
        devices: the devices that the model runs on.
        scratch: a folder for hidden states; None: they are kept in memory.

    Raises:
        CheckpointError: there is no such checkpoint, it is in no known format, or it is incomplete.
        InputError: its architecture is not implemented, or its tensors do not fit it.
    """
    source = resolve(checkpoint)
    reader = CheckedReader(open_checkpoint(source, check=False))
    return StreamedModel(
        reader, dtype, devices, Path(scratch) if scratch else None, str(checkpoint), source
    )


def prune_kernel(
    kernel: Float[Array, "n m"], gram: Float[Array, "n n"], method: Method, target: Pattern | Array
) -> Solution:
    """Prunes one kernel, without a model.

    Args:
        kernel: the dense kernel, [inputs, outputs].
        gram: the Gram matrix of its inputs, XᵀX, float32; see `methods.gram.gram`.
        method: the pruning method.
        target: a pattern; or a mask [inputs, outputs], True = kept, under which the method only
            updates the weights.

    Raises:
        InputError: the pattern is impossible for the kernel's shape.
    """
    if isinstance(target, Pattern):
        target.selector(kernel.shape)
    return method.solve(method.prepare(gram), kernel.astype(gram.dtype), target)
