"""The compiled programs of a run, with the shapes they are called with: what they cost before anything is run.

FLOPs are those of matrix products and factorizations, counted in the program itself, so that what a program skips is
not counted. Bytes are those of the compiler's own memory analysis. Neither needs weights, text or the device's time.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import NamedSharding
from jaxtyping import DTypeLike

from jaxprune.evaluation import text
from jaxprune.methods import Method, gram
from jaxprune.models import Architecture, Layer
from jaxprune.pruning import adam, distillation, experts, gram_matrices, kernel, sensitivity
from jaxprune.pruning.gram_matrices import ExpertTotals
from jaxprune.sharding import Devices
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming.head import CHUNK
from jaxprune.streaming.hidden_states import batch_size
from jaxprune.streaming.model import apply_layer

Flops = Counter[str]
"""dtype of the operands -> floating-point operations; a product of 16-bit operands runs at another rate."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a run.

    Attributes:
        phase: the phase of the run that calls it.
        name: what it computes.
        function: the function to be compiled.
        arguments: shapes and dtypes.
        calls: how often it is called in a run.
        resident: bytes on the device meanwhile which are not its arguments.
        donated: numbers of the arguments whose memory it may reuse.
        beside: FLOPs of a call in loops whose length depends on the data.
    """

    phase: str
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: float
    resident: int = 0
    donated: tuple[int, ...] = ()
    beside: Flops = dataclasses.field(default_factory=Flops)

    def flops(self) -> Flops:
        """Counts the FLOPs of one call."""
        return count_flops(self._traced.jaxpr) + self.beside

    def most_bytes(self) -> int:
        """Returns no less than a call's device memory, without compiling: as if every intermediate result stayed."""
        return self.resident + _bytes(self.arguments) + _produced(self._traced.jaxpr.jaxpr)

    def peak_bytes(self) -> int:
        """Returns the device memory during a call: arguments, results and intermediate results, and what else is there.

        The compiler decides it, so the program is compiled, not run.
        """
        memory = self._traced.lower().compile().memory_analysis()
        assert memory is not None
        own = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return self.resident + own - memory.alias_size_in_bytes

    def lowered(self, platform: str) -> str:
        """Lowers to StableHLO for a platform, cuda or tpu for example, which need not be there."""
        return self._traced.lower(lowering_platforms=(platform,)).as_text()

    @functools.cached_property
    def _traced(self) -> Any:
        """The program as JAX traces it; a function of the run's own is compiled for the run as well."""
        function = self.function
        if isinstance(function, partial) and hasattr(function.func, "trace"):
            return function.func.trace(*function.args, *self.arguments)
        return jax.jit(function, donate_argnums=self.donated).trace(*self.arguments)


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> Flops:
    """Counts the FLOPs of the products and factorizations that a program's results need.

    A product of n·k by k·m is 2nkm; a Cholesky factorization n³/3; a triangular solve n²m; eigenvectors about 9n³.
    A loop whose number of iterations depends on the data counts as one iteration.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    total = Flops()
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
            total.update(_flops_of(equation))
    return total


def _flops_of(equation: JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    inner = [count_flops(p) for p in jax.tree.leaves(params, is_leaf=_is_program) if _is_program(p)]
    if inner:
        if name == "cond":
            return max(inner, key=lambda flops: sum(flops.values()))
        times = params["length"] if name == "scan" else 1
        return Flops({dtype: times * sum(flops[dtype] for flops in inner) for dtype in set().union(*inner)})
    if name not in ("dot_general", "cholesky", "triangular_solve", "eigh"):
        return Flops()
    operand: Any = equation.invars[0].aval
    shape, result = operand.shape, equation.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        count = 2 * result.size * math.prod(shape[axis] for axis in contracted)
    elif name == "cholesky":
        count = shape[-1] ** 3 // 3
    elif name == "triangular_solve":
        count = shape[-1] * result.size
    else:
        count = 9 * shape[-1] ** 3
    return Flops({operand.dtype.name: count})


def _produced(jaxpr: Jaxpr) -> int:
    """Returns the bytes of the results of all equations; those of a loop's body count once."""
    total = 0
    for equation in jaxpr.eqns:
        total += _bytes([v.aval for v in equation.outvars])
        for inner in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(inner):
                total += _produced(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
    return total


def _is_program(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the programs of a run are called with.

    Attributes:
        architecture: the architecture of the model.
        stored: dtype of the checkpoint's params.
        devices: the devices that they run on.
        tokens: the number of tokens on a device at a time; None: as the run takes them.
        device_bytes: the memory of a device; None: what this machine's has.
    """

    architecture: Architecture
    stored: DTypeLike
    devices: Devices
    tokens: int | None = None
    device_bytes: float | None = None

    @property
    def layers(self) -> Mapping[Layer, int]:
        """The kinds of layers -> how many there are of each."""
        return Counter(self.architecture.layers)

    def params(self, spec: Mapping[str, Any], dtype: DTypeLike) -> dict[str, Shape]:
        """Returns replicated params."""
        return {path: self.devices.abstract(Shape(param.shape, dtype), None) for path, param in spec.items()}

    def layer_params(self, layer: Layer) -> dict[str, Shape]:
        """Returns a layer's params, experts sharded."""
        params = {}
        for path, param in layer.spec.items():
            axis = 0 if path.rpartition(".")[0] in layer.experts else None
            params[path] = self.devices.abstract(Shape(param.shape, self.stored), axis)
        return params

    def states(self, windows: int, length: int) -> Shape:
        """Returns hidden states of so many windows on each device."""
        shape = windows * self.devices.count, length, self.architecture.width
        return self.devices.abstract(Shape(shape, self.architecture.config.dtype), 0)

    def batch(self, windows: int, length: int, tokens: int | None = None) -> Shape:
        """Returns the hidden states of one step over so many windows."""
        return self.states(batch_size(windows, length, tokens or self.tokens, self.devices.count), length)


def of_pruning(shapes: Shapes, windows: int, length: int, method: Method, pattern: Pattern) -> Iterator[Program]:
    """Yields the programs of the loop over layers.

    Args:
        shapes: the shapes of the run.
        windows: the number of calibration windows.
        length: tokens of a window.
        method: prunes each kernel.
        pattern: the pattern of each kernel.
    """
    x = shapes.batch(windows, length)
    passes, in_flight = windows / x.shape[0], 2 * _bytes(x)  # one batch on its way in, one on its way out
    for layer, count in shapes.layers.items():
        params = shapes.layer_params(layer)
        wanted = [tap for tap, paths in layer.inputs.items() if not layer.routers.issuperset(paths)]
        most, stack = gram_matrices.most_bytes(shapes.device_bytes), 0
        alike = Counter(_Sums.of(layer, group) for group in gram_matrices.groups(layer, wanted, most, shapes.devices))
        for sums, groups in alike.items():
            totals = sums.totals(shapes)
            stack = max(stack, _bytes([total for total in totals.values() if isinstance(total, ExpertTotals)]))
            yield Program(
                "gram",
                "forward and Gram matrices",
                partial(gram_matrices.accumulate, layer),
                (params, x, {}, totals),
                count * passes * groups,
                in_flight,
                donated=(3,),
                beside=sums.flops(shapes, x.shape[0] * length),
            )
        yield from _of_solves(shapes, layer, count, params, stack, method, pattern)
        calls = passes * (count - (layer is shapes.architecture.layers[-1]))  # nothing reads the last layer's output
        forward = partial(apply_layer, layer)
        yield Program("forward", "forward", forward, (params, x, None), calls, in_flight, donated=(1,))


class _Sums(NamedTuple):
    """The Gram matrices that one pass sums: taps and features, and those of experts with the number of them."""

    plain: tuple[tuple[str, int], ...]
    experts: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, layer: Layer, taps: list[str]) -> "_Sums":
        programs = layer.programs_of(taps)
        widths = {tap: layer.linears[layer.reads[tap][0]][-2] for tap in programs}
        plain = tuple((tap, widths[tap]) for tap, some in programs.items() if some is None)
        return cls(plain, tuple((tap, widths[tap], len(some)) for tap, some in programs.items() if some))

    def totals(self, shapes: Shapes) -> gram_matrices.Totals:
        """Returns what the sums are added to: where there are several devices, each has its share."""
        parts, abstract = shapes.devices.count, shapes.devices.abstract
        totals: gram_matrices.Totals = {}
        for tap, n in self.plain:
            shape = Shape((n, n) if parts == 1 else (parts, n, n), jnp.float32)
            totals[tap] = abstract(shape, None if parts == 1 else 0)
        for tap, n, count in self.experts:
            numbers = abstract(Shape((count,), jnp.int32), None), abstract(Shape((), jnp.int32), None)
            totals[tap] = ExpertTotals(abstract(Shape((count, n, n), jnp.float32), 0), *numbers)
        return totals

    def flops(self, shapes: Shapes, tokens: int) -> Flops:
        """Returns those of experts' Gram matrices, when so many tokens are spread over all experts evenly."""
        routing, total = shapes.architecture.config.routing, 0
        for _, n, count in self.experts:
            rows = tokens if routing.route_all else tokens * routing.per_token // routing.experts
            total += 2 * rows * count * gram.products(n)
        return Flops({"float32": total} if total else {})


def _of_solves(
    shapes: Shapes,
    layer: Layer,
    count: int,
    params: Mapping[str, Shape],
    stack: int,
    method: Method,
    pattern: Pattern,
) -> Iterator[Program]:
    """Yields the programs of the solves of a kind of layers, of which there are so many.

    Args:
        shapes, method, pattern: as for `of_pruning`.
        layer: of that kind.
        count: the number of layers.
        params: of a layer.
        stack: bytes of experts' Gram matrices that wait for their solves.
    """
    reads = {tap: paths for tap, paths in layer.reads.items() if not layer.routers.issuperset(paths)}
    waiting = {
        tap: shapes.devices.abstract(Shape((layer.linears[paths[0]][-2],) * 2, jnp.float32), None)
        for tap, paths in reads.items()
    }
    solving = partial(solve, method, pattern)  # compiled once for all of a shape
    for tap, paths in reads.items():
        gram, times = waiting.pop(tap), count * layer.experts.get(paths[0], 1)
        prepared = jax.tree.map(lambda leaf: shapes.devices.abstract(leaf, None), jax.eval_shape(method.prepare, gram))
        plain = [one for name, one in waiting.items() if reads[name][0] not in layer.experts]
        shared = _bytes(params) + _bytes(plain) + stack
        alive = shared + _bytes(gram) + _bytes(prepared)
        yield Program("solve", f"prepare {tap}", method.prepare, (gram,), times, shared)
        for path in paths:
            weight = shapes.devices.abstract(Shape(layer.linears[path][-2:], jnp.float32), -1)
            yield Program("solve", f"solve {path}", solving, (prepared, weight), times, alive - _bytes(prepared))
            arguments = gram, shapes.devices.abstract(Shape(weight.shape, shapes.stored), -1), weight
            yield Program("solve", f"store {path}", kernel.store, arguments, times, alive - _bytes(gram))


def of_experts(shapes: Shapes, windows: int, length: int) -> Iterator[Program]:
    """Yields the programs that measure experts; arguments as for `of_pruning`."""
    x = shapes.batch(windows, length)
    for layer, count in shapes.layers.items():
        if layer.experts:
            arguments, calls = (shapes.layer_params(layer), x), count * windows / x.shape[0]
            yield Program("experts", "norms of outputs", partial(experts.norms, layer), arguments, calls, 2 * _bytes(x))
            forward = partial(apply_layer, layer)
            yield Program("experts", "forward", forward, (*arguments, None), calls, 2 * _bytes(x), donated=(1,))


def of_sensitivity(shapes: Shapes, windows: int, length: int) -> Iterator[Program]:
    """Yields the programs of the reverse pass over some windows; arguments as for `of_pruning`."""
    architecture = shapes.architecture
    x = shapes.batch(windows, length, sensitivity.tokens_per_batch(shapes.tokens))
    head, passes = shapes.params(architecture.head.spec, architecture.config.dtype), windows / x.shape[0]
    for layer, count in shapes.layers.items():
        params, forward = shapes.layer_params(layer), partial(apply_layer, layer)
        arguments: tuple[Any, ...] = params, x, None
        yield Program("sensitivity", "forward", forward, arguments, count * passes, 2 * _bytes(x), donated=(1,))
        backward = partial(sensitivity.backward, layer)
        yield Program("sensitivity", "backward", backward, (params, x, x), count * passes, 2 * _bytes(x), donated=(2,))
    chunk = min(CHUNK, x.shape[0] // shapes.devices.count * (length - 1))
    states = Shape((chunk, architecture.width), architecture.config.dtype)
    loss, chunks = partial(sensitivity.loss_gradient, architecture.head), windows * (length - 1) / chunk
    arguments = head, states, Shape((chunk,), jnp.int32)
    yield Program("sensitivity", "loss", loss, arguments, chunks, 2 * _bytes(states))


def of_distillation(
    shapes: Shapes, windows: int, length: int, epochs: float, *, step: int = 1, keep: bool = True
) -> Iterator[Program]:
    """Yields the programs of the distillation.

    Args:
        shapes, windows, length: see `of_pruning`.
        epochs: visits of each window.
        step: windows a step.
        keep: whether all layers' kernels, their state, and a step's intermediate results stay on the device; else one
            layer's do, and each layer's forward pass is run again before its vjp.
    """
    architecture = shapes.architecture
    step = -(-step // shapes.devices.count)
    x, head = shapes.states(step, length), shapes.params(architecture.head.spec, architecture.config.dtype)
    batch = shapes.batch(windows, length)
    visits, passes = math.ceil(epochs * windows / step), min(1.0, epochs) * windows / batch.shape[0]
    tuned = [(layer, count, _Tuned.of(shapes, layer, x, keep)) for layer, count in shapes.layers.items()]
    resident = sum(count * one.state for _, count, one in tuned)
    for layer, count, one in tuned:
        forward, visit, in_flight = partial(apply_layer, layer), (one.params, batch, None), 2 * _bytes(batch)
        yield Program("tune", "dense forward", forward, visit, count * passes, in_flight, donated=(1,))
        values, calls = one.kernels.values, count * visits
        if keep:
            forward_and_vjp = partial(distillation.forward_and_vjp, layer)
            resident_then = resident - _bytes(values)
            yield Program("tune", "forward", forward_and_vjp, (values, one.rest, x), calls, resident_then)
        else:
            yield Program("tune", "forward", forward, (values | one.rest, x, None), calls, donated=(1,))
        pull_back, arguments = partial(distillation.pull_back, layer), (values, one.rest, one.vjp, x)
        waiting = _bytes(one.kernels) - _bytes(values) if keep else 0
        yield Program("tune", "backward", pull_back, arguments, calls, resident - one.state + waiting)
        for name, value in values.items():
            kernel, number = adam.Moving(value, value, value), Shape((), jnp.float32)
            others = 2 * (_bytes(values) - _bytes(value)) if not keep else resident + _bytes(values) - _bytes(kernel)
            own = one.kernels.masks[name], one.kernels.units[name], value, Shape((), jnp.int32), number
            yield Program("tune", f"step {name}", adam.step_one, (kernel, *own), calls, others, donated=(0,))
    chunk = Shape((min(CHUNK // 2, step * length), architecture.width), architecture.config.dtype)
    loss = partial(distillation.head_divergence, architecture.head)
    yield Program("tune", "divergence", loss, (head, chunk, chunk), visits * step * length / chunk.shape[0], resident)


class _Tuned(NamedTuple):
    """What a layer of one kind is called with in a distillation, and how many bytes of it stay on the device."""

    params: dict[str, Shape]
    kernels: adam.Kernels
    rest: dict[str, Shape]
    vjp: Any
    state: int

    @classmethod
    def of(cls, shapes: Shapes, layer: Layer, x: Shape, keep: bool) -> "_Tuned":
        params = shapes.layer_params(layer)
        names = [f"{path}.kernel" for path in layer.linears if path not in layer.routers]
        values = {name: Shape(params[name].shape, jnp.float32) for name in names}
        rest = {name: param for name, param in params.items() if name not in values}
        masks = {n: Shape((*value.shape[:-1], -(-value.shape[-1] // 8)), jnp.uint8) for n, value in values.items()}
        units = {name: Shape((len(v.shape) - 2) * (v.shape[0], 1, 1), jnp.float32) for name, v in values.items()}
        moments = jax.eval_shape(adam.ADAM.init, values)
        kernels = adam.Kernels(values, masks, units, moments)
        forward_and_vjp = partial(distillation.forward_and_vjp, layer)
        vjp = jax.eval_shape(forward_and_vjp, values, rest, x)[1] if keep else x
        return cls(params, kernels, rest, vjp, _bytes(kernels) + _bytes(rest) + _bytes(vjp) if keep else 0)


def of_evaluation(shapes: Shapes, windows: int, length: int) -> Iterator[Program]:
    """Yields the programs that compare the pruned model with the dense one on a text; arguments as for `of_pruning`."""
    architecture, x = shapes.architecture, shapes.batch(windows, length)
    for layer, count in shapes.layers.items():
        params, forward = shapes.layer_params(layer), partial(apply_layer, layer)
        calls, resident = 2 * count * windows / x.shape[0], 2 * _bytes(x) + _bytes(params)
        yield Program("evaluate", "forward", forward, (params, x, None), calls, resident, donated=(1,))
    chunk = min(CHUNK // 2, windows * (length - 1))
    head = shapes.params(architecture.head.spec, shapes.stored)
    states, targets = Shape((chunk, architecture.width), architecture.config.dtype), Shape((chunk,), jnp.int32)
    divergence = partial(text.divergence, (architecture.head, architecture.head))
    chunks = windows * (length - 1) / chunk
    yield Program("evaluate", "divergence", divergence, ((head, head), (states, states), targets), chunks)


def solve(method: Method, pattern: Pattern, prepared: Any, weight: jax.Array) -> Any:
    """Calls a method, in the order of arguments that `partial` needs."""
    return method.solve(prepared, weight, pattern)


def _bytes(tree: Any) -> int:
    """Returns the bytes on one device."""
    return sum(_bytes_of(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def _bytes_of(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, NamedSharding) else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize
