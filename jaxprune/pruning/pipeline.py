"""The loop over layers: the only file that knows the order of the steps.

tokens -> embed -> hidden states (host)
  layer i:  read -> taps -> Gram matrices -> solve -> put back -> forward -> yield
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import DTypeLike, Int

from convert import Reader, Spec, parts
from jaxprune import sharding as devices
from jaxprune.errors import InputError
from jaxprune.methods import Method
from jaxprune.models import Model, model_for
from jaxprune.pruning.results import LayerResult, Results
from jaxprune.pruning.sensitivity import Weights
from jaxprune.pruning.stages import STAGES, Layer, PatternOf, Run, Stage
from jaxprune.sparsity.masks import StoredMask
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.stream import embed, forward, in_checkpoint, inside_layer, read_layers


def prune(
    reader: Reader,
    tokens: Int[np.ndarray, "w t"],
    method: Method,
    pattern: Pattern | PatternOf,
    *,
    weights: Sequence[Weights] | None = None,
    asymmetry: float = 0.0,
    dtype: DTypeLike | None = None,
    stages: Mapping[str, Stage] = STAGES,
    done: Results | None = None,
) -> Iterator[LayerResult]:
    """Prunes a checkpoint, layer by layer; nothing is written.

    Args:
        reader: the dense checkpoint.
        tokens: calibration windows, [windows, length] token ids.
        method: the pruning method.
        pattern: for all linears, or (layer index, path of the linear) -> its own, which may be a mask made elsewhere.
        weights: of the layers' tokens and outputs; see `sensitivity.weights`.
        asymmetry: share of the inputs' drift from the dense model's that a linear makes up for; see
            `stats.drifted_target`. Above 0 a dense forward pass goes along.
        dtype: of the model's computation; see `models.model_for`.
        stages: name -> step of a layer's visit, in order.
        done: where layers are kept as soon as they are pruned, and taken from where they are kept already.

    Returns:
        An iterator over the layers' results. A layer is pruned when its result is asked for.

    Raises:
        InputError: checkpoint, tokens and pattern do not fit together; raised here, before the first layer.
    """
    model = model_for(reader, dtype)
    pattern_of = pattern_for_each(model, pattern)
    hidden = embed(model, reader, tokens)
    dense = embed(model, reader, tokens) if asymmetry else None
    run = Run(model, hidden, method, pattern_of, weights, dense, asymmetry)
    return _visit(reader, tokens, run, stages, done or Results(None, "", model.config.num_layers))


def pattern_for_each(model: Model, pattern: Pattern | PatternOf) -> PatternOf:
    """The pattern of each linear, once it is known to fit; errors as for `require_fit`."""
    pattern_of = pattern if callable(pattern) else lambda index, path: pattern
    for (index, path), shape in linear_shapes(model).items():
        require_fit(pattern_of(index, path), index, path, shape)
    return pattern_of


def require_fit(pattern: Pattern | StoredMask, index: int, path: str, shape: tuple[int, ...]) -> None:
    """Raises InputError where a pattern is impossible for a kernel's shape, or a mask has another."""
    if isinstance(pattern, Pattern):
        pattern.selector(shape)
    elif pattern.shape != shape:
        raise InputError(
            f"the mask of layers.{index}.{path} is {list(pattern.shape)}, but its kernel [in, out] is {list(shape)}: "
            "the mask was made for another model"
        )


def _visit(
    reader: Reader, tokens: Int[np.ndarray, "w t"], run: Run, stages: Mapping[str, Stage], done: Results
) -> Iterator[LayerResult]:
    missing = [index for index in range(run.model.config.num_layers) if index not in done]
    reading, behind = read_layers(run.model, reader, missing), 0
    fresh = True  # whether the hidden states are still those of the embedding
    start = time.perf_counter()
    for index in range(run.model.config.num_layers):
        if index not in missing and (kept := done.get(index)):
            yield kept
            continue
        params = next(reading if index in missing else read_layers(run.model, reader, [index]))
        if fresh:
            behind, fresh = _restore(reader, tokens, run, done, index), False
        for before in range(behind, index):
            _pass_by(reader, run, done, before)
        layer = Layer(index, jax.block_until_ready(devices.everywhere(params)), {}, {}, {}, {})
        seconds = {"read": time.perf_counter() - start}
        for name, stage in stages.items():
            start = time.perf_counter()
            layer = stage(run, layer)
            jax.block_until_ready((layer.params, layer.grams))
            seconds[name] = time.perf_counter() - start
        changed = {f"{path}.kernel" for path in layer.linears}
        # Only kernels changed; the rest goes out exactly as it came in.
        out = {p: devices.fetch(layer.params[p]) if p in changed else array for p, array in params.items()}
        del params
        result = LayerResult(index, in_checkpoint(index, out), layer.linears, devices.fetch(layer.masks), seconds)
        del layer, out
        behind = index + 1
        done.put(result)
        if done.journal and behind < run.model.config.num_layers:
            done.journal.keep_states(done.stage, behind, _states(run))
        yield result
        del result
        start = time.perf_counter()


def _states(run: Run) -> dict[str, HiddenStates]:
    return {"pruned": run.hidden} | ({"dense": run.dense} if run.dense else {})


def _restore(reader: Reader, tokens: Int[np.ndarray, "w t"], run: Run, done: Results, index: int) -> int:
    """The number of layers, up to `index`, that the hidden states are behind once those that were kept are taken up."""
    position = done.journal.position(done.stage) if done.journal else None
    if done.journal is None or position is None or position > index:
        return 0
    if done.journal.restore_states(done.stage, _states(run)):
        return position
    embed(run.model, reader, tokens, into=run.hidden)
    if run.dense:
        embed(run.model, reader, tokens, into=run.dense)
    return 0


def _pass_by(reader: Reader, run: Run, done: Results, index: int) -> None:
    """Moves the hidden states through a layer that is pruned already."""
    layer = done.get(index)
    if layer is None:
        raise InputError(f"layer {index} was damaged on the disk while it was used: run the same command again")
    forward(run.model, devices.everywhere(inside_layer(index, layer.params)), run.hidden)
    if run.dense:
        (params,) = read_layers(run.model, reader, [index])
        forward(run.model, devices.everywhere(params), run.dense)


def linear_shapes(model: Model) -> dict[tuple[int, str], tuple[int, ...]]:
    """(layer index, path of the linear) -> shape [n_in, n_out] of its kernel, for all linears that are pruned."""
    return {(i, path): shape for i in range(model.config.num_layers) for path, shape in model.linears.items()}


def other_params(spec: Spec) -> Iterator[list[str]]:
    """The paths of each part that pruning leaves alone: embedding, final norm, head."""
    return (paths for part, paths in parts(spec).items() if not part.startswith("layers."))
