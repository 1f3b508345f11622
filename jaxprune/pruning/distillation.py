r"""Tuning of the kept weights against the dense model's predictions, end to end, masks fixed.

Layer by layer, pruning keeps each linear's own output; what remains is an error that grows through the depth of the
model. Here the kept weights of all linears are tuned together by Adam to minimise, over the calibration tokens, the
mean of

    KL(p‖q) = Σ_v p_v (log p_v − log q_v),

p and q the next-token distributions of the dense and of the pruned model. Norms, embedding and head stay.

The model streams as in pruning: a step's forward pass keeps each layer's input on the host; on the way back each layer
is run again under `jax.vjp` and updated at once. The device holds one layer with its gradients and moments; the host
holds 12 bytes a pruned weight (the weight and Adam's two moments, float32). An epoch costs four forward passes and
three products with the head. Where a step's intermediate results of all layers fit the device they stay there, which
saves the second of the four; so does the kernels' state, where that fits.

References:
    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), for the loss.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, DTypeLike, Float, Int

from convert import Params, Reader
from jaxprune import sharding as devices
from jaxprune.errors import Change, InputError
from jaxprune.models import Model, Part, model_for
from jaxprune.pruning import adam
from jaxprune.pruning.adam import Kernels, Saved
from jaxprune.pruning.journal import Journal
from jaxprune.pruning.results import LayerResult
from jaxprune.streaming.stream import (
    apply,
    apply_layer,
    embed,
    exponentials,
    forward,
    in_checkpoint,
    in_chunks,
    inside_layer,
    kl_divergence,
    logits,
    read_layers,
    ready,
)

CPU_BYTES = 4e9
"""The most memory for a step's intermediate results where the device is the CPU."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kept weights are tuned; no epochs, no tuning."""

    tune_epochs: float = 0.0
    """Tune the kept weights of all linears together against the dense model's predictions, visiting each calibration
    window so many times; half an epoch visits half of them. Takes 12 bytes of host memory a weight."""
    tune_rate: float = 0.001
    """Adam's highest learning rate, in units of the root mean square of a kernel's kept weights; it rises over the
    first eighth of the steps and then falls along a cosine."""
    tune_windows: int = 1
    """Calibration windows a step."""

    def __post_init__(self) -> None:
        if not 0 <= self.tune_epochs < math.inf:
            raise InputError(f"tune_epochs must be finite and not negative, not {self.tune_epochs}")
        if not 0 < self.tune_rate < math.inf:
            raise InputError(f"tune_rate must be finite and positive, not {self.tune_rate}")
        if self.tune_windows < 1:
            raise InputError(f"tune_windows must be at least 1, not {self.tune_windows}")


class Plan(NamedTuple):
    """What stays on the device.

    Attributes:
        hold: takes updated kernels to where they stay.
        keep: whether a step's intermediate results stay; else layers are run again on the way back.
    """

    hold: Callable[[Kernels], Kernels]
    keep: bool


class Ends(NamedTuple):
    """Params of the embedding and of the head, on the device."""

    embed: Mapping[str, Array]
    head: Mapping[str, Array]


def tune(
    reader: Reader,
    tokens: Int[np.ndarray, "w t"],
    layers: Iterable[LayerResult],
    tuning: Tuning,
    *,
    seed: int = 0,
    dtype: DTypeLike | None = None,
    report: Callable[[int, float], None] = lambda epoch, divergence: None,
    journal: Journal | None = None,
) -> Iterator[LayerResult]:
    """Tunes pruned layers. Masks stay; so do the figures of the linears, which are those of their solves.

    Args:
        reader: the dense checkpoint.
        tokens: calibration windows, [windows, length] token ids.
        layers: all layers, as `pipeline.prune` gives them; each is let go when it is taken up.
        tuning: how.
        seed: of the order of windows.
        dtype: of the model's computation; see `models.model_for`.
        report: is told after each epoch its number, from 0, and the mean KL divergence, in nats, of its windows before
            their steps.
        journal: where the state is kept now and then, and taken from where it is kept already; None: nothing is kept.

    Raises:
        InputError: the loss is not finite.
    """
    model = model_for(reader, dtype)
    batches = _batches(tokens, tuning, seed)
    names = [f"{path}.kernel" for path in model.linears]
    plan = _plan(model, (len(batches[0]), tokens.shape[1]))
    results, state, rest, dtypes = [], [], [], {}
    for result in layers:
        params = inside_layer(result.index, result.params)
        kernels = {name: params.pop(name) for name in names}
        dtypes = {name: kernel.dtype for name, kernel in kernels.items()}
        results.append(dataclasses.replace(result, params={}))
        state.append(plan.hold(adam.start(kernels)))
        rest.append(params)
    visited, where = np.unique(np.concatenate(batches), return_inverse=True)
    dense = embed(model, reader, tokens[visited])
    for params in read_layers(model, reader):
        forward(model, devices.everywhere(params), dense)
    ends = Ends(*(ready(model, reader.read(part.spec)) for part in (model.embed, model.head)))

    steps = len(batches)
    rate = optax.warmup_cosine_decay_schedule(
        tuning.tune_rate / 10, tuning.tune_rate, min(math.ceil(steps / 8), steps - 1), steps, tuning.tune_rate / 20
    )
    saved = Saved(journal, len(state))
    begin, divergences = saved.restore(state, plan.hold)
    for step, rows in enumerate(where.reshape(steps, -1)):
        if step < begin:
            continue
        chosen = tokens[visited[rows]], dense.read(rows)
        divergences.append(_step(model, plan, ends, rest, state, *chosen, jnp.float32(rate(step))))
        epoch, within = divmod(step * len(rows), len(tokens))
        if within + len(rows) == len(tokens) or step == steps - 1:
            report(epoch, float(np.mean(divergences)))
            divergences.clear()
        saved.keep(step + 1, state, divergences)
    for result, params, tuned in zip(results, rest, state, strict=True):
        rounded = {name: devices.fetch(adam.rounded(tuned, name, dtypes[name])) for name in names}
        yield dataclasses.replace(result, params=in_checkpoint(result.index, params | rounded))


def _batches(tokens: Int[np.ndarray, "w t"], tuning: Tuning, seed: int) -> list[Int[np.ndarray, "b"]]:
    """The windows of each step: every epoch visits all, in a new order, and the last may end early."""
    windows = len(tokens)
    count = max(c for c in range(1, min(tuning.tune_windows, windows) + 1) if windows % c == 0)
    steps = max(1, round(tuning.tune_epochs * windows / count))
    generator = np.random.default_rng(seed)
    epochs = [generator.permutation(windows).reshape(-1, count) for _ in range(math.ceil(steps * count / windows))]
    return list(np.concatenate(epochs)[:steps])


def _plan(model: Model, window: tuple[int, int]) -> Plan:
    """What fits the device: kernels may fill half of what is free, and intermediate results a quarter.

    Args:
        model: to be tuned.
        window: windows of a step, and their length.
    """
    layers = model.config.num_layers
    values = {f"{path}.kernel": jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in model.linears.items()}
    rest = {name: shape for name, shape in model.layer.spec.items() if name not in values}
    x = jax.ShapeDtypeStruct((*window, model.width), model.config.dtype)
    _, pull_back = jax.eval_shape(partial(forward_with_way_back, model.layer), values, rest, x)
    kept = layers * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return Plan(devices.by_outputs, kept < CPU_BYTES)
    memory = device.memory_stats() or {}
    free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
    weights = layers * sum(value.size for value in values.values())
    return Plan(devices.by_outputs if 12 * weights / devices.number() < free / 2 else devices.fetch, kept < free / 4)


def _step(
    model: Model,
    plan: Plan,
    ends: Ends,
    rest: Sequence[Params],
    state: list[Kernels],
    tokens: Int[np.ndarray, "b t"],
    dense: Float[np.ndarray, "b t d"],
    rate: Float[Array, ""],
) -> float:
    """Updates the state by some windows; returns their mean divergence, before."""
    x = apply(model.embed, ends.embed, devices.by_windows(tokens))
    ways_back: list[Any] = []
    for kernels, others in zip(state, rest, strict=True):
        if plan.keep:
            x, way_back = forward_with_way_back(model.layer, kernels.values, others, x)
        else:
            way_back = np.array(devices.fetch(x))  # a copy, for x is donated
            x = apply_layer(model.layer, others | kernels.values, x)
        ways_back.append(way_back)
    states = devices.fetch(x).reshape(-1, x.shape[-1])
    divergence, gradient = in_chunks(
        lambda *chunk: head_divergence(model.head, ends.head, *chunk), states, dense.reshape(states.shape), models=2
    )
    if not np.isfinite(divergence).all():
        raise InputError(
            "the loss of the tuning holds NaN or infinity", options={"tune_rate": Change.LOWER, "dtype": "float32"}
        )
    back = devices.by_windows(gradient.reshape(x.shape))
    for index in reversed(range(len(state))):
        back, updated = update(model.layer, state[index], rest[index], ways_back.pop(), back, rate)
        state[index] = plan.hold(updated)
    return float(divergence.mean(dtype=np.float64))


@partial(jax.jit, static_argnums=0)
def head_divergence(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], dense: Float[Array, "n d"]
) -> tuple[Float[Array, "n"], Float[Array, "n d"]]:
    """KL divergences of tokens, and the gradient of their sum by the pruned model's last states."""
    scores, pull_back = jax.vjp(lambda states: logits(head, params, states), states)
    p, q = exponentials(logits(head, params, dense)), exponentials(scores)
    (gradient,) = pull_back(q.values / q.total - p.values / p.total)
    return kl_divergence(p, q), gradient


@partial(jax.jit, static_argnums=0)
def forward_with_way_back(
    part: Part, values: Mapping[str, Array], rest: Mapping[str, Array], x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], Any]:
    """A layer's output, and the function from its gradient to those by the kernels and by the input."""
    return jax.vjp(lambda values, x: part({**rest, **values}, x)[0], dict(values), x)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(
    part: Part,
    kernels: Kernels,
    rest: Mapping[str, Array],
    way_back: Any,
    gradient: Float[Array, "b t d"],
    rate: Float[Array, ""],
) -> tuple[Float[Array, "b t d"], Kernels]:
    """The gradient by the layer's input, and the kernels after a step of Adam.

    Args:
        part: the layer.
        kernels: before the step.
        rest: the layer's other params.
        way_back: from `forward_with_way_back`, or the layer's input.
        gradient: by the layer's output.
        rate: of the step.
    """
    pull_back = way_back if callable(way_back) else forward_with_way_back(part, kernels.values, rest, way_back)[1]
    slopes, back = pull_back(gradient)
    return back, adam.step(kernels, slopes, rate)
