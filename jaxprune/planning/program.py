"""A compiled program: the FLOPs and the memory of a call, before anything is run, and the shapes of
a run.

FLOPs are those of matrix products and factorizations, counted in the program itself, so that what a
program skips is not counted. Bytes are those of the compiler's own memory analysis. Neither needs
weights, text or the device's time.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import jax
from jax import ShapeDtypeStruct as Shape
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.lax import DotAlgorithmPreset
from jax.sharding import NamedSharding
from jaxtyping import DTypeLike

from jaxprune.models import Architecture, Layer
from jaxprune.sharding import Devices
from jaxprune.streaming.hidden_states import batch_size

Flops = Counter[str]
"""Kind of products -> floating-point operations: the dtype of the operands, for each runs at a rate
of its own, or `BF16X6`."""
BF16X6 = "bf16x6"
"""Products of float32 by six of bfloat16 parts."""
CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""JAX's names of cuDNN's attention -> products for each pair of tokens."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a run.

    Attributes:
        phase: the phase of the run that calls it.
        name: what it computes.
        function: the function to be compiled.
        arguments: shapes and dtypes; arrays where the time of a call depends on their values.
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
        return count_flops(self._traced.jaxpr.jaxpr) + self.beside

    def most_bytes(self) -> int:
        """Returns no less than a call's device memory, without compiling: as if every intermediate
        result stayed."""
        return self.resident + size_of(self.arguments) + _produced(self._traced.jaxpr.jaxpr)

    def compiled(self, options: Mapping[str, Any] = MappingProxyType({})) -> jax.stages.Compiled:
        """Compiles the program, for the devices that its arguments lie on; options are the
        compiler's."""
        return self._traced.lower().compile(compiler_options=dict(options))

    def peak_bytes(self, compiled: jax.stages.Compiled | None = None) -> int:
        """Returns the device memory during a call: arguments, results and intermediate results, and
        what else is there.

        The compiler decides it, so the program is compiled, not run; None: it is compiled here.
        """
        compiled = compiled or self.compiled()
        memory = compiled.memory_analysis()
        assert memory is not None
        return (
            self.resident
            + outside_bytes(compiled)
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )

    def lowered(self, platform: str) -> str:
        """Lowers to StableHLO for a platform, cuda or tpu for example, which need not be there; it
        is written for `hardware.current`."""
        return self._traced.lower(lowering_platforms=(platform,)).as_text()

    @functools.cached_property
    def _traced(self) -> Any:
        """The program as JAX traces it; a function of the run's own is compiled for the run as
        well."""
        function = self.function if isinstance(self.function, partial) else partial(self.function)
        if hasattr(function.func, "trace"):
            return function.func.trace(*function.args, *self.arguments, **function.keywords)
        return jax.jit(self.function, donate_argnums=self.donated).trace(*self.arguments)


def outside_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes of a program's arguments and results."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.argument_size_in_bytes + memory.output_size_in_bytes


_once = functools.lru_cache(4096)
"""JAX traces a function once for the same shapes, so programs share most of what is inside them."""


@_once
def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> Flops:
    """Counts the FLOPs of the products and factorizations that a program's results need.

    A product of n·k by k·m is 2nkm; a Cholesky factorization n³/3; a triangular solve n²m;
    eigenvectors about 9n³. A loop whose number of iterations depends on the data counts as one
    iteration. cuDNN's causal attention counts the pairs of tokens that see each other: two products
    of each, five for its gradient.

    Args:
        jaxpr: the program.

    Returns:
        The count, which is not to be changed: it is that of the next call, too.
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
    inner = [count_flops(program) for program in _inside(equation)]
    if inner:
        if name == "cond":
            return max(inner, key=lambda flops: sum(flops.values()))
        times = params["length"] if name == "scan" else 1
        return Flops(
            {dtype: times * sum(flops[dtype] for flops in inner) for dtype in set().union(*inner)}
        )
    if name not in ("dot_general", "cholesky", "triangular_solve", "eigh", *CUDNN):
        return Flops()
    operand: Any = equation.invars[0].aval
    shape, result = operand.shape, equation.outvars[0].aval
    if name in CUDNN:
        b, t, h, d = shape
        window = min(t, params["sliding_window_length"] or t)
        count = 2 * CUDNN[name] * b * h * d * (window * t - window * (window - 1) // 2)
    elif name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        count = 2 * result.size * math.prod(shape[axis] for axis in contracted)
    elif name == "cholesky":
        count = shape[-1] ** 3 // 3
    elif name == "triangular_solve":
        count = shape[-1] * result.size
    else:
        count = 9 * shape[-1] ** 3
    by_parts = params.get("precision") == DotAlgorithmPreset.BF16_BF16_F32_X6
    return Flops({BF16X6 if by_parts else operand.dtype.name: count})


@_once
def _produced(jaxpr: Jaxpr) -> int:
    """Returns the bytes of the results of all equations; those of a loop's body count once."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(_bytes_of(v.aval) for v in equation.outvars if hasattr(v.aval, "dtype"))
        for inner in _inside(equation):
            total += _produced(inner)
    return total


def _inside(equation: JaxprEqn) -> list[Jaxpr]:
    """Returns the programs inside an equation, without their constants, which no count needs."""
    values = (value if isinstance(value, tuple) else (value,) for value in equation.params.values())
    every = [one for one in chain.from_iterable(values) if isinstance(one, ClosedJaxpr | Jaxpr)]
    return [one.jaxpr if isinstance(one, ClosedJaxpr) else one for one in every]


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
        return {
            path: self.devices.abstract(Shape(param.shape, dtype), None)
            for path, param in spec.items()
        }

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
        return self.states(
            batch_size(windows, length, tokens or self.tokens, self.devices.count), length
        )


def size_of(tree: Any) -> int:
    """Returns the bytes on one device."""
    return sum(_bytes_of(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def _bytes_of(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape
    # else it is a device's own already
    if isinstance(sharding, NamedSharding) and not sharding.mesh.manual_axes:
        shape = sharding.shard_shape(shape)
    return math.prod(shape) * leaf.dtype.itemsize
