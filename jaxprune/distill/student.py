"""The pruned model while it is tuned towards the dense one: a step, and how far it still is.

The model streams as in pruning: a step's forward pass keeps each layer's input on the host; from
the last layer to the first, each is run again under `jax.vjp` and updated at once. The kernels, 2
bytes a pruned weight in 16 bits, stay on the device where they fit; else the host holds them, and
the device one layer's with its gradients, the one that comes next, and the one that goes. So do a
step's intermediate results of all layers, which saves a second forward pass.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from convert import Params
from jaxprune.distill import adafactor, gradual_pruning
from jaxprune.distill.adafactor import Kernels, Moving
from jaxprune.distill.gradual_pruning import LateZeros, Selectors
from jaxprune.distill.layer_vjp import forward_and_vjp, pull_back
from jaxprune.distill.placement import Placement
from jaxprune.errors import Change, InputError
from jaxprune.models import Part
from jaxprune.sharding import fetch
from jaxprune.solve.layer_result import LayerResult
from jaxprune.streaming.head import exponentials, in_chunks, kl_divergence, logits
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel, apply, apply_layer, in_checkpoint, inside_layer


class Student:
    """A pruned model whose kernels move.

    Args:
        model: what was pruned.
        layers: all layers, as `loop.prune_layers` gives them; each is let go when it is taken up.
        placement: what stays on the device.
        late: zeros that come late; None: none do.

    Attributes:
        state: of each layer, on the device where it fits.
    """

    def __init__(
        self,
        model: StreamedModel,
        layers: Iterable[LayerResult],
        placement: Placement,
        late: LateZeros | None = None,
    ) -> None:
        architecture = model.architecture
        self._model, self._placement = model, placement
        self._results: list[LayerResult] = []
        # what is not tuned, on the device where the state stays
        self._rest: list[dict[str, Any]] = []
        self._dtypes: list[dict[str, np.dtype]] = []
        self._late, self._zeros_to_come = late, False
        self._selectors: list[Selectors] = []  # where zeros come late
        self.state: list[Kernels] = []
        for result in layers:
            layer = architecture.layers[result.index]
            own = inside_layer(result.index, result.params)
            params = layer.stack(own)
            experts: dict[str, list[int | None]] = {}  # others stay dense
            for path in result.masks:
                experts.setdefault(f"{layer.sources[path].name}.kernel", []).append(
                    layer.sources[path].expert
                )
            kernels = {name: params.pop(name) for name in experts}
            # Experts that stay dense go with their stack, in the computation's dtype, but are
            # stored as they were.
            dense = layer.unstack(kernels).keys() - {f"{path}.kernel" for path in result.masks}
            beside = in_checkpoint(result.index, {path: own[path] for path in dense})
            self._results.append(dataclasses.replace(result, params=beside))
            self._rest.append(model.devices.replicate(params) if placement.state else params)
            self._dtypes.append({name: kernel.dtype for name, kernel in kernels.items()})
            if late:
                self._selectors.append(late.selectors(layer, result))
            self.state.append(self.place(adafactor.init(kernels, model.dtype, experts)))
        self._embed, self._head = (
            model.params_of(part, cast=True) for part in (architecture.embed, architecture.head)
        )

    def place(self, kernels: Kernels) -> Kernels:
        """Puts a layer's kernels to where they stay between steps."""
        return (
            self._model.devices.shard_outputs(kernels)
            if self._placement.state
            else _on_host(kernels)
        )

    def restore(self, index: int, moving: dict[str, Moving], masks: Mapping[str, Any]) -> None:
        """Takes up what steps changed of a layer before, and the bits of its masks."""
        units = {name: fetch(one.unit) for name, one in self.state[index].fixed.items()}
        fixed = {
            name: adafactor.with_mask(unit, masks[name], moving[name].value)
            for name, unit in units.items()
        }
        self.state[index] = self.place(Kernels(moving, fixed))

    def step(
        self,
        tokens: Int[np.ndarray, "b t"],
        dense: Float[np.ndarray, "b t d"],
        number: int,
        rate: Callable[[float], float],
    ) -> float:
        """Moves the kernels by some windows; returns their mean divergence, before.

        Args:
            tokens: the windows.
            dense: the dense model's last hidden states of them.
            number: the number of the step, from 1.
            rate: the mean divergence -> its rate.

        Raises:
            InputError: the divergence is not finite.
        """
        devices, architecture = self._model.devices, self._model.architecture
        after = self._late.after if self._late else ()
        self._zeros_to_come = number <= max(after, default=0)
        x = apply(architecture.embed, self._embed, devices.shard_first(tokens))
        vjps: list[Any] = []  # of the layers, or their inputs
        for layer, values, others in zip(
            architecture.layers, self._kept_of_layers(), self._rest, strict=True
        ):
            if self._placement.results:
                x, vjp = forward_and_vjp(layer, values, others, x)
            else:
                vjp = np.array(fetch(x))  # a copy, for x is donated
                x = apply_layer(layer, others | values, x)
            vjps.append(vjp)
            del vjp
        del values, others  # the last layer's, which may be copies
        divergence, gradient = self._divergence(fetch(x), dense, head_divergence)
        mean = _finite_mean(divergence)
        of_step = jnp.float32(number), jnp.float32(rate(mean))
        cotangent = devices.shard_first(gradient.reshape(x.shape))
        going = _Going(self.state)
        from_last = _ahead(reversed(self.state), devices.shard_outputs)
        for index, kernels in zip(reversed(range(len(self.state))), from_last, strict=True):
            layer = architecture.layers[index]
            vjp = vjps.pop() if self._placement.results else devices.shard_first(vjps.pop())
            values = self._kept(kernels.values, kernels.masks)
            gradients, cotangent = pull_back(layer, values, self._rest[index], vjp, cotangent)
            del vjp, values
            changed: dict[str, Any] = {"moving": adafactor.step(kernels, gradients, *of_step)}
            if number in after:
                kernels, time = kernels._replace(**changed), after.index(number)
                changed = gradual_pruning.prune(kernels, self._selectors[index], time)._asdict()
            if self._placement.state:
                self.state[index] = kernels._replace(**devices.shard_outputs(changed))
            else:
                going.send(index, changed)
        going.arrive()
        return mean

    def _kept(self, values: dict[str, Array], masks: dict[str, Array]) -> dict[str, Array]:
        """Returns kernels on the device as the model has them: without what is masked and moves
        along."""
        if not self._zeros_to_come:
            return values
        return {name: adafactor.kept(value, masks[name]) for name, value in values.items()}

    def _kept_of_layers(self) -> Iterator[dict[str, Array]]:
        """Yields those of each layer."""
        state = (
            (kernels.values, kernels.masks if self._zeros_to_come else {}) for kernels in self.state
        )
        return itertools.starmap(self._kept, _ahead(state, self._model.devices.shard_outputs))

    def divergence(self, tokens: Int[np.ndarray, "w t"], dense: HiddenStates) -> float:
        """Returns the mean divergence of windows; `dense` are the dense model's last hidden states
        of them.

        Raises:
            InputError: it is not finite.
        """
        states = self._model.embed(tokens)
        for index, (values, others) in enumerate(
            zip(self._kept_of_layers(), self._rest, strict=True)
        ):
            self._model.forward(index, others | values, states)
        found = [
            self._divergence(states.read(rows), dense.read(rows), divergence_alone)[0]
            for rows in states.slices()
        ]
        return _finite_mean(np.concatenate(found))

    def _divergence(
        self,
        states: Float[np.ndarray, "b t d"],
        dense: Float[np.ndarray, "b t d"],
        function: Callable[..., Any],
    ) -> list[np.ndarray]:
        """Returns what a function of the head, its params, and rows of hidden states gives for all
        tokens."""
        head = self._model.architecture.head
        rows = [array.reshape(-1, array.shape[-1]) for array in (states, dense)]
        return in_chunks(
            self._model.devices, lambda *chunk: function(head, self._head, *chunk), *rows, models=2
        )

    def stored(self, index: int) -> Params:
        """Returns a layer's kernels as they are to be stored, on the host."""
        kernels, devices = self.state[index], self._model.devices
        return {
            name: fetch(adafactor.rounded(kernels, name, dtype, devices))
            for name, dtype in self._dtypes[index].items()
        }

    def result(self, index: int, stored: Params) -> LayerResult:
        """Returns a layer with such kernels."""
        layer = self._model.architecture.layers[index]
        params = layer.unstack(fetch(self._rest[index]) | stored)
        params = in_checkpoint(index, params) | self._results[index].params
        result = dataclasses.replace(self._results[index], params=params)
        return gradual_pruning.with_own_masks(layer, result) if self._selectors else result


def require_finite(layers: Iterable[Mapping[str, Any]]) -> None:
    """Raises InputError where a layer's kernels hold NaN or infinity: those of experts may be in no
    loss."""
    for kernels in layers:
        if not all(jnp.isfinite(kernel).all() for kernel in kernels.values()):
            raise _not_finite("a kernel")


def _finite_mean(divergence: Float[np.ndarray, "_"]) -> float:
    if not np.isfinite(divergence).all():
        raise _not_finite("the loss")
    return float(divergence.mean(dtype=np.float64))


def _not_finite(what: str) -> InputError:
    options = {"tune_rate": Change.LOWER, "dtype": "float32"}
    return InputError(f"{what} of the distillation holds NaN or infinity", options=options)


def _on_host(tree: Any) -> Any:
    """Returns arrays on the host, where they may lie already."""
    return jax.tree.map(lambda leaf: fetch(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def _ahead(items: Iterable[Any], put: Callable[[Any], Any]) -> Iterator[Any]:
    """Yields items on the device, where the next one is on its way already; what is there stays."""
    before = None
    for item in items:
        here = put(item)
        if before is not None:
            yield before
        before = here
    yield before


class _Going:
    """Kernels on their way to the host while the next ones are computed.

    Args:
        state: where they go.
    """

    def __init__(self, state: list[Kernels]) -> None:
        self._state = state
        self._pending: tuple[int, dict[str, Any]] | None = None

    def send(self, index: int, changed: dict[str, Any]) -> None:
        """Sends what has changed of a layer's, by the field, once those before them have
        arrived."""
        for leaf in jax.tree.leaves(changed):
            leaf.copy_to_host_async()
        self.arrive()
        self._pending = index, changed

    def arrive(self) -> None:
        """Returns when they are there."""
        if self._pending:
            index, changed = self._pending
            self._state[index] = self._state[index]._replace(**fetch(changed))
            self._pending = None


@partial(jax.jit, static_argnums=0)
def head_divergence(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], dense: Float[Array, "n d"]
) -> tuple[Float[Array, "n"], Float[Array, "n d"]]:
    """Computes KL divergences of tokens, and the gradient of their sum by the pruned model's last
    states."""
    scores, vjp = jax.vjp(lambda states: logits(head, params, states), states)
    p, q = exponentials(logits(head, params, dense)), exponentials(scores)
    (gradient,) = vjp(q.values / q.total - p.values / p.total)
    return kl_divergence(p, q), gradient


@partial(jax.jit, static_argnums=0)
def divergence_alone(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], dense: Float[Array, "n d"]
) -> tuple[Float[Array, "n"]]:
    """Computes KL divergences of tokens."""
    return (kl_divergence(*(exponentials(logits(head, params, own)) for own in (dense, states))),)
