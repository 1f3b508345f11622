"""A snapshot of a layer in a file: the Gram matrices of its inputs, and its dense kernels.

For research on methods without a model, and for bug reports. The file is safetensors: `gram.<tap>` is a Gram matrix
[n, n], `<linear>.kernel` a kernel [n_in, n_out] in its stored dtype; the metadata's `inputs` says which linear layers
read which tap, its `sections` which of them are several side by side, as name -> outputs of each.
"""

import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  teaches numpy, and with it safetensors, bfloat16
import numpy as np
import pydantic
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from scipy.linalg.lapack import spotrf

from convert import schema
from convert.assets import Size
from convert.destination import Destination, destination, staged
from convert.errors import DamagedError
from convert.files import require_regular
from convert.ownership import UNSEALED, seal
from convert.shards import TensorFile
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method
from jaxprune.pruning.gram_matrices import gram_matrices, groups, most_bytes
from jaxprune.pruning.kernel import KernelResult, prune_and_round
from jaxprune.pruning.layer import SolvedLayer, Solver
from jaxprune.pruning.loop import require_fit, targets_for
from jaxprune.pruning.rules import TargetOf
from jaxprune.recipe import Recipe
from jaxprune.sharding import fetch
from jaxprune.sparsity.patterns import Pattern, Sections
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel

FORMAT = "jaxprune layer 1"


class Snapshot(NamedTuple):
    """What pruning a layer starts from.

    Attributes:
        layer: index of the layer.
        inputs: tap -> linear layers whose input it is.
        grams: tap -> Gram matrix of what it taps.
        kernels: linear layer -> dense kernel [n_in, n_out].
        sections: linear layer that is several side by side -> those; see `patterns.Sections`.
    """

    layer: int
    inputs: dict[str, tuple[str, ...]]
    grams: dict[str, Float[np.ndarray, "n n"]]
    kernels: dict[str, Float[np.ndarray, "n m"]]
    sections: Mapping[str, Sections] = MappingProxyType({})

    def only(self, path: str) -> "Snapshot":
        """Returns the snapshot of one linear layer.

        Raises:
            InputError: there is no such linear layer.
        """
        if path not in self.kernels:
            raise InputError(f"there is no linear layer {path!r}: the file has {', '.join(self.kernels)}")
        (tap,) = (tap for tap, paths in self.inputs.items() if path in paths)
        sections = {path: self.sections[path]} if path in self.sections else {}
        return Snapshot(self.layer, {tap: (path,)}, {tap: self.grams[tap]}, {path: self.kernels[path]}, sections)


def capture(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    layers: Collection[int],
    method: Method,
    target: Pattern | TargetOf,
    *,
    prune_before: bool,
) -> Iterator[Snapshot]:
    """Yields snapshots of some layers, in order.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        layers: indices of the wanted layers.
        method: prunes the layers before, so that a snapshot is that of a run with this method and target.
        target: as `method`.
        prune_before: False: the layers before stay dense.

    Raises:
        InputError: there is no such layer, or model, tokens and target do not fit together.
    """
    last = max(layers)
    if last >= model.num_layers:
        raise InputError(f"there is no layer {last}: the checkpoint has {model.num_layers} layers, from 0")
    solver = Solver(method, targets_for(model.architecture, target))
    hidden = model.embed(tokens)
    order = range(last + 1)
    for index, stored in zip(order, model.layers(order), strict=True):
        params, part = model.put_layer(index, stored), model.architecture.layers[index]
        own = part.unstack(stored)
        if index in layers:
            inputs = {tap: paths for tap, paths in part.inputs.items() if not part.routers.issuperset(paths)}
            kernels = {path: np.asarray(own[f"{path}.kernel"]) for paths in inputs.values() for path in paths}
            grams = _every_gram(model, index, params, hidden, list(inputs))
            yield Snapshot(index, inputs, grams, kernels, part.sections)
        if index < last:
            if prune_before:
                solved = SolvedLayer(model, index, params, (hidden, None), solver, {})
                params = model.put_layer(index, part.stack(own | solved.kernels))
            model.forward(index, params, hidden)


def _every_gram(
    model: StreamedModel, index: int, params: Mapping[str, jax.Array], hidden: HiddenStates, taps: list[str]
) -> dict[str, Float[np.ndarray, "n n"]]:
    layer = model.architecture.layers[index]
    found: dict[str, Float[np.ndarray, "n n"]] = {}
    for group in groups(layer, taps, most_bytes(), model.devices):
        grams, _ = gram_matrices(model, index, params, hidden, taps=group)
        found |= {tap: fetch(grams.take(tap)) for tap in group}
    return found


def solve(snapshot: Snapshot, recipe: Recipe) -> Iterator[tuple[str, KernelResult, float, jax.Array]]:
    """Prunes the kernels of a snapshot: yields each one's path, result, seconds and pruned kernel.

    The time of preparation (once an input) is counted to the first linear layer that has the input.

    Raises:
        InputError: the recipe's pattern or mask does not fit the kernels, or one cannot be solved.
    """
    given = recipe.target()
    targets = {path: given(snapshot.layer, path) if callable(given) else given for path in snapshot.kernels}
    for path, target in targets.items():
        require_fit(target, snapshot.layer, path, snapshot.kernels[path].shape)
    for tap, paths in snapshot.inputs.items():
        start = time.perf_counter()
        gram = jnp.asarray(snapshot.grams[tap])
        prepared = recipe.method.prepare(gram)
        for path in paths:
            kernel = jnp.asarray(snapshot.kernels[path])
            sections = snapshot.sections.get(path, ())
            stored, _, result = prune_and_round(recipe.method, prepared, gram, kernel, targets[path], sections=sections)
            if not math.isfinite(result.error):
                raise InputError(
                    f"{path} cannot be solved, its weights come out as NaN or infinity",
                    options={"damping": Change.RAISE},
                )
            yield path, result, time.perf_counter() - start, stored
            start = time.perf_counter()


def save(place: str | Path | Destination, snapshot: Snapshot) -> None:
    """Writes a snapshot's file.

    Raises:
        CheckpointError: there is something that is not replaced, or it cannot be written.
    """
    arrays = {f"gram.{tap}": gram for tap, gram in snapshot.grams.items()}
    arrays |= {f"{linear}.kernel": kernel for linear, kernel in snapshot.kernels.items()}
    with staged(destination(place, folder=False)) as path:
        file = TensorFile(
            path,
            {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()},
            {
                "seal": UNSEALED,
                "format": FORMAT,
                "layer": str(snapshot.layer),
                "inputs": json.dumps(snapshot.inputs),
                "sections": json.dumps({path: dict(sections) for path, sections in snapshot.sections.items()}),
            },
        )
        for name, array in arrays.items():
            file.write(name, array)
        file.finish()
        seal(path)


class _Metadata(schema.Schema):
    """What the header says beside the tensors."""

    layer: Annotated[str, pydantic.Field(pattern="^[0-9]{1,9}$")]
    inputs: pydantic.Json[dict[str, list[str]]]
    sections: pydantic.Json[dict[str, dict[str, Size]]] = {}


def load(path: Path) -> Snapshot:
    """Reads a snapshot's file.

    Raises:
        InputError: it is no such file, or a Gram matrix is none: not symmetric, not finite, not positive semidefinite.
        DamagedError: its header and its tensors disagree.
    """
    require_regular(path, InputError)
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.pop("format", None) != FORMAT:
                raise InputError("it holds no layer's snapshot", file=path, wanted="one that `jaxprune snapshot` made")
            header = schema.check(_Metadata, metadata, file=path, entry="__metadata__")
            inputs = {tap: tuple(linears) for tap, linears in header.inputs.items()}
            sections = {linear: tuple(those.items()) for linear, those in header.sections.items()}
            _require_shapes(path, inputs, sections, {name: opened.get_slice(name) for name in opened.keys()})
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
    return Snapshot(int(header.layer), inputs, grams, kernels, sections)


def _require_shapes(
    path: Path, inputs: Mapping[str, Sequence[str]], sections: Mapping[str, Sections], slices: Mapping[str, Any]
) -> None:
    """Raises DamagedError where tensors are missing, or are not what the header's inputs and sections need."""
    linears = [linear for paths in inputs.values() for linear in paths]
    if not linears or len(set(linears)) < len(linears):
        raise DamagedError("linear layers are missing, or there twice", file=path, entry="inputs", found=linears)
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
            widths = [width for _, width in sections.get(linear, ())]
            if linear in sections and (not widths or kernel[1] % sum(widths)):
                wanted = f"outputs that sum to a divisor of {kernel[1]}"
                raise DamagedError("sections do not fit", file=path, entry=linear, found=widths, wanted=wanted)


def why_no_gram(gram: Float[np.ndarray, "n n"]) -> str:
    """Returns why a finite float32 matrix cannot be a sum of products x xᵀ; "" where it can, up to rounding.

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
