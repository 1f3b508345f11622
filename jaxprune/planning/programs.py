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
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import NamedSharding
from jaxtyping import DTypeLike

from jaxprune import sharding as devices
from jaxprune.evaluation import text
from jaxprune.methods import Method
from jaxprune.models import Model
from jaxprune.pruning import adam, sensitivity, stages
from jaxprune.pruning import distillation as tuning
from jaxprune.pruning import kernel as linears
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming import stream
from jaxprune.streaming.hidden_states import batch_size

Flops = Counter[str]
"""dtype of the operands -> floating-point operations; a product of 16-bit operands runs at another rate."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a run.

    Attributes:
        phase: of the run that calls it.
        name: what it computes.
        function: to be compiled.
        arguments: shapes and dtypes.
        calls: in a run.
        resident: bytes on the device meanwhile which are not its arguments.
        donated: numbers of the arguments whose memory it may reuse.
    """

    phase: str
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: float
    resident: int = 0
    donated: tuple[int, ...] = ()

    def flops(self) -> Flops:
        """FLOPs of one call."""
        return count_flops(self._traced.jaxpr)

    def most_bytes(self) -> int:
        """No less than device memory during a call, without compiling: as if every intermediate result stayed."""
        return self.resident + _bytes(self.arguments) + _produced(self._traced.jaxpr.jaxpr)

    def peak_bytes(self) -> int:
        """Device memory during a call: arguments, results and intermediate results, and what else is there.

        The compiler decides it, so the program is compiled, not run.
        """
        memory = self._traced.lower().compile().memory_analysis()
        assert memory is not None
        own = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return self.resident + own - memory.alias_size_in_bytes

    def lowered(self, platform: str) -> str:
        """StableHLO for a platform, cuda or tpu for example, which need not be there."""
        return self._traced.lower(lowering_platforms=(platform,)).as_text()

    @functools.cached_property
    def _traced(self) -> Any:
        """The program as JAX traces it; a function of the run's own is compiled for the run as well."""
        function = self.function
        if isinstance(function, partial) and hasattr(function.func, "trace"):
            return function.func.trace(*function.args, *self.arguments)
        return jax.jit(function, donate_argnums=self.donated).trace(*self.arguments)


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> Flops:
    """FLOPs of the products and factorizations that a program's results need.

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
    """Bytes of the results of all equations; those of a loop's body count once."""
    total = 0
    for equation in jaxpr.eqns:
        total += _bytes([v.aval for v in equation.outvars])
        for inner in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(inner):
                total += _produced(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
    return total


def _is_program(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


def of_pruning(
    model: Model,
    windows: int,
    length: int,
    method: Method,
    pattern: Pattern,
    stored: DTypeLike,
    *,
    tokens: int | None = None,
) -> Iterator[Program]:
    """The programs of the loop over layers.

    Args:
        model: its shapes.
        windows: of calibration.
        length: tokens of a window.
        method: prunes each linear.
        pattern: of each linear.
        stored: dtype of the checkpoint's params.
        tokens: on the device at a time; None: as the run takes them.
    """
    layers, batch = model.config.num_layers, batch_size(windows, length, tokens)
    params, x = _layer_params(model, stored), _states(model, batch, length)
    passes, parts = layers * windows / x.shape[0], devices.number()
    whole = {tap: devices.like(Shape((n, n), jnp.float32), None) for tap, n in model.widths.items()}
    grams = whole
    if parts > 1:  # each device's share
        grams = {tap: devices.like(Shape((parts, *gram.shape), jnp.float32), 0) for tap, gram in whole.items()}
    in_flight = 2 * _bytes(x)  # one batch on its way in, one on its way out
    yield Program(
        "gram", "forward and Gram matrices", partial(stages.accumulate, model.layer), (params, x, {}, grams),
        passes, in_flight, donated=(3,),
    )  # fmt: skip
    waiting = dict(whole)
    solving = partial(solve, method, pattern)  # compiled once for all of a shape
    for tap, paths in model.inputs.items():
        gram = waiting.pop(tap)
        prepared = jax.tree.map(lambda leaf: devices.like(leaf, None), jax.eval_shape(method.prepare, gram))
        shared = _bytes(params) + _bytes(waiting)
        alive = shared + _bytes(gram) + _bytes(prepared)
        yield Program("solve", f"prepare {tap}", method.prepare, (gram,), layers, shared)
        for path in paths:
            kernel = devices.like(Shape(model.linears[path], jnp.float32), -1)
            yield Program("solve", f"solve {path}", solving, (prepared, kernel), layers, alive - _bytes(prepared))
            arguments = gram, devices.like(Shape(kernel.shape, stored), -1), kernel
            yield Program("solve", f"store {path}", linears.store, arguments, layers, alive - _bytes(gram))
    yield Program(
        "forward",
        "forward",
        partial(stream.apply_layer, model.layer),
        (params, x, None),
        passes * (layers - 1) / layers,
        in_flight,
        donated=(1,),
    )


def of_sensitivity(
    model: Model, windows: int, length: int, stored: DTypeLike, *, tokens: int | None = None
) -> Iterator[Program]:
    """The programs of the reverse pass over some windows; arguments as for `of_pruning`."""
    layers, batch = model.config.num_layers, batch_size(windows, length, sensitivity.tokens_per_batch(tokens))
    params, x = _layer_params(model, stored), _states(model, batch, length)
    head = _shapes(model.head.spec, model.config.dtype)
    passes, taps = layers * windows / x.shape[0], tuple(model.inputs.items())
    forward = partial(stream.apply_layer, model.layer)
    yield Program("sensitivity", "forward", forward, (params, x, None), passes, 2 * _bytes(x), donated=(1,))
    chunk = min(stream.CHUNK, batch * (length - 1))
    arguments = head, Shape((chunk, model.width), model.config.dtype), Shape((chunk,), jnp.int32)
    loss, chunks = partial(sensitivity.loss_gradient, model.head), windows * (length - 1) / chunk
    yield Program("sensitivity", "loss", loss, arguments, chunks, 2 * _bytes(arguments[1]))
    backward = partial(sensitivity.backward, model.layer, taps)
    yield Program("sensitivity", "backward", backward, (params, x, x), passes, 2 * _bytes(x), donated=(2,))


def of_tuning(
    model: Model,
    windows: int,
    length: int,
    epochs: float,
    stored: DTypeLike,
    *,
    step: int = 1,
    keep: bool = True,
    tokens: int | None = None,
) -> Iterator[Program]:
    """The programs of the tuning.

    Args:
        model, windows, length, stored, tokens: as for `of_pruning`.
        epochs: visits of each window.
        step: windows a step.
        keep: whether all layers' kernels, their state, and a step's intermediate results stay on the device; else one
            layer's do, and each layer is run again on the way back.
    """
    layers, step = model.config.num_layers, -(-step // devices.number())
    x = _states(model, step, length)
    head = _shapes(model.head.spec, model.config.dtype)
    names = [f"{path}.kernel" for path in model.linears]
    params = _layer_params(model, stored)
    values = {name: Shape(params[name].shape, jnp.float32) for name in names}
    rest = {name: param for name, param in params.items() if name not in values}
    masks = {name: Shape((value.shape[0], -(-value.shape[1] // 8)), jnp.uint8) for name, value in values.items()}
    units, moments = dict.fromkeys(names, Shape((), jnp.float32)), jax.eval_shape(adam.ADAM.init, values)
    kernels = adam.Kernels(values, masks, units, moments)
    calls = layers * math.ceil(epochs * windows / step)
    visited = min(1.0, epochs) * windows
    batch = _states(model, batch_size(windows, length, tokens), length)
    passes = layers * visited / batch.shape[0]
    forward = partial(stream.apply_layer, model.layer)
    yield Program("tune", "dense forward", forward, (params, batch, None), passes, 2 * _bytes(batch), donated=(1,))
    forth = partial(tuning.forward_with_way_back, model.layer)
    ways_back = jax.eval_shape(forth, values, rest, x)[1] if keep else x
    state = _bytes(kernels) + _bytes(rest) + _bytes(ways_back) if keep else 0  # of a layer
    if keep:
        yield Program("tune", "forward", forth, (values, rest, x), calls, layers * state - _bytes(values))
    else:
        yield Program("tune", "forward", forward, (values | rest, x, None), calls, donated=(1,))
    chunk = Shape((min(stream.CHUNK // 2, step * length), model.width), model.config.dtype)
    loss, chunks = partial(tuning.head_divergence, model.head), calls / layers * step * length / chunk.shape[0]
    yield Program("tune", "divergence", loss, (head, chunk, chunk), chunks, layers * state)
    update = partial(tuning.update, model.layer)
    arguments = kernels, rest, ways_back, x, Shape((), jnp.float32)
    yield Program("tune", "backward and step", update, arguments, calls, (layers - 1) * state, donated=(0,))


def of_evaluation(
    model: Model, windows: int, length: int, stored: DTypeLike, *, tokens: int | None = None
) -> Iterator[Program]:
    """The programs that compare the pruned model with the dense one on a text; arguments as for `of_pruning`."""
    x = _states(model, batch_size(windows, length, tokens), length)
    forward = partial(stream.apply_layer, model.layer)
    passes = 2 * model.config.num_layers * windows / x.shape[0]
    arguments = _layer_params(model, stored), x, None
    resident = 2 * _bytes(x) + _bytes(arguments[0])
    yield Program("evaluate", "forward", forward, arguments, passes, resident, donated=(1,))
    chunk, head = min(stream.CHUNK // 2, windows * (length - 1)), _shapes(model.head.spec, stored)
    states, targets = Shape((chunk, model.width), model.config.dtype), Shape((chunk,), jnp.int32)
    divergence = partial(text.divergence, (model.head, model.head))
    yield Program(
        "evaluate",
        "divergence",
        divergence,
        ((head, head), (states, states), targets),
        windows * (length - 1) / chunk,
    )


def solve(method: Method, pattern: Pattern, prepared: Any, weight: jax.Array) -> Any:
    return method.solve(prepared, weight, pattern)


def _layer_params(model: Model, stored: DTypeLike) -> dict[str, Shape]:
    return _shapes(model.layer.spec, stored)


def _shapes(spec: Mapping[str, Any], dtype: DTypeLike) -> dict[str, Shape]:
    return {path: devices.like(Shape(param.shape, dtype), None) for path, param in spec.items()}


def _states(model: Model, windows: int, length: int) -> Shape:
    """So many windows on each device."""
    shape = windows * devices.number(), length, model.width
    return devices.like(Shape(shape, model.config.dtype), 0)


def _bytes(tree: Any) -> int:
    """On one device."""
    return sum(_bytes_of(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def _bytes_of(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = sharding.shard_shape(leaf.shape) if isinstance(sharding, NamedSharding) else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize
