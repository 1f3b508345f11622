"""The loop over layers: the only file that knows the order of the steps.

tokens -> embed -> hidden states (host)
  layer i:  read -> taps -> Gram matrices -> solve -> put back -> forward -> yield
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, UInt8

from convert import Reader, Spec, parts
from jaxprune import stats
from jaxprune.errors import InputError
from jaxprune.hidden import HiddenStates
from jaxprune.linears import LinearResult, solve_linear
from jaxprune.masks import StoredMask, pack
from jaxprune.methods import Method
from jaxprune.models import Model, Part, model_for
from jaxprune.patterns import Pattern
from jaxprune.results import LayerResult, Results
from jaxprune.sensitivity import Weights
from jaxprune.stream import embed, forward, in_checkpoint, inside_layer, read_layers

PatternOf = Callable[[int, str], Pattern | StoredMask]
"""(layer index, path of the linear) -> its pattern, or its mask where that was made elsewhere."""


class Run(NamedTuple):
    """What does not change from layer to layer, but for the hidden states' content.

    Attributes:
        model, method, pattern_of: as given.
        hidden: behind the layers as pruned.
        weights: of the layers' tokens and outputs.
        dense: hidden states behind the dense layers; only where there is an asymmetry.
        asymmetry: share of the inputs' drift that a linear makes up for.
    """

    model: Model
    hidden: HiddenStates
    method: Method
    pattern_of: PatternOf
    weights: Sequence[Weights] | None = None
    dense: HiddenStates | None = None
    asymmetry: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the stages hand on.

    Attributes:
        index: of the layer.
        params: on the device, in the stored dtype; paths inside the layer.
        grams: tap -> Gram matrix of what it taps; consumed by `solve`.
        drifts: tap -> see `stats.drift`; empty without an asymmetry; consumed by `solve`.
        linears: outcomes so far.
        masks: packed, of the linears pruned so far.
    """

    index: int
    params: dict[str, Array]
    grams: dict[str, Float[Array, "n n"]]
    drifts: dict[str, Float[Array, "n n"]]
    linears: dict[str, LinearResult]
    masks: dict[str, UInt8[Array, "m _"]]


Stage = Callable[[Run, Layer], Layer]


def measure(run: Run, layer: Layer) -> Layer:
    """One pass of the dense layer: the Gram matrices of its linears' inputs.

    Raises:
        InputError: NaN or infinity in the layer's weights or activations.
    """
    _require_finite(layer.params, f"the weights of layer {layer.index}", "the checkpoint is damaged")
    grams = {tap: jnp.zeros((n, n), jnp.float32) for tap, n in run.model.widths.items()}
    drifts = {tap: jnp.zeros_like(gram) for tap, gram in grams.items()} if run.dense else {}
    weights = run.weights[layer.index].tokens if run.weights else {}

    def weights_of(rows: slice) -> dict[str, Array]:
        return {tap: jax.device_put(weight[rows]) for tap, weight in weights.items()}

    def move_dense(dense: Array, rows: slice) -> Array:
        nonlocal grams, drifts
        x = jax.device_put(run.hidden.array[rows])
        after, grams, drifts = _accumulate_both(
            run.model.layer, layer.params, x, dense, weights_of(rows), grams, drifts
        )
        return after

    if run.dense:
        run.dense.update(move_dense)
    else:
        for rows, x in zip(run.hidden.slices(), run.hidden.batches(), strict=True):
            grams = accumulate(run.model.layer, layer.params, x, weights_of(rows), grams)
    _require_finite(
        grams, f"the activations of layer {layer.index}", "try --dtype float32, or check the calibration text"
    )
    return dataclasses.replace(layer, grams=grams, drifts=drifts)


def solve(run: Run, layer: Layer) -> Layer:
    """Prunes every linear and rounds it to the stored dtype."""
    for tap in run.model.inputs:
        layer = _solve_readers(run, layer, tap)
    kernels = {f"{path}.kernel": layer.params[f"{path}.kernel"] for path in layer.linears}
    _require_finite(
        kernels, f"the pruned weights of layer {layer.index}", "the solve overflowed; try more damping, or more tokens"
    )
    return layer


def _solve_readers(run: Run, layer: Layer, tap: str) -> Layer:
    """Prunes the linears that read a tap; its Gram matrix is let go."""
    params, linears, masks = dict(layer.params), dict(layer.linears), dict(layer.masks)
    gram, drift = layer.grams.pop(tap), layer.drifts.pop(tap, None)
    prepared = run.method.prepare(gram)
    for path in run.model.inputs[tap]:
        pattern, name = run.pattern_of(layer.index, path), f"{path}.kernel"
        outputs = run.weights[layer.index].outputs.get(path) if run.weights else None
        target = None
        if drift is not None:
            target = stats.drifted_target(gram, drift, params[name].astype(gram.dtype), run.asymmetry)
        params[name], mask, linears[path] = solve_linear(
            run.method, prepared, gram, params[name], pattern, outputs, target
        )
        masks[path] = pack(mask)
    return dataclasses.replace(layer, params=params, linears=linears, masks=masks)


def advance(run: Run, layer: Layer) -> Layer:
    """The second pass: the next layer's input, made with the pruned weights as stored."""
    forward(run.model, layer.params, run.hidden)
    return layer


STAGES: Mapping[str, Stage] = {"gram": measure, "solve": solve, "forward": advance}


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
        layer = Layer(index, jax.block_until_ready(jax.device_put(params)), {}, {}, {}, {})
        seconds = {"read": time.perf_counter() - start}
        for name, stage in stages.items():
            start = time.perf_counter()
            layer = stage(run, layer)
            jax.block_until_ready((layer.params, layer.grams))
            seconds[name] = time.perf_counter() - start
        changed = {f"{path}.kernel" for path in layer.linears}
        # Only kernels changed; the rest goes out exactly as it came in.
        out = {p: np.asarray(layer.params[p]) if p in changed else array for p, array in params.items()}
        del params
        result = LayerResult(index, in_checkpoint(index, out), layer.linears, jax.device_get(layer.masks), seconds)
        del layer, out
        behind = index + 1
        done.put(result)
        if done.journal and behind < run.model.config.num_layers:
            done.journal.keep_states(done.stage, behind, _states(run))
        yield result
        del result
        start = time.perf_counter()


def _states(run: Run) -> dict[str, np.ndarray]:
    return {"pruned": run.hidden.array} | ({"dense": run.dense.array} if run.dense else {})


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
    forward(run.model, jax.device_put(inside_layer(index, layer.params)), run.hidden)
    if run.dense:
        (params,) = read_layers(run.model, reader, [index])
        forward(run.model, jax.device_put(params), run.dense)


def linear_shapes(model: Model) -> dict[tuple[int, str], tuple[int, ...]]:
    """(layer index, path of the linear) -> shape [n_in, n_out] of its kernel, for all linears that are pruned."""
    return {(i, path): shape for i in range(model.config.num_layers) for path, shape in model.linears.items()}


def other_params(spec: Spec) -> Iterator[list[str]]:
    """The paths of each part that pruning leaves alone: embedding, final norm, head."""
    return (paths for part, paths in parts(spec).items() if not part.startswith("layers."))


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def accumulate(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    weights: Mapping[str, Float[Array, "b t"]],
    grams: dict[str, Array],
) -> dict[str, Array]:
    _, taps = layer(params, x)
    return {tap: total + stats.gram(taps[tap], weights.get(tap)) for tap, total in grams.items()}


@partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def _accumulate_both(
    layer: Part,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    dense: Float[Array, "b t d"],
    weights: Mapping[str, Float[Array, "b t"]],
    grams: dict[str, Array],
    drifts: dict[str, Array],
) -> tuple[Float[Array, "b t d"], dict[str, Array], dict[str, Array]]:
    """The same for the states behind pruned layers and behind dense ones; the latter move on."""
    (_, taps), (after, dense_taps) = layer(params, x), layer(params, dense)
    grams = {tap: total + stats.gram(taps[tap], weights.get(tap)) for tap, total in grams.items()}
    drifts = {tap: total + stats.drift(taps[tap], dense_taps[tap], weights.get(tap)) for tap, total in drifts.items()}
    return after, grams, drifts


def _require_finite(arrays: Mapping[str, Array], where: str, hint: str) -> None:
    if bad := [name for name, good in jax.device_get(_finite(dict(arrays))).items() if not good]:
        raise InputError(f"{where} hold NaN or infinity in {', '.join(sorted(bad))}: {hint}")


@jax.jit
def _finite(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: jnp.all(jnp.isfinite(array)) for name, array in arrays.items()}
