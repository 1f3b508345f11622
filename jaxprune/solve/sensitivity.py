r"""Measures the sensitivity of the loss to each layer, in one streamed reverse pass.

The pass goes through the dense model over the calibration windows. Let ℓ be the next-token loss
(summed over tokens), g its gradients with respect to the outputs of a linear layer, and X the
layer's inputs. The curvature of the loss in the kernel is about A ⊗ C (K-FAC): A = Xᵀ diag(w) X
with w_t = (Σ_j g²_tj)^p, and C = diag(c) with c_j = Σ_t g²_tj. Only ratios of these numbers matter,
so the scale of the loss is irrelevant.

Layer inputs stay on the host. Each layer runs again under `jax.vjp`, from the last to the first, so
the device holds one layer at a time. Gradients of kernels are not computed. A pass costs three
forward passes (forward, forward again, and the products with the transposed kernels), plus the
head.

References:
    Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
    ICML 2015 (arXiv 1503.05671), for the factors; Kunstner et al. (arXiv 1905.12558), on the
    empirical Fisher matrix, which this is.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape
from jaxtyping import Array, Float, Int

from jaxprune import hardware
from jaxprune.costs.program import PhaseCosts, Program, size_of
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.costs.shapes import Shapes
from jaxprune.errors import InputError
from jaxprune.models import Layer, Part
from jaxprune.models.common.expert_dispatch import Routed
from jaxprune.recipe_parts import Importance
from jaxprune.run_store.store import SENSITIVITY, RunStore, Saved, Stage, flat, grouped
from jaxprune.sharding import fetch
from jaxprune.streaming.head import exponentials, in_chunks, logits, rows_at_a_time
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.sweep import Results

HOST_BYTES = 8e9
"""Maximum memory for the layers' inputs. More windows are split into groups, each of which reads
the model again."""


class Sensitivity(NamedTuple):
    """The sensitivity of one dense layer, summed over all calibration tokens, in float32.

    Programs return the arrays of experts stacked.

    Attributes:
        tokens: captured activation -> [windows, length], Σ_j g²_tj over the outputs j of all linear
            layers that read it. Those of experts are summed.
        outputs: linear layer -> [m], c_j = Σ_t g²_tj.
        inputs: captured activation -> [n], Σ_t x²_ti.
        given: captured activation of an expert -> [1], number of tokens routed to the expert.
        units: captured activation -> [units], Σ_t (Σ_i x_ti ∂ℓ/∂x_ti)² with i over the inputs of a
            unit: the squares of how much the loss would change, to first order, without the unit.
            Only of captured activations of which units were asked for.
    """

    tokens: dict[str, Float[Array | np.ndarray, "w t"]]
    outputs: dict[str, Float[Array | np.ndarray, "*e m"]]
    inputs: dict[str, Float[Array | np.ndarray, "*e n"]]
    given: dict[str, Float[Array | np.ndarray, "*e 1"]]
    units: dict[str, Float[Array | np.ndarray, "*e u"]]


Units = tuple[tuple[str, int], ...]
"""Captures of a layer's program of which units are measured, and how many units each has: groups of
consecutive inputs."""


class Weights(NamedTuple):
    """The weights of tokens and outputs in the solves of one layer, in float32.

    Attributes:
        tokens: captured activation -> w, [windows, length], with mean 1. The Gram matrix is Xᵀ
            diag(w) X. Empty: all are 1.
        outputs: linear layer -> √c, [m], with mean square 1. Empty: all are 1.
    """

    tokens: dict[str, Float[np.ndarray, "w t"]]
    outputs: dict[str, Float[np.ndarray, "m"]]


def weights(layer: Sensitivity, importance: Importance) -> Weights:
    """Returns the normalized weights w_t = (Σ_j g²_tj)^p and √c_j of a layer.

    An output that does not affect the loss, such as one that only feeds dead units, gets a
    millionth of the root mean square. It must not be zero because the solve divides by it.

    Args:
        layer: the sensitivity of the layer.
        importance: which weights to use.
    """

    def normalised(values: np.ndarray, power: float) -> np.ndarray:
        values = values.astype(np.float64)
        mean = values.mean()
        if mean == 0:
            return np.ones(values.shape, np.float32)
        values = np.maximum(values / mean, 1e-12) ** power
        return (values / values.mean()).astype(np.float32)

    power = importance.token_power
    tokens = (
        {capture: normalised(energy, power) for capture, energy in layer.tokens.items()}
        if power
        else {}
    )
    outputs = layer.outputs if importance.weigh_outputs else {}
    return Weights(
        tokens, {path: np.sqrt(normalised(energy, 1.0)) for path, energy in outputs.items()}
    )


def evenly_spaced(tokens: Int[np.ndarray, "w t"], count: int) -> Int[np.ndarray, "some t"]:
    """Returns some windows, evenly spaced; all of them if there are fewer."""
    count = min(count, len(tokens))
    return tokens[np.arange(count) * len(tokens) // count]


def measure_sensitivity(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    *,
    store: RunStore | None = None,
    units: Sequence[Units] | None = None,
    name: str = SENSITIVITY,
) -> list[Sensitivity]:
    """Measures the sensitivities of all layers, in order.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        store: where sensitivities are saved and looked up; None: nothing is saved.
        units: the units of each layer that are measured; None: none.
        name: the name of the stage in the store.

    Raises:
        InputError: model and tokens do not fit together, or a gradient of the loss is not finite.
    """
    of_layers = units or [()] * model.num_layers
    each = [
        _reverse(model, tokens[rows], of_layers, _saved(store, f"{name}/{rows.start}-{rows.stop}"))
        for rows in _groups(model, tokens)
    ]
    if store:
        store.wait()
    return [_of_windows(layer) for layer in zip(*each, strict=True)]


def _of_windows(parts: Sequence[Sensitivity]) -> Sensitivity:
    """Returns a layer's sensitivity over the windows of all parts."""
    tokens = {
        capture: np.concatenate([part.tokens[capture] for part in parts])
        for capture in parts[0].tokens
    }
    return Sensitivity(
        tokens, *jax.tree.map(lambda *arrays: sum(arrays), *(part[1:] for part in parts))
    )


def tokens_per_batch(forward: int | None = None) -> int:
    """Returns the number of tokens on the device at a time in the reverse pass.

    It is a quarter of the forward pass's, because a vjp takes about four times the memory.

    Args:
        forward: the number in a forward pass; None: the device's default.
    """
    return max(1, (forward or hardware.current().tokens_per_batch) // 4)


def _groups(model: StreamedModel, tokens: Int[np.ndarray, "w t"]) -> Iterator[slice]:
    """Yields groups of windows whose layer inputs fit `HOST_BYTES`, at least one window each.

    With a scratch folder on disk, all windows form one group.
    """
    window = (model.num_layers + 1) * tokens.shape[1] * model.architecture.state_bytes
    count = len(tokens) if model.scratch else max(1, int(min(len(tokens), HOST_BYTES / window)))
    return (slice(start, min(start + count, len(tokens))) for start in range(0, len(tokens), count))


def _reverse(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    units: Sequence[Units],
    saved: Results[Sensitivity],
) -> list[Sensitivity]:
    """Returns the sensitivities of all layers for some tokens; saved ones are reused."""
    count = model.num_layers
    found = {index: one for index in range(count) if (one := saved.get(index))}
    missing = [index for index in reversed(range(count)) if index not in found]
    if not missing:
        return [found[index] for index in range(count)]
    top, gradient = _saved_gradient(model, tokens, saved, missing[0])
    inputs: list[HiddenStates] = []
    (states,) = model.final_states(
        tokens,
        layers=top,
        at_a_time=tokens_per_batch(),
        visit=lambda index, states: inputs.append(states[0].copy()),
    )
    if gradient:
        states = gradient
    else:
        _differentiate_loss(model, states, tokens)
    order = range(top)[::-1]
    for index, params in zip(order, model.layers(order), strict=True):
        layer = _reverse_layer(
            model, index, model.put_layer(index, params), inputs.pop(), states, units[index]
        )
        _require_finite(layer)
        if index not in found:
            saved.put(index, layer)
            saved.put_states({"gradient": states}, index)
        found[index] = layer
    return [found[index] for index in range(count)]


def _saved_gradient(
    model: StreamedModel, tokens: Int[np.ndarray, "w t"], saved: Results[Sensitivity], missing: int
) -> tuple[int, HiddenStates | None]:
    """Returns the number of layers below the saved gradient, and the gradient.

    Without a usable one, returns the number of all layers, and None.

    Args:
        model, tokens, saved: as for `_reverse`.
        missing: index of the last layer whose sensitivity is missing.
    """
    found = saved.states(
        lambda position: missing < position,
        lambda: {"gradient": model.embed(tokens, at_a_time=tokens_per_batch())},
    )
    return (found[0], found[1]["gradient"]) if found else (model.num_layers, None)


def _saved(store: RunStore | None, name: str) -> Results[Sensitivity]:
    """Returns the saved sensitivities of a stage."""
    if store is None:
        return Results()

    def load(_: int, saved: Saved) -> Sensitivity:
        groups = grouped(saved.arrays)
        return Sensitivity(*(groups[kind] for kind in Sensitivity._fields))

    return Stage(store, name, lambda layer: Saved(flat(**layer._asdict()), {}), load)


def _differentiate_loss(
    model: StreamedModel, states: HiddenStates, tokens: Int[np.ndarray, "w t"]
) -> None:
    """Replaces the last layer's output with the gradient of the loss with respect to it."""
    head = model.params_of(model.architecture.head, cast=True)
    step = partial(loss_gradient, model.architecture.head, head)
    for rows in states.slices():
        last, targets = states.read(rows), tokens[rows, 1:].reshape(-1).astype(np.int32)
        predicting = last[:, :-1].reshape(len(targets), -1)
        (gradient,) = in_chunks(model.devices, step, predicting, targets)
        gradients = np.zeros_like(last)  # the last token predicts nothing
        gradients[:, :-1] = gradient.reshape(last[:, :-1].shape)
        states.write(rows, gradients)


def _reverse_layer(
    model: StreamedModel,
    index: int,
    params: Mapping[str, Array],
    inputs: HiddenStates,
    gradients: HiddenStates,
    units: Units,
) -> Sensitivity:
    """Moves the gradients from one layer's output to its input."""
    layer = model.architecture.layers[index]
    batches: list[Sensitivity] = []

    def step(gradient: Array, rows: slice) -> Array:
        before, sensitivity = backward(layer, units, params, inputs.batch(rows), gradient)
        batches.append(sensitivity)
        return before

    gradients.update(step)
    found = _of_windows(fetch(batches))
    return Sensitivity(found.tokens, *(layer.apart(arrays) for arrays in found[1:]))


def _require_finite(layer: Sensitivity) -> None:
    if not all(np.isfinite(array).all() for part in layer for array in part.values()):
        raise InputError(
            "gradients of the loss are NaN or infinite: the calibration text is unusual or the "
            "dtype too narrow",
            options={"dtype": "float32"},
        )


@partial(jax.jit, static_argnums=0)
def loss_gradient(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], targets: Int[Array, "n"]
) -> tuple[Float[Array, "n d"]]:
    """Returns the gradient of Σ −log softmax(logits)[target] with respect to the states.

    With respect to the logits it is softmax(logits) − onehot(target).
    """
    scores, vjp = jax.vjp(lambda states: logits(head, params, states), states)
    exponential = exponentials(scores)
    wanted = jnp.arange(scores.shape[1], dtype=targets.dtype)[None, :] == targets[:, None]
    return vjp(exponential.values / exponential.total - wanted.astype(scores.dtype))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def backward(
    layer: Layer,
    units: Units,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    gradient: Float[Array, "b t d"],
) -> tuple[Float[Array, "b t d"], Sensitivity]:
    """Returns the gradient with respect to the layer's input, and the batch's sensitivity."""
    captured = jax.eval_shape(lambda params, x: layer(params, x)[1], params, x)
    probes = {
        path: jnp.zeros((*_rows(captured[capture]).shape[:-1], layer.linears[path][-1]), x.dtype)
        for capture, paths in layer.reads.items()
        for path in paths
    }
    of_inputs = {
        path: jnp.zeros(_rows(captured[capture]).shape, x.dtype)
        for capture, _ in units
        for path in layer.reads[capture]
    }
    _, vjp, captures = jax.vjp(
        lambda x, probes, of_inputs: layer(params, x, probes=probes, input_probes=of_inputs),
        x,
        probes,
        of_inputs,
        has_aux=True,
    )
    before, outputs, of_inputs = vjp(gradient)
    squares = {path: jnp.square(g.astype(jnp.float32)) for path, g in outputs.items()}
    found, asked = Sensitivity({}, {}, {}, {}, {}), dict(units)
    for capture, paths in layer.reads.items():
        inputs = jnp.square(_rows(captures[capture]).astype(jnp.float32))
        energy = sum(jnp.sum(squares[path], axis=-1) for path in paths)
        changes = None
        if count := asked.get(capture):
            slopes = sum(of_inputs[path].astype(jnp.float32) for path in paths)
            changes = _rows(captures[capture]).astype(jnp.float32) * slopes
            changes = changes.reshape(*changes.shape[:2], count, -1)
            changes = jnp.square(jnp.sum(changes, axis=-1))
        if isinstance(captures[capture], Routed):
            found.tokens[capture] = captures[capture].sum_of_slots(energy).reshape(x.shape[:2])
            by_expert = partial(captures[capture].by_expert, experts=layer.experts[paths[0]])
            found.outputs.update(
                {path: by_expert(jnp.sum(squares[path], axis=1)) for path in paths}
            )
            found.inputs[capture], found.given[capture] = (
                by_expert(jnp.sum(inputs, axis=1)),
                by_expert(captures[capture].filled()),
            )
            if changes is not None:
                found.units[capture] = by_expert(jnp.sum(changes, axis=1))
        else:
            found.tokens[capture], found.inputs[capture] = energy, jnp.sum(inputs, axis=(0, 1))
            found.outputs.update({path: jnp.sum(squares[path], axis=(0, 1)) for path in paths})
            if changes is not None:
                found.units[capture] = jnp.sum(changes, axis=(0, 1))
    return before, found


def costs(run: RunSizes) -> PhaseCosts:
    """Returns what measuring sensitivities costs."""
    some = run.sensitivity_windows
    every = programs(run.pruned, some, run.length)
    kept, moved = states_and_transfers(run, some)
    return PhaseCosts(every, kept, {"sensitivity": moved}, token_bytes(run))


def states_and_transfers(run: RunSizes, windows: int) -> tuple[int, float]:
    """Returns the bytes of a reverse pass's hidden states on the host, and how many bytes it moves
    to the devices and back."""
    layers, states = len(run.architecture.layers), run.states_bytes(windows)
    inputs = (layers + 1) * states
    kept = 2 * states + (inputs if run.scratch else min(int(HOST_BYTES), inputs))
    # forward, then back: inputs and gradients up, gradients down
    return kept, 2 * run.devices.count * run.stored_bytes("layers.") + 5 * layers * states


def token_bytes(run: RunSizes) -> int:
    """Returns the bytes of `Sensitivity.tokens` of all layers."""
    captures = sum(len(layer.reads) for layer in run.architecture.layers)
    return 4 * captures * run.sensitivity_windows * run.length


def programs(
    shapes: Shapes,
    windows: int,
    length: int,
    *,
    units: Callable[[Layer], Units] = lambda _: (),
    phase: str = "sensitivity",
) -> Iterator[Program]:
    """Yields the programs of the reverse pass over some windows.

    Args:
        shapes: the shapes of the run.
        windows: the number of windows.
        length: tokens of a window.
        units: layer -> the units that are measured.
        phase: the phase that the pass belongs to.
    """
    x = shapes.batch(windows, length, tokens_per_batch(shapes.tokens))
    for layer, count in shapes.layers.items():
        forward = shapes.forward(phase, layer, x, count * windows)
        yield forward
        arguments = forward.arguments[0], x, x
        function = partial(backward, layer, units(layer))
        yield dataclasses.replace(forward, name="backward", function=function, arguments=arguments)
    head, tokens = shapes.architecture.head, windows * (length - 1)
    chunk = rows_at_a_time(x.shape[0] * (length - 1), devices=shapes.devices.count)
    states, targets = shapes.rows(chunk), Shape((chunk,), jnp.int32)
    arguments = shapes.params(head.spec), states, targets
    resident = 2 * size_of(states)
    loss = partial(loss_gradient, head)
    yield Program(phase, "loss", loss, arguments, tokens / chunk, resident)


def _rows(capture: Any) -> Any:
    return capture.x if isinstance(capture, Routed) else capture
