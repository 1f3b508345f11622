"""The compiled programs of a run, with the shapes they are called with."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape

from jaxprune.distill import adafactor, gradual_pruning, layer_vjp, student
from jaxprune.distill.placement import Placement
from jaxprune.distill.schedule import TuningSteps
from jaxprune.evaluation import perplexity
from jaxprune.methods import Method, gram
from jaxprune.methods.gram import drifted_target
from jaxprune.methods.magnitude import Magnitude
from jaxprune.methods.quantization import BITS, quantize
from jaxprune.models import Layer
from jaxprune.planning.program import Flops, Program, Shapes, size_of
from jaxprune.sharding import Devices
from jaxprune.solve import expert_removal, gram_matrices, kernel, sensitivity
from jaxprune.solve.gram_matrices import ExpertTotals
from jaxprune.sparsity.patterns import Pattern, Unstructured, cubic
from jaxprune.streaming.head import rows_at_a_time
from jaxprune.streaming.model import apply_layer


def of_pruning(
    shapes: Shapes,
    windows: int,
    length: int,
    method: Method,
    pattern: Pattern,
    kind: str | None = None,
    *,
    asymmetry: bool = False,
) -> Iterator[Program]:
    """Yields the programs of the loop over layers.

    Args:
        shapes: the shapes of the run.
        windows: the number of calibration windows.
        length: tokens of a window.
        method: prunes each kernel.
        pattern: the pattern of each kernel.
        kind: the type on whose grid kernels come after that; None: on none.
        asymmetry: whether the dense model goes along, and kernels make up for what their inputs
            lost.
    """
    x = shapes.batch(windows, length)
    # one batch on its way in, one on its way out
    passes, in_flight = windows / x.shape[0], 2 * size_of(x)
    models = 2 if asymmetry else 1
    for layer, count in shapes.layers.items():
        params = shapes.layer_params(layer)
        wanted = [tap for tap, paths in layer.inputs.items() if not layer.routers.issuperset(paths)]
        most, stack = gram_matrices.most_bytes(shapes.device_bytes), 0
        taken = gram_matrices.groups(layer, wanted, most, shapes.devices)
        for sums, groups in Counter(
            _Sums.of(layer, group, shapes.devices) for group in taken
        ).items():
            totals = sums.totals(shapes)
            stack = max(
                stack,
                size_of([total for total in totals.values() if isinstance(total, ExpertTotals)]),
            )
            add: Any = gram_matrices.accumulate_drift if asymmetry else gram_matrices.accumulate
            arguments = params, *[x] * models, {}, [totals] * models if asymmetry else totals
            yield Program(
                "gram",
                "forward and Gram matrices",
                partial(add, layer),
                arguments,
                count * passes * groups,
                in_flight * models,
                donated=(len(arguments) - 1,),
                beside=sums.flops(shapes, x.shape[0] * length),
            )
        yield from _of_solves(shapes, layer, count, stack, method, pattern, kind, asymmetry)
        # nothing reads the last layer's output
        calls = passes * (count - (layer is shapes.architecture.layers[-1]))
        forward = partial(apply_layer, layer)
        yield Program(
            "forward", "forward", forward, (params, x, None), calls, in_flight, donated=(1,)
        )


class _Sums(NamedTuple):
    """The Gram matrices that one pass sums: taps and features, and those of experts with the number
    of them."""

    plain: tuple[tuple[str, int], ...]
    experts: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, layer: Layer, taps: list[str], devices: Devices) -> "_Sums":
        programs = layer.programs_of(taps)
        widths = {tap: layer.features(tap) for tap in programs}
        counts = {
            tap: len(gram_matrices.summed(layer, tap, some, devices))
            for tap, some in programs.items()
            if some
        }
        plain = tuple((tap, widths[tap]) for tap in programs if tap not in counts)
        return cls(plain, tuple((tap, widths[tap], count) for tap, count in counts.items()))

    def totals(self, shapes: Shapes) -> gram_matrices.Totals:
        """Returns what the sums are added to: where there are several devices, each has its
        share."""
        parts, abstract = shapes.devices.count, shapes.devices.abstract
        totals: gram_matrices.Totals = {}
        for tap, n in self.plain:
            shape = Shape((n, n) if parts == 1 else (parts, n, n), jnp.float32)
            totals[tap] = abstract(shape, None if parts == 1 else 0)
        for tap, n, count in self.experts:
            numbers = (
                abstract(Shape((count,), jnp.int32), None),
                abstract(Shape((), jnp.int32), None),
            )
            totals[tap] = ExpertTotals(abstract(Shape((count, n, n), jnp.float32), 0), *numbers)
        return totals

    def flops(self, shapes: Shapes, tokens: int) -> Flops:
        """Returns those of experts' Gram matrices, when so many tokens are spread over all experts
        evenly."""
        routing, total = shapes.architecture.config.routing, 0
        for _, n, count in self.experts:
            rows = tokens if routing.route_all else tokens * routing.per_token // routing.experts
            total += 2 * rows * count * gram.products(n)
        return Flops({"float32": total} if total else {})


def _of_solves(
    shapes: Shapes,
    layer: Layer,
    count: int,
    stack: int,
    method: Method,
    pattern: Pattern,
    kind: str | None,
    asymmetry: bool,
) -> Iterator[Program]:
    """Yields the programs of the solves of a kind of layers, of which there are so many.

    Args:
        shapes, method, pattern, kind, asymmetry: as for `of_pruning`.
        layer: of that kind.
        count: the number of layers.
        stack: bytes of experts' Gram matrices that wait for their solves.
    """
    reads = {
        tap: paths for tap, paths in layer.reads.items() if not layer.routers.issuperset(paths)
    }
    waiting = {
        tap: shapes.devices.abstract(Shape((layer.features(tap),) * 2, jnp.float32), None)
        for tap in reads
    }
    # Compiled once for all of a shape. Where the pattern does not fit, a rule gives another, or
    # none.
    solving, otherwise = (
        partial(solve, method, one) for one in (pattern, Unstructured(pattern.sparsity))
    )
    for tap, paths in reads.items():
        gram, times = waiting.pop(tap), count * layer.experts.get(paths[0], 1)
        prepared = jax.tree.map(
            lambda leaf: shapes.devices.abstract(leaf, None), jax.eval_shape(method.prepare, gram)
        )
        plain = [one for name, one in waiting.items() if reads[name][0] not in layer.experts]
        shared = (
            size_of(shapes.layer_params(layer))
            + size_of(plain) * (1 + asymmetry)
            + size_of(gram) * asymmetry
            + stack
        )
        alive = shared + size_of(gram) + size_of(prepared)
        yield Program("solve", f"prepare {tap}", method.prepare, (gram,), times, shared)
        for path in paths:
            weight = shapes.devices.abstract(Shape(layer.linears[path][-2:], jnp.float32), -1)
            if asymmetry:
                whole = gram, gram, weight, Shape((), jnp.float32)
                yield Program(
                    "solve",
                    f"target of {path}",
                    drifted_target,
                    whole,
                    times,
                    alive - 2 * size_of(gram),
                )
            by = otherwise if pattern.group and weight.shape[0] % pattern.group else solving
            yield Program(
                "solve", f"solve {path}", by, (prepared, weight), times, alive - size_of(prepared)
            )
            if kind:
                mask = shapes.devices.abstract(Shape(weight.shape, jnp.bool_), -1)
                moving, whole = partial(quantize, bits=BITS[kind]), (gram, weight, weight, mask)
                yield Program(
                    "solve", f"quantize {path}", moving, whole, times, alive - size_of(gram)
                )
            arguments = (
                gram,
                shapes.devices.abstract(Shape(weight.shape, shapes.stored), -1),
                weight,
            )
            beside = alive - size_of(gram) + size_of(Shape(weight.shape, jnp.bool_))  # the mask
            yield Program("solve", f"store {path}", kernel.store, arguments, times, beside)


def of_quantization(shapes: Shapes, windows: int, length: int, kind: str) -> Iterator[Program]:
    """Yields the programs of the loop that brings kernels to a grid; arguments as for
    `of_pruning`."""
    for program in of_pruning(shapes, windows, length, Magnitude(), Unstructured(0.0), kind):
        yield dataclasses.replace(program, phase="quantize")


def of_experts(shapes: Shapes, windows: int, length: int) -> Iterator[Program]:
    """Yields the programs that measure experts; arguments as for `of_pruning`."""
    x = shapes.batch(windows, length)
    for layer, count in shapes.layers.items():
        if layer.experts:
            arguments, calls = (shapes.layer_params(layer), x), count * windows / x.shape[0]
            yield Program(
                "experts",
                "norms of outputs",
                partial(expert_removal.norms, layer),
                arguments,
                calls,
                2 * size_of(x),
            )
            forward = partial(apply_layer, layer)
            yield Program(
                "experts",
                "forward",
                forward,
                (*arguments, None),
                calls,
                2 * size_of(x),
                donated=(1,),
            )


def of_sensitivity(shapes: Shapes, windows: int, length: int) -> Iterator[Program]:
    """Yields the programs of the reverse pass over some windows; arguments as for `of_pruning`."""
    architecture = shapes.architecture
    x = shapes.batch(windows, length, sensitivity.tokens_per_batch(shapes.tokens))
    head, passes = (
        shapes.params(architecture.head.spec, architecture.config.dtype),
        windows / x.shape[0],
    )
    for layer, count in shapes.layers.items():
        params, forward = shapes.layer_params(layer), partial(apply_layer, layer)
        arguments: tuple[Any, ...] = params, x, None
        yield Program(
            "sensitivity",
            "forward",
            forward,
            arguments,
            count * passes,
            2 * size_of(x),
            donated=(1,),
        )
        backward = partial(sensitivity.backward, layer)
        yield Program(
            "sensitivity",
            "backward",
            backward,
            (params, x, x),
            count * passes,
            2 * size_of(x),
            donated=(2,),
        )
    chunk = rows_at_a_time(x.shape[0] * (length - 1), devices=shapes.devices.count)
    states = Shape((chunk, architecture.width), architecture.config.dtype)
    loss, chunks = (
        partial(sensitivity.loss_gradient, architecture.head),
        windows * (length - 1) / chunk,
    )
    arguments = head, states, Shape((chunk,), jnp.int32)
    yield Program("sensitivity", "loss", loss, arguments, chunks, 2 * size_of(states))


def of_distillation(
    shapes: Shapes,
    steps: TuningSteps,
    placement: Placement,
    held_out: tuple[int, int] = (0, 0),
    teacher: Shapes | None = None,
    pattern: Pattern | None = None,
) -> Iterator[Program]:
    """Yields the programs of the distillation.

    Args:
        shapes: see `of_pruning`.
        steps: the steps of the tuning.
        placement: what stays on the device.
        held_out: windows that are held out, and tokens of one.
        teacher: of the model towards which is tuned; None: the same.
        pattern: of each kernel, where zeros come late; None: half of the weights.
    """
    architecture = shapes.architecture
    x = shapes.devices.abstract(
        Shape((*steps.shape, architecture.width), architecture.config.dtype), 0
    )
    head = shapes.params(architecture.head.spec, architecture.config.dtype)
    groups = steps.groups(architecture.state_bytes, shapes.tokens)
    batch, measures = shapes.batch(groups[0], steps.length), 1 + len(steps.measured)
    whole, held_out_tokens = (
        shapes.batch(*held_out) if held_out[0] else batch,
        held_out[0] * held_out[1],
    )
    tuned = [
        (layer, count, _Tuned.of(shapes, layer, x, placement))
        for layer, count in shapes.layers.items()
    ]
    ends = size_of(head) + size_of(
        shapes.params(architecture.embed.spec, architecture.config.dtype)
    )
    stays = ends + sum(count * one.stays for _, count, one in tuned)
    results = sum(count * one.results for _, count, one in tuned)
    for layer, count in (teacher or shapes).layers.items():
        forward, params, passes = (
            partial(apply_layer, layer),
            (teacher or shapes).layer_params(layer),
            sum(groups),
        )
        for name, states, windows in (
            ("", batch, passes),
            (" of what is held out", whole, held_out[0]),
        ):
            calls, beside = count * windows / states.shape[0], 2 * size_of(states) + stays
            if windows:
                yield Program(
                    "tune",
                    f"dense forward{name}",
                    forward,
                    (params, states, None),
                    calls,
                    beside,
                    donated=(1,),
                )
    by = pattern or Unstructured(0.5)
    for layer, count, one in tuned:
        forward, values, calls = (
            partial(apply_layer, layer),
            one.kernels.values,
            count * steps.count,
        )
        # those of the next two
        beside = stays - size_of(values) if placement.state else stays + 2 * size_of(values)
        # without what is masked; in the forward pass of two layers
        copy = size_of(values) * bool(steps.prunings)
        beside += 2 * copy
        if placement.results:
            forward_and_vjp = partial(layer_vjp.forward_and_vjp, layer)
            yield Program(
                "tune", "forward", forward_and_vjp, (values, one.rest, x), calls, beside + results
            )
        else:
            yield Program(
                "tune",
                "forward",
                forward,
                (values | one.rest, x, None),
                calls,
                beside,
                donated=(1,),
            )
        if held_out[0]:
            times, visit = (
                count * measures * held_out[0] / whole.shape[0],
                (values | one.rest, whole, None),
            )
            in_flight = beside + 2 * size_of(whole)
            yield Program(
                "tune", "held-out forward", forward, visit, times, in_flight, donated=(1,)
            )
        pull_back, arguments = partial(layer_vjp.pull_back, layer), (values, one.rest, one.vjp, x)
        # Where it does not stay, one layer's is on its way in, and one on its way out.
        beside = stays if placement.state else stays + 3 * size_of(one.kernels)
        beside += results - one.results
        yield Program(
            "tune", "backward", pull_back, arguments, calls, beside - size_of(values) + copy
        )
        for name, own in one.kernels.moving.items():
            gradient, fixed = (
                shapes.devices.abstract(Shape(own.value.shape, x.dtype), -1),
                one.kernels.fixed[name],
            )
            number, others = (
                Shape((), jnp.float32),
                beside - size_of(own) + size_of(values) - size_of(gradient),
            )
            of_step = own, fixed, gradient, number, number
            yield Program(
                "tune", f"step {name}", adafactor.step_one, of_step, calls, others, donated=(0,)
            )
            if steps.prunings:
                times = count * (2 * steps.last_pruning + steps.measured_early)
                yield Program(
                    "tune",
                    f"kept of {name}",
                    adafactor.kept,
                    (own.value, fixed.mask),
                    times,
                    others,
                )
                yield _of_pruning_on(name, (own, fixed), by, len(steps.prunings), count, others)
    rows = partial(rows_at_a_time, models=2, devices=shapes.devices.count)
    chunk = Shape((rows(steps.tokens), architecture.width), architecture.config.dtype)
    loss, chunks = (
        partial(student.head_divergence, architecture.head),
        steps.count * steps.tokens / chunk.shape[0],
    )
    yield Program(
        "tune", "divergence", loss, (head, chunk, chunk), chunks, stays + results - size_of(head)
    )
    if held_out[0]:
        alone = partial(student.divergence_alone, architecture.head)
        chunk = Shape((rows(held_out_tokens), architecture.width), architecture.config.dtype)
        chunks = measures * held_out_tokens / chunk.shape[0]
        yield Program(
            "tune",
            "held-out divergence",
            alone,
            (head, chunk, chunk),
            chunks,
            stays - size_of(head),
        )


def _of_pruning_on(
    name: str,
    kernel: tuple[adafactor.Moving, adafactor.Fixed],
    pattern: Pattern,
    times: int,
    count: int,
    resident: int,
) -> Program:
    """Returns the program that makes more of a kernel's weights zero, expert by expert."""
    *experts, inputs, outputs = kernel[0].value.shape
    selector = pattern.selector((inputs, outputs), cubic(times))
    # the time, and which expert
    arguments = *kernel, selector, *[Shape((), jnp.int32)] * (1 + len(experts))
    calls = count * times * math.prod(experts)
    return Program(
        "tune",
        f"late zeros of {name}",
        gradual_pruning.pruned,
        arguments,
        calls,
        resident,
        donated=(0, 1),
    )


class _Tuned(NamedTuple):
    """What a layer of one kind is called with in a distillation, and how many bytes of it stay on
    the device: of its kernels, and of a step's results."""

    kernels: adafactor.Kernels
    rest: dict[str, Shape]
    vjp: Any
    stays: int
    results: int

    @classmethod
    def of(cls, shapes: Shapes, layer: Layer, x: Shape, placement: Placement) -> "_Tuned":
        params = shapes.layer_params(layer)
        kernels = jax.tree.map(
            lambda leaf: shapes.devices.abstract(leaf, -1), adafactor.shapes(layer, x.dtype)
        )
        rest = {name: param for name, param in params.items() if name not in kernels.moving}
        forward_and_vjp = partial(layer_vjp.forward_and_vjp, layer)
        vjp = x
        if placement.results:
            kept, windows = jax.eval_shape(forward_and_vjp, kernels.values, rest, x)[1], x.shape[:1]
            vjp = jax.tree.map(
                lambda a: shapes.devices.abstract(a, 0 if a.shape[:1] == windows else None), kept
            )
        stays = size_of(kernels) if placement.state else 0
        return cls(kernels, rest, vjp, stays, size_of(vjp) if placement.results else 0)


def of_evaluation(
    shapes: Shapes, windows: int, length: int, dense: Shapes | None = None
) -> Iterator[Program]:
    """Yields the programs that compare the pruned model with the dense one on a text; other
    arguments as for `of_pruning`.

    Args:
        dense: the dense model's shapes; None: the same.
    """
    architecture, x = shapes.architecture, shapes.batch(windows, length)
    for layer, count in (Counter(shapes.layers) + Counter((dense or shapes).layers)).items():
        params, forward = shapes.layer_params(layer), partial(apply_layer, layer)
        calls, resident = count * windows / x.shape[0], 2 * size_of(x) + size_of(params)
        yield Program(
            "evaluate", "forward", forward, (params, x, None), calls, resident, donated=(1,)
        )
    chunk = rows_at_a_time(windows * (length - 1), models=2, devices=shapes.devices.count)
    head = shapes.params(architecture.head.spec, shapes.stored)
    states, targets = (
        Shape((chunk, architecture.width), architecture.config.dtype),
        Shape((chunk,), jnp.int32),
    )
    divergence = partial(perplexity.divergence, (architecture.head, architecture.head))
    chunks = windows * (length - 1) / chunk
    yield Program(
        "evaluate", "divergence", divergence, ((head, head), (states, states), targets), chunks
    )


def solve(method: Method, pattern: Pattern, prepared: Any, weight: jax.Array) -> Any:
    """Calls a method, in the order of arguments that `partial` needs."""
    return method.solve(prepared, weight, pattern)
