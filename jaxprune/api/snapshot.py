"""Saves a snapshot of a layer: the inputs of the solves of its linear layers.

It serves research on methods without a model, and bug reports. The file is safetensors:

| tensor | shape | content |
|---|---|---|
| `gram.<capture>` | [n, n] | Gram matrix of the inputs, weighted as in the run |
| `shift.<capture>` | [n, n] | activation shift, if `asymmetry` is above 0; see `gram_matrices` |
| `<linear>.kernel` | [n, m] | dense kernel, in its stored dtype |
| `outputs.<linear>` | [m] | weights of the outputs, if they are weighted; see `prune_and_round` |

All tensors except kernels are float32. The metadata has these entries:

| entry | content |
|---|---|
| `inputs` | captured activation -> linear layers that read it |
| `tokens` | captured activation of an expert -> number of tokens routed to it |
| `projections` | linear layer -> its fused projections, as name -> outputs |
| `patterns` | linear layer -> its pattern, and the fraction of its zeros that the solve makes |
| `layer`, `asymmetry` | see `Snapshot` |
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
import pydantic
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from scipy.linalg.lapack import spotrf

from convert import Params, schema
from convert.assets import Size
from convert.destination import Destination, destination, staged
from convert.errors import DamagedError
from convert.files import require_regular
from convert.ownership import EMPTY_CHECKSUM, add_checksum
from convert.shards import TensorFile
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method
from jaxprune.models import Architecture
from jaxprune.phases import Phases, require_recipe
from jaxprune.recipe import Recipe
from jaxprune.run_store.context import NO_STORE
from jaxprune.sharding import fetch
from jaxprune.solve.calibration_states import CalibrationStates
from jaxprune.solve.kernel import KernelResult, Linear
from jaxprune.solve.layer import Inputs, Solver, layer_inputs, solve_kernels, solve_layer
from jaxprune.solve.rules import require_fit, with_rules
from jaxprune.sparsity.masks import StoredMask
from jaxprune.sparsity.patterns import OwnPattern, Partly, Pattern, Projections
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.sweep import sweep
from jaxprune.structure.removal import remove
from jaxprune.structure.sizes import smaller_architecture

FORMAT = "jaxprune layer 2"


class Snapshot(NamedTuple):
    """The inputs of the solves of a layer.

    Attributes:
        layer: index of the layer.
        inputs: captured activation -> linear layers that read it.
        grams: captured activation -> Gram matrix.
        kernels: linear layer -> dense kernel [n_in, n_out].
        projections: linear layer -> its fused projections; see `patterns.Projections`. Single
            projections are missing.
        patterns: linear layer -> its pattern in the run; empty if masks were given.
        outputs: linear layer -> weights of its outputs; empty if all are 1. See `prune_and_round`.
        tokens: captured activation of an expert -> number of tokens routed to it.
        shifts: captured activation -> activation shift; empty if `asymmetry` is 0. See
            `gram_matrices`.
        asymmetry: see `layer.Solver`.
    """

    layer: int
    inputs: dict[str, tuple[str, ...]]
    grams: dict[str, Float[np.ndarray, "n n"]]
    kernels: dict[str, Float[np.ndarray, "n m"]]
    projections: Mapping[str, Projections] = MappingProxyType({})
    patterns: Mapping[str, Pattern] = MappingProxyType({})
    outputs: Mapping[str, Float[np.ndarray, "m"]] = MappingProxyType({})
    tokens: Mapping[str, int] = MappingProxyType({})
    shifts: Mapping[str, Float[np.ndarray, "n n"]] = MappingProxyType({})
    asymmetry: float = 0.0

    def only(self, path: str) -> "Snapshot":
        """Returns the snapshot of one linear layer.

        Raises:
            InputError: the linear layer does not exist.
        """
        if path not in self.kernels:
            raise InputError(
                f"there is no linear layer {path!r}: the snapshot has {', '.join(self.kernels)}"
            )
        (capture,) = (capture for capture, paths in self.inputs.items() if path in paths)

        def one(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: values[name]} if name in values else {}

        return self._replace(
            inputs={capture: (path,)},
            grams=one(capture, self.grams),
            kernels=one(path, self.kernels),
            projections=one(path, self.projections),
            patterns=one(path, self.patterns),
            outputs=one(path, self.outputs),
            tokens=one(capture, self.tokens),
            shifts=one(capture, self.shifts),
        )

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Name -> tensor of the file."""
        arrays = {f"gram.{capture}": gram for capture, gram in self.grams.items()}
        arrays |= {f"shift.{capture}": shift for capture, shift in self.shifts.items()}
        arrays |= {f"outputs.{linear}": weights for linear, weights in self.outputs.items()}
        return arrays | {f"{linear}.kernel": kernel for linear, kernel in self.kernels.items()}


def require_layer(architecture: Architecture, layer: int) -> None:
    """Checks that a model has a layer of this index.

    Raises:
        InputError: it has fewer layers.
    """
    if layer >= (count := len(architecture.layers)):
        raise InputError(f"there is no layer {layer}: the checkpoint has {count} layers, from 0")


def capture(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    layer: int,
    recipe: Recipe,
    *,
    prune_before: bool = True,
) -> Snapshot:
    """Returns the inputs of the solves of a layer in a run, before any tuning.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        layer: the index of the layer.
        recipe: the recipe of the run.
        prune_before: whether to prune the layers before; False: they stay dense.

    Raises:
        InputError: the layer does not exist or stays dense, or model, tokens and recipe do not fit
            together.
    """
    model.require_tokens(tokens)
    left = smaller_architecture(model.architecture, model.reader.assets, recipe.structure)
    require_layer(left, layer)
    targets = require_recipe(left, recipe)
    model, _ = remove(model, tokens, recipe.structure)
    if not Solver(recipe.method, with_rules(*targets)).captures(
        layer, model.architecture.layers[layer]
    ):
        raise InputError(
            f"the rules leave layer {layer} dense",
            options=dict.fromkeys(("layer", "skip"), Change.OTHER),
        )
    states, solver = Phases.of(model, tokens, recipe, NO_STORE).solving()
    before = (
        solver if prune_before else dataclasses.replace(solver, target_of=lambda index, path: None)
    )

    def visit(index: int, stored: Params, seconds: dict[str, float]) -> Snapshot | None:
        if index == layer:
            return _of_layer(states, solver, index, stored)
        solve_layer(states, before, index, stored, seconds)
        return None

    *_, snapshot = sweep(range(layer + 1), states.model.layers, visit, states=states)
    assert snapshot
    return snapshot


def _of_layer(states: CalibrationStates, solver: Solver, index: int, stored: Params) -> Snapshot:
    """Returns the snapshot of the layer that the states have reached."""
    model, part = states.model, states.model.architecture.layers[index]
    params, own = model.put_layer(index, stored), part.unstack(stored)
    captures = solver.captures(index, part)
    paths = [path for some in captures.values() for path in some]
    grams, shifts, tokens = {}, {}, {}
    for capture, inputs in layer_inputs(states, solver, index, params, {}):
        grams[capture] = fetch(inputs.gram)
        if inputs.shift is not None:
            shifts[capture] = fetch(inputs.shift)
        if inputs.tokens is not None:
            tokens[capture] = inputs.tokens
        del inputs  # frees memory before the next are made
    targets = {path: solver.target_of(index, path) for path in paths}
    return Snapshot(
        index,
        captures,
        grams,
        kernels={path: np.asarray(own[f"{path}.kernel"]) for path in paths},
        projections={path: part.projections[path] for path in paths if path in part.projections},
        patterns={path: target for path, target in targets.items() if isinstance(target, Pattern)},
        outputs={path: weights for path, weights in solver.outputs(index).items() if path in paths},
        tokens=tokens,
        shifts=shifts,
        asymmetry=solver.asymmetry,
    )


def solve(
    snapshot: Snapshot, method: Method, target: Pattern | Callable[[int, str], Pattern | StoredMask]
) -> Iterator[tuple[str, KernelResult, float, Float[np.ndarray, "n m"]]]:
    """Prunes the kernels of a snapshot; yields path, result, seconds and pruned kernel of each.

    The time of `prepare` (once per input) counts towards the first linear layer of the input.

    Args:
        snapshot: the snapshot.
        method: the pruning method.
        target: a pattern for all linear layers, or (layer index, path) -> pattern or mask of each.

    Raises:
        InputError: the pattern or mask does not fit the kernels, or a kernel cannot be solved.
    """
    linears = {}
    for path, kernel in snapshot.kernels.items():
        wanted = target(snapshot.layer, path) if callable(target) else target
        require_fit(wanted, snapshot.layer, path, kernel.shape)
        weights, projections = snapshot.outputs.get(path), snapshot.projections.get(path, ())
        linears[path] = Linear(partial(jnp.asarray, kernel), wanted, weights, projections)
    for capture, paths in snapshot.inputs.items():
        found: dict[str, tuple[KernelResult, Float[np.ndarray, "n m"]]] = {}
        seconds, start = dict.fromkeys(paths, 0.0), time.perf_counter()
        given = {"gram": snapshot.grams[capture], "shift": snapshot.shifts.get(capture)}
        inputs = Inputs(snapshot.tokens.get(capture), **jax.tree.map(jnp.asarray, given))
        some = {path: linears[path] for path in paths}
        for path, stored, _, result in solve_kernels(
            inputs, some, method, asymmetry=snapshot.asymmetry
        ):
            found[path] = result, stored
            seconds[path] += time.perf_counter() - start
            start = time.perf_counter()
        for path, (result, stored) in found.items():
            if not math.isfinite(result.error):
                raise InputError(
                    f"{path} cannot be solved: its weights would be NaN or infinite",
                    options={"damping": Change.RAISE},
                )
            yield path, result, seconds[path], stored


def save(place: str | Path | Destination, snapshot: Snapshot) -> None:
    """Writes a snapshot to a file.

    Raises:
        CheckpointError: a file at this path is not replaced, or the file cannot be written.
    """
    arrays = snapshot.arrays
    header = {
        "layer": snapshot.layer,
        "inputs": snapshot.inputs,
        "projections": {
            path: dict(projections) for path, projections in snapshot.projections.items()
        },
        "patterns": {
            path: _Pattern.of(pattern).model_dump() for path, pattern in snapshot.patterns.items()
        },
        "tokens": dict(snapshot.tokens),
        "asymmetry": snapshot.asymmetry,
    }
    with staged(destination(place, folder=False)) as path:
        file = TensorFile(
            path,
            arrays,
            {"checksum": EMPTY_CHECKSUM, "format": FORMAT}
            | {name: json.dumps(value) for name, value in header.items()},
        )
        for name, array in arrays.items():
            file.write(name, array)
        file.finish()
        add_checksum(path)


class _Pattern(schema.Schema):
    """The pattern of a linear layer."""

    pattern: OwnPattern
    share: float = pydantic.Field(ge=0, le=1)

    @classmethod
    def of(cls, pattern: Pattern) -> "_Pattern":
        if isinstance(pattern, Partly):
            return cls.model_construct(pattern=pattern.pattern, share=pattern.share)
        return cls.model_construct(pattern=pattern, share=1.0)

    def made(self) -> Pattern:
        """Returns the pattern for the solve."""
        return self.pattern if self.share == 1 else Partly(self.pattern, self.share)


class _Metadata(schema.Schema):
    """The metadata of the file."""

    layer: Annotated[str, pydantic.Field(pattern="^[0-9]{1,9}$")]
    inputs: pydantic.Json[dict[str, list[str]]]
    projections: pydantic.Json[dict[str, dict[str, Size]]] = {}
    patterns: pydantic.Json[dict[str, _Pattern]] = {}
    tokens: pydantic.Json[dict[str, schema.Count]] = {}
    asymmetry: pydantic.Json[Annotated[float, pydantic.Field(ge=0, le=1)]] = 0.0


def load(path: Path) -> Snapshot:
    """Reads a snapshot from a file.

    Raises:
        InputError: the file is not a snapshot, has NaN or infinite values, or has a Gram matrix
            that is not symmetric positive semidefinite.
        DamagedError: its metadata and tensors disagree.
    """
    require_regular(path, InputError)
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.pop("format", None) != FORMAT:
                raise InputError(
                    "it is not a layer's snapshot",
                    file=path,
                    wanted="one that `jaxprune snapshot` made",
                )
            header = schema.check(_Metadata, metadata, file=path, entry="__metadata__")
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            names = _require_shapes(path, header, slices)
            snapshot = _read(header, {name: opened.get_tensor(name) for name in names})
    except (OSError, SafetensorError) as error:
        raise InputError(f"it cannot be read ({error})", file=path) from error
    for name, array in snapshot.arrays.items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise InputError("it has NaN or infinite values", file=path, entry=name)
    for capture, gram in snapshot.grams.items():
        if reason := why_no_gram(gram):
            raise InputError(
                f"it is not a Gram matrix: {reason}", file=path, entry=f"gram.{capture}"
            )
    for linear, weights in snapshot.outputs.items():
        if not (weights > 0).all():
            raise InputError(
                "an output weight is not positive", file=path, entry=f"outputs.{linear}"
            )
    return snapshot


def _read(header: _Metadata, tensors: Mapping[str, np.ndarray]) -> Snapshot:
    """Returns the snapshot of a file whose metadata and tensors agree."""
    linears = [linear for paths in header.inputs.values() for linear in paths]
    return Snapshot(
        int(header.layer),
        {capture: tuple(paths) for capture, paths in header.inputs.items()},
        grams={capture: tensors[f"gram.{capture}"] for capture in header.inputs},
        kernels={linear: tensors[f"{linear}.kernel"] for linear in linears},
        projections={linear: tuple(those.items()) for linear, those in header.projections.items()},
        patterns={linear: record.made() for linear, record in header.patterns.items()},
        outputs={
            linear: tensors[f"outputs.{linear}"]
            for linear in linears
            if f"outputs.{linear}" in tensors
        },
        tokens=header.tokens,
        shifts={
            capture: tensors[f"shift.{capture}"] for capture in header.inputs if header.asymmetry
        },
        asymmetry=header.asymmetry,
    )


def _require_shapes(path: Path, header: _Metadata, slices: Mapping[str, Any]) -> list[str]:
    """Returns the names of the snapshot's tensors.

    Raises:
        DamagedError: a tensor is missing or has a wrong shape or dtype.
    """
    linears = [linear for paths in header.inputs.values() for linear in paths]
    if not linears or len(set(linears)) < len(linears):
        raise DamagedError(
            "linear layers are missing or duplicated", file=path, entry="inputs", found=linears
        )
    if header.patterns and header.patterns.keys() != set(linears):
        raise DamagedError(
            "linear layers are missing or unknown",
            file=path,
            entry="patterns",
            found=header.patterns,
        )
    if unknown := header.tokens.keys() - header.inputs.keys():
        raise DamagedError("unknown inputs", file=path, entry="tokens", found=sorted(unknown))
    names = [
        f"{kind}.{capture}"
        for kind in ("gram", *["shift"] * (header.asymmetry > 0))
        for capture in header.inputs
    ]
    outputs = [f"outputs.{linear}" for linear in linears]
    names += [f"{linear}.kernel" for linear in linears] + outputs * any(
        name in slices for name in outputs
    )
    if missing := [name for name in names if name not in slices]:
        raise DamagedError("a tensor is missing", file=path, entry=missing[0])
    for name in names:
        dtype = slices[name].get_dtype()
        if dtype not in (("F32", "F16", "BF16") if name.endswith(".kernel") else ("F32",)):
            raise DamagedError(
                "a tensor's dtype is not supported", file=path, entry=name, found=dtype
            )
    for capture, paths in header.inputs.items():
        gram = slices[f"gram.{capture}"].get_shape()
        if len(gram) != 2 or gram[0] != gram[1] or not gram[0]:
            raise DamagedError(
                "a Gram matrix is not square", file=path, entry=f"gram.{capture}", found=gram
            )
        if (
            f"shift.{capture}" in names
            and (shift := slices[f"shift.{capture}"].get_shape()) != gram
        ):
            raise DamagedError(
                "its shape is wrong",
                file=path,
                entry=f"shift.{capture}",
                found=shift,
                wanted=f"{gram}",
            )
        for linear in paths:
            _require_linear(path, header, linear, gram[0], slices)
    return names


def _require_linear(
    path: Path, header: _Metadata, linear: str, inputs: int, slices: Mapping[str, Any]
) -> None:
    """Checks the tensors and metadata of a linear layer against its number of inputs.

    Raises:
        DamagedError: they do not fit.
    """
    kernel = slices[f"{linear}.kernel"].get_shape()
    if len(kernel) != 2 or kernel[0] != inputs or not kernel[1]:
        wanted = f"[{inputs}, outputs], to match the Gram matrix of its inputs"
        raise DamagedError(
            "a kernel's shape is wrong", file=path, entry=linear, found=kernel, wanted=wanted
        )
    name = f"outputs.{linear}"
    if name in slices and (weights := slices[name].get_shape()) != [kernel[1]]:
        wanted = f"[{kernel[1]}], one for each output"
        raise DamagedError(
            "the number of weights is wrong", file=path, entry=name, found=weights, wanted=wanted
        )
    widths = list(header.projections.get(linear, {}).values())
    if linear in header.projections and (not widths or kernel[1] % sum(widths)):
        wanted = f"outputs that sum to a divisor of {kernel[1]}"
        raise DamagedError(
            "projections do not match the kernel",
            file=path,
            entry=linear,
            found=widths,
            wanted=wanted,
        )
    try:
        if linear in header.patterns:
            header.patterns[linear].made().zeros(tuple(kernel))
    except InputError as error:
        raise DamagedError(error.problem, file=path, entry=f"patterns.{linear}") from None


def why_no_gram(gram: Float[np.ndarray, "n n"]) -> str:
    """Returns why a finite float32 matrix is not a sum of products x xᵀ; "" if it is.

    The test allows for rounding. The matrix is scaled to a unit diagonal, which divides by the
    norms of the inputs. Then all entries are between -1 and 1, and a Cholesky factorization exists
    after a small ridge. Rounding of all entries by a few units in the last place changes
    eigenvalues by about √n of them.
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
            row, column = (
                int(i) for i in np.unravel_index(np.abs(scaled[rows]).argmax(), difference.shape)
            )
            return f"its entry [{start + row}, {column}] is larger than the diagonal allows"
    scaled[np.diag_indices(n)] = 1 + tolerance
    # The transpose has Fortran order, so it is not copied.
    _, pivot = spotrf(scaled.T, lower=True, overwrite_a=True)
    return f"it is not positive semidefinite: pivot {pivot - 1} is negative" if pivot else ""
