"""The student: the pruned model while it is tuned towards the dense one.

The model streams as in pruning. A step's forward pass keeps each layer's input on the host. From
the last layer to the first, each layer runs again under `jax.vjp` and is updated at once.

Kernels take 2 bytes per pruned weight in 16 bits. They stay on the device if they fit. Otherwise
the host holds them, and the device holds one layer's kernels and gradients. The next layer's
kernels are loaded and the previous layer's are stored meanwhile. A step's intermediate results of
all layers also stay on the device if they fit, which saves the second forward pass.
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
from jaxprune.distill.gradual_pruning import GradualPruning, Selectors
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
    """A pruned model whose kernels are tuned.

    Args:
        model: the model that was pruned.
        layers: all layers, as `loop.prune_layers` yields them. Each is released once its kernels
            are copied.
        placement: what stays on the device.
        gradual: the schedule of gradual pruning; None: there is none.

    Attributes:
        state: the kernels of each layer, on the device if they fit.
    """

    def __init__(
        self,
        model: StreamedModel,
        layers: Iterable[LayerResult],
        placement: Placement,
        gradual: GradualPruning | None = None,
    ) -> None:
        architecture = model.architecture
        self._model, self._placement = model, placement
        self._results: list[LayerResult] = []
        # params that are not tuned, on the device if the state is
        self._rest: list[dict[str, Any]] = []
        self._dtypes: list[dict[str, np.dtype]] = []
        self._gradual, self._zeros_to_come = gradual, False
        self._selectors: list[Selectors] = []  # empty without gradual pruning
        self.state: list[Kernels] = []
        for result in layers:
            layer = architecture.layers[result.index]
            own = inside_layer(result.index, result.params)
            params = layer.stack(own)
            experts: dict[str, list[int | None]] = {}  # the others stay dense
            for path in result.masks:
                experts.setdefault(f"{layer.sources[path].name}.kernel", []).append(
                    layer.sources[path].expert
                )
            kernels = {name: params.pop(name) for name in experts}
            # The program takes dense experts in their stack, in the computation's dtype, but they
            # are stored unchanged.
            dense = layer.unstack(kernels).keys() - {f"{path}.kernel" for path in result.masks}
            beside = in_checkpoint(result.index, {path: own[path] for path in dense})
            self._results.append(dataclasses.replace(result, params=beside))
            self._rest.append(model.devices.replicate(params) if placement.state else params)
            self._dtypes.append({name: kernel.dtype for name, kernel in kernels.items()})
            if gradual:
                self._selectors.append(gradual.selectors(layer, result))
            self.state.append(self.place(adafactor.init(kernels, model.dtype, experts)))
        self._embed, self._head = (
            model.params_of(part, cast=True) for part in (architecture.embed, architecture.head)
        )

    def place(self, kernels: Kernels) -> Kernels:
        """Moves a layer's kernels to where they stay between steps."""
        return (
            self._model.devices.shard_outputs(kernels)
            if self._placement.state
            else _on_host(kernels)
        )

    def restore(self, index: int, moving: dict[str, Moving], masks: Mapping[str, Any]) -> None:
        """Restores the changing state of a layer's kernels, and the bits of their masks."""
        rms_by_name = {name: fetch(one.rms) for name, one in self.state[index].fixed.items()}
        fixed = {
            name: adafactor.with_mask(rms, masks[name], moving[name].value)
            for name, rms in rms_by_name.items()
        }
        self.state[index] = self.place(Kernels(moving, fixed))

    def step(
        self,
        tokens: Int[np.ndarray, "b t"],
        dense: Float[np.ndarray, "b t d"],
        number: int,
        rate: Callable[[float], float],
    ) -> float:
        """Updates the kernels on some windows; returns the mean divergence before the update.

        Args:
            tokens: the windows, [windows, length] token ids.
            dense: the dense model's last hidden states of the windows.
            number: the number of the step, from 1.
            rate: mean divergence -> learning rate.

        Raises:
            InputError: the divergence is not finite.
        """
        devices, architecture = self._model.devices, self._model.architecture
        after = self._gradual.after if self._gradual else ()
        self._zeros_to_come = number <= max(after, default=0)
        x = apply(architecture.embed, self._embed, devices.shard_first(tokens))
        vjps: list[Any] = []  # vjps of the layers, or their inputs
        for layer, values, others in zip(
            architecture.layers, self._kept_of_layers(), self._rest, strict=True
        ):
            if self._placement.results:
                x, vjp = forward_and_vjp(layer, values, others, x)
            else:
                vjp = np.array(fetch(x))  # a copy, because x is donated
                x = apply_layer(layer, others | values, x)
            vjps.append(vjp)
            del vjp
        del values, others  # frees the last layer's, which may be copies
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
        """Returns kernels on the device with masked but still trained weights zeroed."""
        if not self._zeros_to_come:
            return values
        return {name: adafactor.kept(value, masks[name]) for name, value in values.items()}

    def _kept_of_layers(self) -> Iterator[dict[str, Array]]:
        """Yields these kernels of each layer."""
        state = (
            (kernels.values, kernels.masks if self._zeros_to_come else {}) for kernels in self.state
        )
        return itertools.starmap(self._kept, _ahead(state, self._model.devices.shard_outputs))

    def divergence(self, tokens: Int[np.ndarray, "w t"], dense: HiddenStates) -> float:
        """Returns the mean divergence on windows.

        Args:
            tokens: the windows, [windows, length] token ids.
            dense: the dense model's last hidden states of the windows.

        Raises:
            InputError: the divergence is not finite.
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
        """Applies a function of head, params and hidden states to all tokens, in chunks."""
        head = self._model.architecture.head
        rows = [array.reshape(-1, array.shape[-1]) for array in (states, dense)]
        return in_chunks(
            self._model.devices, lambda *chunk: function(head, self._head, *chunk), *rows, models=2
        )

    def stored(self, index: int) -> Params:
        """Returns a layer's kernels in their stored dtypes, on the host."""
        kernels, devices = self.state[index], self._model.devices
        return {
            name: fetch(adafactor.rounded(kernels, name, dtype, devices))
            for name, dtype in self._dtypes[index].items()
        }

    def result(self, index: int, stored: Params) -> LayerResult:
        """Returns the result of a layer with these kernels."""
        layer = self._model.architecture.layers[index]
        params = layer.unstack(fetch(self._rest[index]) | stored)
        params = in_checkpoint(index, params) | self._results[index].params
        result = dataclasses.replace(self._results[index], params=params)
        return gradual_pruning.with_own_masks(layer, result) if self._selectors else result


def require_finite(layers: Iterable[Mapping[str, Any]]) -> None:
    """Checks that all kernels are finite. Kernels of experts may not affect the loss.

    Raises:
        InputError: a kernel is NaN or infinite.
    """
    for kernels in layers:
        if not all(jnp.isfinite(kernel).all() for kernel in kernels.values()):
            raise _not_finite("a kernel")


def _finite_mean(divergence: Float[np.ndarray, "_"]) -> float:
    if not np.isfinite(divergence).all():
        raise _not_finite("the loss")
    return float(divergence.mean(dtype=np.float64))


def _not_finite(what: str) -> InputError:
    options = {"tune_rate": Change.LOWER, "dtype": "float32"}
    return InputError(f"{what} of the distillation is NaN or infinite", options=options)


def _on_host(tree: Any) -> Any:
    """Moves arrays to the host if they are not there."""
    return jax.tree.map(lambda leaf: fetch(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def _ahead(items: Iterable[Any], put: Callable[[Any], Any]) -> Iterator[Any]:
    """Yields items on the device, and transfers the next one meanwhile."""
    before = None
    for item in items:
        here = put(item)
        if before is not None:
            yield before
        before = here
    yield before


class _Going:
    """Asynchronous transfers of kernels to the host.

    Args:
        state: the destination.
    """

    def __init__(self, state: list[Kernels]) -> None:
        self._state = state
        self._pending: tuple[int, dict[str, Any]] | None = None

    def send(self, index: int, changed: dict[str, Any]) -> None:
        """Starts the transfer of a layer's changed fields, and waits for the previous transfer."""
        for leaf in jax.tree.leaves(changed):
            leaf.copy_to_host_async()
        self.arrive()
        self._pending = index, changed

    def arrive(self) -> None:
        """Waits for the pending transfer."""
        if self._pending:
            index, changed = self._pending
            self._state[index] = self._state[index]._replace(**fetch(changed))
            self._pending = None


@partial(jax.jit, static_argnums=0)
def head_divergence(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], dense: Float[Array, "n d"]
) -> tuple[Float[Array, "n"], Float[Array, "n d"]]:
    """Computes each token's KL divergence and its gradient with respect to `states`.

    Args:
        head: the head of the model; static.
        params: its params.
        states: last hidden states of the pruned model.
        dense: last hidden states of the dense model.
    """
    scores, vjp = jax.vjp(lambda states: logits(head, params, states), states)
    p, q = exponentials(logits(head, params, dense)), exponentials(scores)
    (gradient,) = vjp(q.values / q.total - p.values / p.total)
    return kl_divergence(p, q), gradient


@partial(jax.jit, static_argnums=0)
def divergence_alone(
    head: Part, params: Mapping[str, Array], states: Float[Array, "n d"], dense: Float[Array, "n d"]
) -> tuple[Float[Array, "n"]]:
    """Computes each token's KL divergence."""
    return (kl_divergence(*(exponentials(logits(head, params, own)) for own in (dense, states))),)
