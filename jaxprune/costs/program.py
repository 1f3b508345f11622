"""A compiled program of a run: its FLOPs and its memory, before anything runs; and what a phase
costs.

Bytes are those of the compiler's own memory analysis. Neither count needs weights, text or the
device's time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
from jax.extend.core import Jaxpr
from jax.sharding import NamedSharding

from jaxprune.costs.flops import Flops, count_flops, inner_programs


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a run.

    Attributes:
        phase: the phase of the run that calls it.
        name: what it computes.
        function: the function to be compiled.
        arguments: shapes and dtypes; arrays where the time of a call depends on their values.
        calls: how often a run calls it.
        resident: bytes on the device meanwhile which are not its arguments.
        uncounted: FLOPs of a call in loops whose length depends on the data.
    """

    phase: str
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: float
    resident: int = 0
    uncounted: Flops = dataclasses.field(default_factory=Flops)

    def flops(self) -> Flops:
        """Counts the FLOPs of one call."""
        return count_flops(self._traced.jaxpr.jaxpr) + self.uncounted

    @property
    def donated(self) -> list[int]:
        """The numbers of the arguments whose memory it may reuse."""
        given = self._traced.args_info[0]
        return [
            number
            for number, argument in enumerate(given)
            if any(leaf.donated for leaf in jax.tree.leaves(argument))
        ]

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
        inside = memory.temp_size_in_bytes - memory.alias_size_in_bytes
        return self.resident + outside_bytes(compiled) + inside

    def lowered(self, platform: str) -> str:
        """Lowers to StableHLO for a platform, cuda or tpu for example, which need not be there; it
        is written for `hardware.current`."""
        return self._traced.lower(lowering_platforms=(platform,)).as_text()

    @functools.cached_property
    def _traced(self) -> Any:
        """The program as JAX traces it; a function that is not compiled by itself is compiled
        whole."""
        function = self.function if isinstance(self.function, partial) else partial(self.function)
        if hasattr(function.func, "trace"):
            return function.func.trace(*function.args, *self.arguments, **function.keywords)
        return jax.jit(self.function).trace(*self.arguments)


@dataclasses.dataclass(frozen=True)
class PhaseCosts:
    """What a phase of a run costs, beside what all of them need.

    Attributes:
        programs: its compiled programs. A plan has a row for each `Program.phase`.
        states: bytes of the hidden states that are on the host at a time, of all processes.
        transfers: row of the plan -> bytes to all devices and back.
        host: other bytes in host memory.
        disk: what -> bytes on the output's disk at most, until the run ends.
    """

    programs: Iterable[Program]
    states: int
    transfers: Mapping[str, float]
    host: float = 0.0
    disk: Mapping[str, int] = dataclasses.field(default_factory=dict)


def outside_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes of a program's arguments and results."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.argument_size_in_bytes + memory.output_size_in_bytes


@functools.lru_cache(4096)
def _produced(jaxpr: Jaxpr) -> int:
    """Returns the bytes of the results of all equations; those of a loop's body count once."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(_bytes_of(v.aval) for v in equation.outvars if hasattr(v.aval, "dtype"))
        total += sum(map(_produced, inner_programs(equation)))
    return total


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
