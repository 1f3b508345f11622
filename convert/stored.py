"""How the params of a checkpoint lie in its tensors: as they are, quantized, or those of all
experts in one tensor.

Quantized params are dequantized when they are read, to bfloat16:

- fp8 with block scales, a tensor `x.weight` beside `x.weight_scale_inv` (DeepSeek's format, "fp8");
- MXFP4, tensors `x_blocks` and `x_scales` (OCP's microscaling format, "mxfp4"): 32 values of 4 bits
  share an exponent.

References:
    DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), section 3.3; Open Compute
    Project, "OCP Microscaling Formats (MX) Specification", version 1.0.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from pydantic import Field
from safetensors import SafetensorError, safe_open

from convert.checkpoint import Params, transposed, transposed_shape
from convert.errors import CheckpointError, DamagedError
from convert.files import require_regular
from convert.names import Naming, expert_path, split_expert
from convert.safetensors_header import Stored
from convert.schema import Schema, check
from convert.shards import DTYPES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NUMPY = {stored: np.dtype(name) for name, stored in DTYPES.items()}
SCALES = "_scale_inv"
BLOCKS, EXPONENTS = "_blocks", "_scales"
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Fp8(Schema):
    """The entry `quantization_config` of checkpoints in fp8 with block scales."""

    quant_method: Literal["fp8"]
    weight_block_size: list[Annotated[int, Field(ge=1, le=2**20)]] = Field(
        min_length=2, max_length=2
    )


class MxFp4(Schema):
    """The entry `quantization_config` of checkpoints in MXFP4."""

    quant_method: Literal["mxfp4"]


def require_known(entry: Mapping[str, Any], file: Path) -> Fp8 | MxFp4:
    """Returns the entry `quantization_config` of a config.json.

    Raises:
        CheckpointError: it is of another format, or its entries are no such format's.
    """
    method = entry.get("quant_method", "unknown")
    known: dict[str, type[Fp8] | type[MxFp4]] = {"fp8": Fp8, "mxfp4": MxFp4}
    if not isinstance(method, str) or method not in known:
        raise CheckpointError(
            f"the checkpoint is quantized ({method}), which cannot be read; take the unquantized "
            "checkpoint, or one in fp8 with block scales, in MXFP4, or a GGUF file",
            file=file,
        )
    return check(
        known[method], dict(entry), file=file, entry="quantization_config", error=CheckpointError
    )


class Tensors:
    """The tensors of a checkpoint while some are read; a file is open only then.

    Args:
        files: tensor name -> its file, and what the header says.
        stack: closes the files.
    """

    def __init__(
        self, files: Mapping[str, tuple[Path, Stored]], stack: contextlib.ExitStack
    ) -> None:
        self._files, self._stack = files, stack
        self._open: dict[Path, Any] = {}

    def get(self, name: str, index: int | None = None) -> np.ndarray:
        """Returns a tensor, or what it has at an index of its first axis; fp8 as the bytes that it
        is.

        Raises:
            DamagedError: the file cannot be read.
        """
        file, stored = self._files[name]
        try:
            if stored.dtype == "F8_E4M3":  # numpy has no such dtype
                count = int(np.prod(stored.shape))
                return np.fromfile(file, np.uint8, count, offset=stored.start).reshape(stored.shape)
            if file not in self._open:
                require_regular(file)
                self._open[file] = self._stack.enter_context(safe_open(file, framework="numpy"))
            opened = self._open[file]
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedError(f"it cannot be read ({error})", file=file) from error


class Param(NamedTuple):
    """A param, and how it is read.

    Attributes:
        spec: its shape and dtype.
        read: makes it of the tensors.
    """

    spec: jax.ShapeDtypeStruct
    read: Callable[[Tensors], np.ndarray]


def read_all(
    params: Mapping[str, Param], paths: Iterable[str], files: Mapping[str, tuple[Path, Stored]]
) -> Params:
    """Reads params.

    Raises:
        DamagedError: a file cannot be read.
    """
    with contextlib.ExitStack() as stack:
        tensors = Tensors(files, stack)
        return {path: params[path].read(tensors) for path in paths}


def plain(path: str, name: str, stored: Stored) -> Param:
    """Returns the param of a tensor that is stored as it is.

    Raises:
        CheckpointError: its dtype is none of ours.
    """
    spec = jax.ShapeDtypeStruct(transposed_shape(path, stored.shape), dtype_of(name, stored))
    return Param(spec, lambda tensors: transposed(path, tensors.get(name)))


def dtype_of(name: str, stored: Stored) -> np.dtype:
    """Returns the dtype of a tensor; CheckpointError where it is none that can be pruned."""
    if stored.dtype not in NUMPY:
        raise CheckpointError(
            f"{name} is stored as {stored.dtype}; only {', '.join(NUMPY)} can be pruned"
        )
    return NUMPY[stored.dtype]


def fp8(
    path: str, name: str, weight: Stored, scales: Stored | None, blocks: Sequence[int]
) -> Param:
    """Returns the param of a tensor in fp8 and its block scales.

    Args:
        path: the param's.
        name: the tensor's.
        weight: what its header says, [n_out, n_in].
        scales: what the header says of the scales, one a block.
        blocks: outputs and inputs of a block.

    Raises:
        CheckpointError: the scales are missing, or are not as many as the blocks.
    """
    wanted = tuple(-(-size // block) for size, block in zip(weight.shape, blocks, strict=False))
    if (
        len(weight.shape) != 2
        or scales is None
        or scales.shape != wanted
        or scales.dtype not in NUMPY
    ):
        found = (
            "there are none"
            if scales is None
            else f"{name}{SCALES} is {scales.dtype}{list(scales.shape)}"
        )
        raise CheckpointError(
            f"{name} is fp8 {list(weight.shape)} and needs block scales {list(wanted)}, but {found}"
        )

    def read(tensors: Tensors) -> Shaped[np.ndarray, "n m"]:
        values = from_fp8(tensors.get(name), tensors.get(name + SCALES), blocks)
        return transposed(path, values)

    return Param(jax.ShapeDtypeStruct(transposed_shape(path, weight.shape), BFLOAT16), read)


def from_fp8(
    codes: UInt8[np.ndarray, "m n"], scales: Float[np.ndarray, "_ _"], blocks: Sequence[int]
) -> Shaped[np.ndarray, "m n"]:
    """Dequantizes fp8 (E4M3) with block scales to bfloat16."""
    values = np.empty(codes.shape, BFLOAT16)
    columns = np.repeat(scales.astype(np.float32), blocks[1], axis=1)[:, : codes.shape[1]]
    for block, row in enumerate(columns):
        rows = slice(block * blocks[0], (block + 1) * blocks[0])
        values[rows] = (FP8[codes[rows]] * row).astype(BFLOAT16)
    return values


def from_mxfp4(
    codes: UInt8[np.ndarray, "m k 16"], exponents: UInt8[np.ndarray, "m k"]
) -> Shaped[np.ndarray, "m n"]:
    """Dequantizes MXFP4 to bfloat16: of the two values of a byte the first is in the lower bits."""
    values = np.empty((*codes.shape, 2), np.float32)
    values[..., 0], values[..., 1] = FP4[codes & 15], FP4[codes >> 4]
    values *= np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)[..., None, None]
    return values.reshape(len(codes), -1).astype(BFLOAT16)


def stacked(
    bare: str, name: str, files: Mapping[str, tuple[Path, Stored]]
) -> Iterator[tuple[str, Param]]:
    """Yields the params of experts, path by path, of a tensor that holds those of all.

    Args:
        bare: the tensor's name without the model's prefix.
        name: the tensor's name.
        files: tensor name -> its file, and what the header says.

    Raises:
        CheckpointError: it cannot be such a tensor.
    """
    stored = files[name][1]
    kind = next((end for end in (BLOCKS, "_bias") if bare.endswith(end)), "")
    axes = {BLOCKS: 4, "_bias": 2, "": 3}[kind]
    if len(stored.shape) != axes:
        raise CheckpointError(
            f"{name} is {list(stored.shape)}, must have {axes} axes, experts first"
        )
    module = bare.removesuffix(kind)
    for expert in range(stored.shape[0]):
        path = f"{expert_path(module, expert)}.{'bias' if kind == '_bias' else 'kernel'}"
        if kind == BLOCKS:
            yield path, _mxfp4(name, name.removesuffix(BLOCKS) + EXPONENTS, files, expert)
        else:
            spec = jax.ShapeDtypeStruct(stored.shape[1:], dtype_of(name, stored))
            yield path, Param(spec, partial(Tensors.get, name=name, index=expert))


def _mxfp4(name: str, scales: str, files: Mapping[str, tuple[Path, Stored]], expert: int) -> Param:
    stored = files[name][1]
    exponents = files[scales][1] if scales in files else None
    fit = exponents is not None and (exponents.dtype, exponents.shape) == ("U8", stored.shape[:3])
    if stored.dtype != "U8" or stored.shape[3] != 16 or not fit:
        raise CheckpointError(
            f"{name} is {stored.dtype}{list(stored.shape)}, and {scales} does not fit it"
        )
    spec = jax.ShapeDtypeStruct((32 * stored.shape[2], stored.shape[1]), BFLOAT16)

    def read(tensors: Tensors) -> Shaped[np.ndarray, "n m"]:
        return from_mxfp4(tensors.get(name, expert), tensors.get(scales, expert)).T

    return Param(spec, read)


STACKED = re.compile(r"(.*\.experts)\.([^.]+?)(_bias|_blocks|_scales)?")


def tensors_of(paths: Iterable[str], naming: Naming) -> dict[str, list[str]]:
    """Returns tensor name -> the paths of the params that it holds: one, or those of all experts in
    order."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = split_expert(path) if naming.stacked else None
        if parts is None:
            found[naming.hf_name(path)] = [path]
        else:
            experts, _, rest = parts
            module, _, leaf = rest.partition(".")
            found.setdefault(
                f"{naming.prefix}{experts}.{module}{'_bias' * (leaf == 'bias')}", []
            ).append(path)
    return {name: sorted(paths, key=_expert_of) for name, paths in found.items()}


def _expert_of(path: str) -> int:
    parts = split_expert(path)
    return parts[1] if parts else 0


def to_tensor(paths: Sequence[str], params: Mapping[str, np.ndarray], naming: Naming) -> np.ndarray:
    """Returns a tensor of the params that it holds, as `tensors_of` names them."""
    if naming.stacked and split_expert(paths[0]):
        return np.stack([params[path] for path in paths])
    (path,) = paths
    return transposed(path, params[path])
