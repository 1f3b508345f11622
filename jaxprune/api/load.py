"""Opens a checkpoint, and prunes a single kernel."""

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
    """Opens a checkpoint; reads its weights lazily, one layer at a time.

    Args:
        checkpoint: a folder, a .gguf file, a known name such as llama-7b, or owner/name on a hub.
        dtype: the dtype of the computation; None: float32 on a CPU, the kernels' stored dtype
            elsewhere.
        devices: the devices that the model runs on.
        scratch: a folder for hidden states; None: they stay in memory.

    Raises:
        CheckpointError: the checkpoint does not exist, has an unknown format, or is incomplete.
        InputError: its architecture is not implemented, or does not match its tensors.
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
