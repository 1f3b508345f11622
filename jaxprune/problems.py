"""A layer's pruning problem in a file: the Gram matrices of its linears' inputs, and its dense kernels.

For research on methods without a model, and for bug reports. The file is safetensors: `gram.<tap>` is a Gram matrix
[n, n],
`<linear>.kernel` a kernel [n_in, n_out] in its stored dtype; the metadata's `inputs` says which linears read which tap.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes  # noqa: F401  teaches numpy, and with it safetensors, bfloat16
import numpy as np
from jaxtyping import DTypeLike, Float, Int
from safetensors import SafetensorError, safe_open

from convert import Reader
from convert.ownership import UNSEALED, Destination, destination, seal, staged
from convert.shards import TensorFile
from jaxprune.errors import InputError
from jaxprune.methods import Method
from jaxprune.models import model_for
from jaxprune.patterns import Pattern
from jaxprune.pipeline import prune
from jaxprune.stages import Layer, PatternOf, Run, advance, measure, solve

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


def load(path: Path) -> Problem:
    """Reads a problem's file.

    Raises:
        InputError: it is no such file, or damaged.
    """
    unreadable = f"cannot read a layer's problem from {path}: {{}}"
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(unreadable.format(error)) from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} holds no layer's problem: make one with scripts/save_layer.py")
    try:
        layer = int(metadata["layer"])
        inputs = {tap: tuple(linears) for tap, linears in json.loads(metadata["inputs"]).items()}
        grams = {tap: arrays[f"gram.{tap}"] for tap in inputs}
        kernels = {p: arrays[f"{p}.kernel"] for paths in inputs.values() for p in paths}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(unreadable.format(f"its header is damaged ({error})")) from error
    for tap, linears in inputs.items():
        n = grams[tap].shape[0]
        for linear in linears:
            if grams[tap].shape != (n, n) or kernels[linear].ndim != 2 or len(kernels[linear]) != n:
                raise InputError(
                    f"{path} is damaged: {linear} is {list(kernels[linear].shape)}, but the Gram matrix of its inputs "
                    f"is {list(grams[tap].shape)}"
                )
    for name, array in (grams | kernels).items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise InputError(f"{path} holds NaN or infinity in {name}")
    return Problem(layer, inputs, grams, kernels)
