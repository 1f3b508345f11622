"""What a tuning costs: the programs of its steps and measures with their shapes, and what it
keeps."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape

from jaxprune.calibration.text_stream import windows_held_out
from jaxprune.costs.program import PhaseCosts, Program, size_of
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.costs.shapes import Shapes
from jaxprune.distill import adafactor, gradual_pruning, student
from jaxprune.distill.layer_vjp import forward_and_vjp, pull_back
from jaxprune.distill.placement import Placement, TunedLayer, placement_of
from jaxprune.distill.schedule import TuningSteps
from jaxprune.models import Layer
from jaxprune.recipe_parts import effective_tuning
from jaxprune.sparsity.patterns import Given, Pattern, Unstructured, cubic
from jaxprune.streaming.head import rows_at_a_time
from jaxprune.streaming.model import apply_layer


def costs(run: RunSizes) -> PhaseCosts:
    """Returns what the tuning of a run costs."""
    held_out = windows_held_out(run.length) if run.recipe.tuning.tune_tokens else 0
    tuning = effective_tuning(run.recipe.tuning, run.recipe.pattern)
    steps = TuningSteps.of(tuning, run.windows, run.length, held_out * run.length)
    placement = placement_of(
        run.left,
        steps.shape,
        run.devices.count,
        gradual=bool(steps.prunings),
        teacher=run.architecture,
        device_bytes=run.device_bytes,
        batch_tokens=run.batch_tokens,
    )
    groups = steps.groups(run.architecture.state_bytes, run.batch_tokens)
    given = run.recipe.pattern
    pattern = Unstructured(0.5) if isinstance(given, Given) else given
    # the dense model's, and of what is held out the student's, too
    states = run.states_bytes(max(groups), steps.length) + 2 * run.states_bytes(held_out)
    disk = {"tuning": 2 * (tuned_bytes(run) + run.mask_bytes + best_step_bytes(run))}
    every = programs(run.pruned, steps, placement, (held_out, run.length), run.dense, pattern)
    moved = {"tune": _transfers(run, steps, placement, held_out, groups)}
    return PhaseCosts(every, states, moved, _host(run, steps, placement), disk)


def tuned_bytes(run: RunSizes) -> int:
    """Returns the bytes of all kernels that are pruned, while they are tuned."""
    dtype = np.dtype(run.architecture.config.dtype)
    return adafactor.weight_dtype(dtype).itemsize * run.pruned_weights


def best_step_bytes(run: RunSizes) -> int:
    """Returns the bytes of the kernels that were best on windows held out, which a tuning by epochs
    does not keep."""
    return run.pruned_bytes * (run.recipe.tuning.tune_tokens > 0)


def _host(run: RunSizes, steps: TuningSteps, placement: Placement) -> int:
    """Returns the bytes in host memory beside hidden states."""
    kernels, tuned = run.pruned_bytes, tuned_bytes(run)
    found = run.stored_bytes() - kernels + run.mask_bytes + best_step_bytes(run)
    if not placement.results:  # the layers' inputs, until their backward pass
        found += len(run.architecture.layers) * run.states_bytes(*steps.shape)
    # The pruned kernels are there at first; layer by layer the tuning's state takes their place,
    # here or there.
    if not placement.state:
        return found + max(kernels, tuned) + run.mask_bytes
    return found + (max(0, kernels - tuned) if run.on_cpu else kernels)


def _transfers(
    run: RunSizes, steps: TuningSteps, placement: Placement, held_out: int, groups: list[int]
) -> int:
    """Returns the bytes to all devices and back."""
    layers, measures = len(run.architecture.layers), 1 + len(steps.measured) if held_out else 0
    passes = len(groups) + (held_out > 0)
    states = run.states_bytes(sum(groups), steps.length)
    states += (1 + measures) * run.states_bytes(held_out)
    found = run.devices.count * run.dense_bytes * passes + 2 * layers * states
    if not placement.state:
        # values for the forward pass; then up, with masks, and down
        found += (3 * steps.count + measures) * tuned_bytes(run)
        # While zeros are to come masks go up for the forward pass, too, and down after those that
        # bring some.
        masks = steps.count + steps.last_pruning + steps.measured_early + len(steps.prunings)
        found += masks * run.mask_bytes
    if not placement.results:  # each layer's input, down and up again
        found += 2 * layers * steps.count * run.states_bytes(*steps.shape)
    return found


def programs(
    shapes: Shapes,
    steps: TuningSteps,
    placement: Placement,
    held_out: tuple[int, int] = (0, 0),
    teacher: Shapes | None = None,
    pattern: Pattern | None = None,
) -> Iterator[Program]:
    """Yields the programs of a tuning.

    Args:
        shapes: the shapes of the run.
        steps: the steps of the tuning.
        placement: what stays on the device.
        held_out: windows that are held out, and tokens of one.
        teacher: of the model towards which is tuned; None: the same.
        pattern: of each kernel, where pruning is gradual; None: half of the weights.
    """
    x, length = shapes.states(*steps.shape), steps.length
    tuned = {
        layer: TunedLayer.of(layer, shapes.layer_params(layer), x, shapes.devices)
        for layer in shapes.layers
    }
    if not placement.results:  # the input is there instead
        tuned = {layer: one._replace(vjp=x) for layer, one in tuned.items()}
    tuning = _Tuning(shapes, steps, placement, held_out, pattern or Unstructured(0.5), tuned)
    groups = steps.groups(shapes.architecture.state_bytes, shapes.tokens)
    passes = [("dense forward", shapes.batch(groups[0], length), sum(groups))]
    if held_out[0]:
        whole = shapes.batch(*held_out)
        passes.append(("dense forward of what is held out", whole, held_out[0]))
    teacher = teacher or shapes
    for layer, count in teacher.layers.items():
        for name, batch, windows in passes:
            alone = teacher.forward("tune", layer, batch, count * windows, resident=tuning.stays)
            yield dataclasses.replace(alone, name=name)
    for layer, count in shapes.layers.items():
        yield from tuning.forward(layer, count)
        yield from tuning.backward(layer, count)
    yield from tuning.divergences()


@dataclasses.dataclass(frozen=True)
class _Tuning:
    """The programs of the tuned model; see `programs` for most attributes.

    Attributes:
        tuned: what a layer of each kind is called with.
    """

    shapes: Shapes
    steps: TuningSteps
    placement: Placement
    held_out: tuple[int, int]
    pattern: Pattern
    tuned: Mapping[Layer, TunedLayer]

    @cached_property
    def stays(self) -> int:
        """Bytes that stay on the device: embedding, head, and kernels."""
        architecture = self.shapes.architecture
        ends = [self.shapes.params(part.spec) for part in (architecture.embed, architecture.head)]
        return size_of(ends) + self._of_layers("kernels", self.placement.state)

    @cached_property
    def results(self) -> int:
        """Bytes of a step's intermediate results that stay on the device."""
        return self._of_layers("vjp", self.placement.results)

    def _of_layers(self, field: str, stay: bool) -> int:
        layers = self.shapes.layers.items() if stay else ()
        return sum(count * size_of(getattr(self.tuned[one], field)) for one, count in layers)

    @property
    def measured(self) -> int:
        """Windows that all measures of the divergence take together."""
        return self.held_out[0] * (1 + len(self.steps.measured))

    def _copy(self, layer: Layer) -> int:
        """Returns the bytes of a layer's kernels without what is masked, where that moves along."""
        return size_of(self.tuned[layer].kernels.values) if self.steps.prunings else 0

    def forward(self, layer: Layer, count: int) -> Iterator[Program]:
        """Yields the forward passes of a kind of layers, of steps and of measures."""
        kernels, rest, vjp = self.tuned[layer]
        values, calls = kernels.values, count * self.steps.count
        function, x = partial(apply_layer, layer), self.shapes.states(*self.steps.shape)
        # those of the next two
        resident = self.stays + (-1 if self.placement.state else 2) * size_of(values)
        resident += 2 * self._copy(layer)  # those of the next layer, too
        arguments: tuple[Any, ...] = values | rest, x, None
        if self.placement.results:
            with_vjp, alive = partial(forward_and_vjp, layer), resident + self.results
            yield Program("tune", "forward", with_vjp, (values, rest, x), calls, alive)
        else:
            yield Program("tune", "forward", function, arguments, calls, resident)
        if self.measured:
            x = self.shapes.batch(*self.held_out)
            calls, alive = count * self.measured / x.shape[0], resident + 2 * size_of(x)
            arguments = values | rest, x, None
            yield Program("tune", "held-out forward", function, arguments, calls, alive)

    def backward(self, layer: Layer, count: int) -> Iterator[Program]:
        """Yields the backward pass through a kind of layers, and the steps of their kernels."""
        (kernels, rest, vjp), calls = self.tuned[layer], count * self.steps.count
        x, number = self.shapes.states(*self.steps.shape), Shape((), jnp.float32)
        values = size_of(kernels.values)
        resident = self.stays
        if self.placement.results:
            resident += self.results - size_of(vjp)
        if not self.placement.state:  # one layer's is on its way in, and one on its way out
            resident += 3 * size_of(kernels)
        arguments: tuple[Any, ...] = kernels.values, rest, vjp, x
        function, alive = partial(pull_back, layer), resident - values + self._copy(layer)
        yield Program("tune", "backward", function, arguments, calls, alive)
        for name, moving in kernels.moving.items():
            fixed = kernels.fixed[name]
            gradient = self.shapes.devices.abstract(Shape(moving.value.shape, x.dtype), -1)
            alive = resident - size_of(moving) + values - size_of(gradient)
            arguments = moving, fixed, gradient, number, number
            yield Program("tune", f"step {name}", adafactor.step_one, arguments, calls, alive)
            if self.steps.prunings:
                yield from self._prunings(name, moving, fixed, count, alive)

    def _prunings(
        self, name: str, moving: adafactor.Moving, fixed: adafactor.Fixed, count: int, alive: int
    ) -> Iterator[Program]:
        """Yields the programs that prune a kernel gradually, expert by expert."""
        *experts, inputs, outputs = moving.value.shape
        times, masked = len(self.steps.prunings), (moving.value, fixed.mask)
        calls = count * (2 * self.steps.last_pruning + self.steps.measured_early)
        yield Program("tune", f"kept of {name}", adafactor.kept, masked, calls, alive)
        selector = self.pattern.selector((inputs, outputs), cubic(times))
        number = Shape((), jnp.int32)
        arguments = moving, fixed, selector, number, number if experts else None
        calls, function = count * times * math.prod(experts), gradual_pruning.pruned
        yield Program("tune", f"gradual pruning of {name}", function, arguments, calls, alive)

    def divergences(self) -> Iterator[Program]:
        """Yields the programs that compare predictions, of steps and of measures."""
        head, steps, (windows, length) = self.shapes.architecture.head, self.steps, self.held_out
        params = self.shapes.params(head.spec)
        alive, count = self.stays - size_of(params), self.shapes.devices.count
        for name, function, tokens, every, results in (
            ("", student.head_divergence, steps.tokens, steps.count * steps.tokens, self.results),
            ("held-out ", student.divergence_alone, windows * length, self.measured * length, 0),
        ):
            if tokens:
                chunk = rows_at_a_time(tokens, models=2, devices=count)
                states, of_head = self.shapes.rows(chunk), partial(function, head)
                arguments, calls = (params, states, states), every / chunk
                name, beside = f"{name}divergence", alive + results
                yield Program("tune", name, of_head, arguments, calls, beside)
