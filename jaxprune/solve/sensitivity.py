r"""What matters to the model's loss: one streamed reverse pass of the dense model over the
calibration windows.

With g the gradients of the next-token loss ℓ (summed over tokens) by the outputs of a linear, X its
inputs, the curvature of the loss in its kernel is about A ⊗ C (K-FAC): A = Xᵀ diag(w) X with w_t =
(Σ_j g²_tj)^p, and C = diag(c) with c_j = Σ_t g²_tj. Only ratios of these numbers are used, so the
scale of the loss does not matter.

Layer inputs are kept on the host, and each layer is run again under `jax.vjp`, from the last to the
first, so that the device holds one layer, as in the forward direction. Gradients of kernels are not
needed: a pass costs three forward passes (forward, forward again, and the products with the
transposed kernels) and the head's.

References:
    Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
    ICML 2015 (arXiv 1503.05671), for the factors; Kunstner et al. (arXiv 1905.12558), on the
    empirical Fisher matrix, which this is.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune import hardware
from jaxprune.errors import InputError
from jaxprune.models import Layer, Part
from jaxprune.models.common.expert_dispatch import Routed
from jaxprune.recipe_parts import Importance
from jaxprune.run_store.store import SENSITIVITY, RunStore, Saved, Stage, flat, grouped
from jaxprune.sharding import fetch
from jaxprune.streaming.head import exponentials, in_chunks, logits
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.sweep import Results

HOST_BYTES = 8e9
"""The most memory for the layers' inputs; more windows are taken in groups, each of which reads the
model again."""


class Sensitivity(NamedTuple):
    """Of one layer of the dense model, over all calibration tokens. float32.

    In a program's result experts' are stacked.

    Attributes:
        tokens: tap -> [windows, length], Σ_j g²_tj over the outputs j of all linear layers that
            read the tap; those of experts together.
        outputs: linear -> [m], c_j = Σ_t g²_tj.
        inputs: tap -> [n], Σ_t x²_ti.
        given: tap of an expert -> [1], how many tokens it was given.
    """

    tokens: dict[str, Float[Array | np.ndarray, "w t"]]
    outputs: dict[str, Float[Array | np.ndarray, "*e m"]]
    inputs: dict[str, Float[Array | np.ndarray, "*e n"]]
    given: dict[str, Float[Array | np.ndarray, "*e 1"]]


class Weights(NamedTuple):
    """What the solves of one layer weigh. float32.

    Attributes:
        tokens: tap -> w, [windows, length], of mean 1; its Gram matrix is Xᵀ diag(w) X. Empty: all
            are 1.
        outputs: linear -> √c, [m], of mean square 1. Empty: all are 1.
    """

    tokens: dict[str, Float[np.ndarray, "w t"]]
    outputs: dict[str, Float[np.ndarray, "m"]]


def weights(layer: Sensitivity, importance: Importance) -> Weights:
    """Returns the weights that sensitivities give: w_t = (Σ_j g²_tj)^p and √c_j, normalised.

    An output that the loss does not depend on, such as one that only feeds dead units, gets a
    millionth of the root mean square, not zero: its kernel's column is divided by its weight again.

    Args:
        layer: its sensitivity.
        importance: what to weigh.
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
        {tap: normalised(energy, power) for tap, energy in layer.tokens.items()} if power else {}
    )
    outputs = layer.outputs if importance.weigh_outputs else {}
    return Weights(
        tokens, {path: np.sqrt(normalised(energy, 1.0)) for path, energy in outputs.items()}
    )


def measure_sensitivity(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    *,
    store: RunStore | None = None,
) -> list[Sensitivity]:
    """Measures the sensitivities of all layers, in order.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        store: where each layer's is saved, and taken from where it is saved already; None: nothing
            is saved.

    Raises:
        InputError: model and tokens do not fit together, or the loss has no finite gradient.
    """
    each = [
        _reverse(model, tokens[rows], _saved(store, f"{rows.start}-{rows.stop}"))
        for rows in _groups(model, tokens)
    ]
    if store:
        store.wait()
    return [_of_windows(layer) for layer in zip(*each, strict=True)]


def _of_windows(parts: Sequence[Sensitivity]) -> Sensitivity:
    """Returns a layer's sensitivity over the windows of all parts."""
    tokens = {tap: np.concatenate([part.tokens[tap] for part in parts]) for tap in parts[0].tokens}
    return Sensitivity(
        tokens, *jax.tree.map(lambda *arrays: sum(arrays), *(part[1:] for part in parts))
    )


def tokens_per_batch(forward: int | None = None) -> int:
    """Returns how many tokens are on the device at a time: a vjp holds about four times what a
    forward pass holds.

    Args:
        forward: as many in a forward pass; None: what suits the device.
    """
    return max(1, (forward or hardware.current().tokens_per_batch) // 4)


def _groups(model: StreamedModel, tokens: Int[np.ndarray, "w t"]) -> Iterator[slice]:
    """Yields the rows whose inputs of all layers fit `HOST_BYTES` together, one at least; on a
    disk, all."""
    window = (model.num_layers + 1) * tokens.shape[1] * model.architecture.state_bytes
    count = len(tokens) if model.scratch else max(1, int(min(len(tokens), HOST_BYTES / window)))
    return (slice(start, min(start + count, len(tokens))) for start in range(0, len(tokens), count))


def _reverse(
    model: StreamedModel, tokens: Int[np.ndarray, "w t"], saved: Results[Sensitivity]
) -> list[Sensitivity]:
    """Returns the sensitivities of all layers for some tokens; those that are saved already are
    taken as they are."""
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
        layer = _reverse_layer(model, index, model.put_layer(index, params), inputs.pop(), states)
        _require_finite(layer)
        if index not in found:
            saved.put(index, layer)
            saved.put_states({"gradient": states}, index)
        found[index] = layer
    return [found[index] for index in range(count)]


def _saved_gradient(
    model: StreamedModel, tokens: Int[np.ndarray, "w t"], saved: Results[Sensitivity], missing: int
) -> tuple[int, HiddenStates | None]:
    """Returns the number of layers below the saved gradient, and it; all layers and None where none
    is of use.

    Args:
        model, tokens, saved: as for `_reverse`.
        missing: index of the last layer whose sensitivity is missing.
    """
    found = saved.states(
        lambda position: missing < position,
        lambda: {"gradient": model.embed(tokens, at_a_time=tokens_per_batch())},
    )
    return (found[0], found[1]["gradient"]) if found else (model.num_layers, None)


def _saved(store: RunStore | None, windows: str) -> Results[Sensitivity]:
    """Returns where the sensitivities for some windows are saved."""
    if store is None:
        return Results()

    def load(_: int, saved: Saved) -> Sensitivity:
        groups = grouped(saved.arrays)
        return Sensitivity(*(groups[kind] for kind in Sensitivity._fields))

    name = f"{SENSITIVITY}/{windows}"
    return Stage(store, name, lambda layer: Saved(flat(**layer._asdict()), {}), load)


def _differentiate_loss(
    model: StreamedModel, states: HiddenStates, tokens: Int[np.ndarray, "w t"]
) -> None:
    """Replaces the last layer's output by the gradient of the loss by it."""
    head = model.params_of(model.architecture.head, cast=True)
    step = partial(loss_gradient, model.architecture.head, head)
    for rows in states.slices():
        last, targets = states.read(rows), tokens[rows, 1:].reshape(-1).astype(np.int32)
        predicting = last[:, :-1].reshape(len(targets), -1)
        (gradient,) = in_chunks(model.devices, step, predicting, targets)
        gradients = np.zeros_like(last)  # nothing follows the last token
        gradients[:, :-1] = gradient.reshape(last[:, :-1].shape)
        states.write(rows, gradients)


def _reverse_layer(
    model: StreamedModel,
    index: int,
    params: Mapping[str, Array],
    inputs: HiddenStates,
    gradients: HiddenStates,
) -> Sensitivity:
    """Moves the gradients through one layer, from its output to its input."""
    layer = model.architecture.layers[index]
    batches: list[Sensitivity] = []

    def step(gradient: Array, rows: slice) -> Array:
        before, sensitivity = backward(layer, params, inputs.batch(rows), gradient)
        batches.append(sensitivity)
        return before

    gradients.update(step)
    found = _of_windows(fetch(batches))
    return Sensitivity(found.tokens, *(layer.apart(arrays) for arrays in found[1:]))


def _require_finite(layer: Sensitivity) -> None:
    if not all(np.isfinite(array).all() for part in layer for array in part.values()):
        raise InputError(
            "the gradients of the loss hold NaN or infinity, by odd calibration text or too narrow "
            "a dtype",
            options={"dtype": "float32"},
        )


@partial(jax.jit, static_argnums=0)
def loss_gradient(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], targets: Int[Array, "n"]
) -> tuple[Float[Array, "n d"]]:
    """Returns the gradient of Σ −log softmax(scores)[target]: by the scores, softmax(scores) less
    one at the target."""
    scores, vjp = jax.vjp(lambda states: logits(head, params, states), states)
    exponential = exponentials(scores)
    wanted = jnp.arange(scores.shape[1], dtype=targets.dtype)[None, :] == targets[:, None]
    return vjp(exponential.values / exponential.total - wanted.astype(scores.dtype))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def backward(
    layer: Layer,
    params: Mapping[str, Array],
    x: Float[Array, "b t d"],
    gradient: Float[Array, "b t d"],
) -> tuple[Float[Array, "b t d"], Sensitivity]:
    """Returns the gradient by the layer's input, and the batch's sensitivity (its arrays on the
    device)."""
    tapped = jax.eval_shape(lambda params, x: layer(params, x)[1], params, x)
    probes = {
        path: jnp.zeros((*_rows(tapped[tap]).shape[:-1], layer.linears[path][-1]), x.dtype)
        for tap, paths in layer.reads.items()
        for path in paths
    }
    _, vjp, taps = jax.vjp(
        lambda x, probes: layer(params, x, probes=probes), x, probes, has_aux=True
    )
    before, outputs = vjp(gradient)
    squares = {path: jnp.square(g.astype(jnp.float32)) for path, g in outputs.items()}
    found = Sensitivity({}, {}, {}, {})
    for tap, paths in layer.reads.items():
        inputs = jnp.square(_rows(taps[tap]).astype(jnp.float32))
        energy = sum(jnp.sum(squares[path], axis=-1) for path in paths)
        if isinstance(taps[tap], Routed):
            found.tokens[tap] = taps[tap].sum_of_rows(energy).reshape(x.shape[:2])
            by_expert = partial(taps[tap].by_expert, experts=layer.experts[paths[0]])
            found.outputs.update(
                {path: by_expert(jnp.sum(squares[path], axis=1)) for path in paths}
            )
            found.inputs[tap], found.given[tap] = (
                by_expert(jnp.sum(inputs, axis=1)),
                by_expert(taps[tap].filled()),
            )
        else:
            found.tokens[tap], found.inputs[tap] = energy, jnp.sum(inputs, axis=(0, 1))
            found.outputs.update({path: jnp.sum(squares[path], axis=(0, 1)) for path in paths})
    return before, found


def _rows(tap: Any) -> Any:
    return tap.x if isinstance(tap, Routed) else tap
