"""A layer's pruning problem in a file: the Gram matrices of its linears' inputs, and its dense kernels.

For research on methods without a model, and for bug reports. The file is safetensors: `gram.<tap>` is a Gram matrix
[n, n], `<linear>.kernel` a kernel [n_in, n_out] in its stored dtype; the metadata's `inputs` says which linears read
which tap.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  teaches numpy, and with it safetensors, bfloat16
import numpy as np
import pydantic
from jaxtyping import DTypeLike, Float, Int
from safetensors import SafetensorError, safe_open
from scipy.linalg.lapack import spotrf

from convert import Reader, schema
from convert.errors import DamagedError
from convert.files import require_regular
from convert.ownership import UNSEALED, Destination, destination, seal, staged
from convert.shards import TensorFile
from jaxprune.errors import InputError
from jaxprune.methods import Method
from jaxprune.models import model_for
from jaxprune.pruning.pipeline import prune
from jaxprune.pruning.stages import Layer, PatternOf, Run, advance, measure, solve
from jaxprune.sparsity.patterns import Pattern

FORMAT = "jaxprune layer 1"


class Problem(NamedTuple):
    """What pruning a layer starts from.

    Attributes:
        layer: index of the layer.
        inputs: tap -> linears that read it.
        grams: tap -> Gram matrix of what it taps.
        kernels: linear -> dense kernel [n_in, n_out].
    """

    layer: int
    inputs: dict[str, tuple[str, ...]]
    grams: dict[str, Float[np.ndarray, "n n"]]
    kernels: dict[str, Float[np.ndarray, "n m"]]


def capture(
    reader: Reader,
    tokens: Int[np.ndarray, "w t"],
    layers: Collection[int],
    method: Method,
    pattern: Pattern | PatternOf,
    *,
    prune_before: bool,
    dtype: DTypeLike | None = None,
) -> Iterator[Problem]:
    """The problems of some layers, in order.

    Args:
        reader: the dense checkpoint.
        tokens: calibration windows.
        layers: indices of the wanted layers.
        method: prunes the layers before, so that a problem is the one of a run with this method and pattern.
        pattern: as `method`.
        prune_before: False: the layers before stay dense.
        dtype: of the model's computation.

    Raises:
        InputError: there is no such layer, or checkpoint, tokens and pattern do not fit together.
    """
    last, depth = max(layers), model_for(reader, dtype).config.num_layers
    if last >= depth:
        raise InputError(f"there is no layer {last}: the checkpoint has {depth} layers, from 0")
    found: list[Problem] = []

    def keep(run: Run, layer: Layer) -> Layer:
        inputs = {tap: tuple(paths) for tap, paths in run.model.inputs.items()}
        kernels = {p: np.asarray(layer.params[f"{p}.kernel"]) for paths in inputs.values() for p in paths}
        found.append(Problem(layer.index, inputs, jax.device_get(layer.grams), kernels))
        return layer

    def visit(run: Run, layer: Layer) -> Layer:
        if prune_before or layer.index in layers:
            layer = measure(run, layer)
        if layer.index in layers:
            layer = keep(run, layer)
        if layer.index == last:
            return layer
        return advance(run, solve(run, layer) if prune_before else layer)

    for result in prune(reader, tokens, method, pattern, dtype=dtype, stages={"capture": visit}):
        yield from found
        found.clear()
        if result.index == last:
            return


def save(place: str | Path | Destination, problem: Problem) -> None:
    """Writes a problem's file.

    Raises:
        CheckpointError: there is something that is not replaced, or it cannot be written.
    """
    arrays = {f"gram.{tap}": gram for tap, gram in problem.grams.items()}
    arrays |= {f"{linear}.kernel": kernel for linear, kernel in problem.kernels.items()}
    with staged(destination(place, folder=False)) as path:
        file = TensorFile(
            path,
            {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()},
            {"seal": UNSEALED, "format": FORMAT, "layer": str(problem.layer), "inputs": json.dumps(problem.inputs)},
        )
        for name, array in arrays.items():
            file.write(name, array)
        file.finish()
        seal(path)


class _Metadata(schema.Schema):
    """What the header says beside the tensors."""

    layer: Annotated[str, pydantic.Field(pattern="^[0-9]{1,9}$")]
    inputs: pydantic.Json[dict[str, list[str]]]


def load(path: Path) -> Problem:
    """Reads a problem's file.

    Raises:
        InputError: it is no such file, or a Gram matrix is none: not symmetric, not finite, not positive semidefinite.
        DamagedError: its header and its tensors disagree.
    """
    require_regular(path, InputError)
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.pop("format", None) != FORMAT:
                raise InputError("it holds no layer's problem", file=path, wanted="one that scripts/save_layer.py made")
            header = schema.check(_Metadata, metadata, file=path, entry="__metadata__")
            inputs = {tap: tuple(linears) for tap, linears in header.inputs.items()}
            _require_shapes(path, inputs, {name: opened.get_slice(name) for name in opened.keys()})
            grams = {tap: opened.get_tensor(f"gram.{tap}") for tap in inputs}
            kernels = {p: opened.get_tensor(f"{p}.kernel") for paths in inputs.values() for p in paths}
    except (OSError, SafetensorError) as error:
        raise InputError(f"it cannot be read ({error})", file=path) from error
    for name, array in ({f"gram.{tap}": a for tap, a in grams.items()} | kernels).items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise InputError("it holds NaN or infinity", file=path, entry=name)
    for tap, gram in grams.items():
        if reason := why_no_gram(gram):
            raise InputError(f"it is no Gram matrix, {reason}", file=path, entry=f"gram.{tap}")
    return Problem(int(header.layer), inputs, grams, kernels)


def _require_shapes(path: Path, inputs: Mapping[str, Sequence[str]], slices: Mapping[str, Any]) -> None:
    """Raises DamagedError where tensors are missing, or are not what the header's inputs need."""
    linears = [linear for paths in inputs.values() for linear in paths]
    if not linears or len(set(linears)) < len(linears):
        raise DamagedError("linears are missing, or there twice", file=path, entry="inputs", found=linears)
    names = [f"gram.{tap}" for tap in inputs] + [f"{linear}.kernel" for linear in linears]
    if missing := [name for name in names if name not in slices]:
        raise DamagedError("a tensor is missing", file=path, entry=missing[0])
    for name in names:
        dtype = slices[name].get_dtype()
        if dtype not in (("F32",) if name.startswith("gram.") else ("F32", "F16", "BF16")):
            raise DamagedError("a tensor's dtype cannot be used", file=path, entry=name, found=dtype)
    for tap, paths in inputs.items():
        gram = slices[f"gram.{tap}"].get_shape()
        if len(gram) != 2 or gram[0] != gram[1] or not gram[0]:
            raise DamagedError("a Gram matrix is not square", file=path, entry=f"gram.{tap}", found=gram)
        for linear in paths:
            kernel = slices[f"{linear}.kernel"].get_shape()
            if len(kernel) != 2 or kernel[0] != gram[0] or not kernel[1]:
                wanted = f"[{gram[0]}, outputs], as the Gram matrix of its inputs has it"
                raise DamagedError("a kernel's shape is wrong", file=path, entry=linear, found=kernel, wanted=wanted)


def why_no_gram(gram: Float[np.ndarray, "n n"]) -> str:
    """Why a finite float32 matrix cannot be a sum of products x xᵀ; "" where it can, up to rounding.

    With a diagonal of ones (the inputs' norms divided out) all entries lie between -1 and 1, and after a small ridge a
    Cholesky factorization exists. Rounding of all entries by a few units moves eigenvalues by some √n of them.
    """
    n = len(gram)
    tolerance = np.float32(32 * np.sqrt(n) * np.finfo(np.float32).eps)
    diagonal = np.diagonal(gram)
    if diagonal.min() < 0:
        at = int(diagonal.argmin())
        return f"its diagonal is negative at {at}: {diagonal[at]:.3g}"
    scale = np.maximum(np.sqrt(diagonal), np.sqrt(np.finfo(np.float32).tiny))
    scaled = gram / scale[:, None]
    scaled /= scale[None, :]
    for start in range(0, n, 512):
        rows = slice(start, start + 512)
        difference = np.abs(scaled[rows] - scaled[:, rows].T)
        if difference.max() > tolerance:
            row, column = (int(i) for i in np.unravel_index(difference.argmax(), difference.shape))
            return f"it is not symmetric at [{start + row}, {column}]"
        if np.abs(scaled[rows]).max() > 1 + tolerance:
            row, column = (int(i) for i in np.unravel_index(np.abs(scaled[rows]).argmax(), difference.shape))
            return f"its entry [{start + row}, {column}] is larger than the diagonal allows"
    scaled[np.diag_indices(n)] = 1 + tolerance
    _, pivot = spotrf(scaled.T, lower=True, overwrite_a=True)  # its transpose is Fortran's, and so not copied
    return f"it is not positive semidefinite: pivot {pivot - 1} is negative" if pivot else ""
