"""What it costs to solve the layers of a model: the programs that `solve_layer` calls, with their
shapes, and what pruning and quantization keep."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape

from jaxprune.costs.flops import Flops
from jaxprune.costs.program import PhaseCosts, Program, size_of
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.costs.shapes import Shapes
from jaxprune.methods import Method
from jaxprune.methods.gram import products, shifted_target
from jaxprune.methods.magnitude import Magnitude
from jaxprune.methods.quantization import BITS, quantize
from jaxprune.models import Layer
from jaxprune.solve import gram_matrices, kernel, sensitivity
from jaxprune.solve.gram_matrices import ExpertTotals, Totals
from jaxprune.sparsity.patterns import Given, Pattern, Unstructured


def pruning(run: RunSizes) -> PhaseCosts:
    """Returns what the loop that prunes layer after layer costs."""
    recipe, given = run.recipe, run.recipe.pattern
    # a given mask takes no more than selecting one
    pattern: Pattern = Unstructured(0.5) if isinstance(given, Given) else given
    models = 2 if recipe.asymmetry else 1
    layers, states = len(run.architecture.layers), run.states_bytes(run.windows)
    weights = run.devices.count * run.stored_bytes("layers.")
    transfers = {
        # the states after dense layers come and go, those after pruned ones come
        "gram": weights + (2 * models - 1) * layers * states,
        "solve": run.pruned_bytes + run.mask_bytes,
        "forward": run.devices.count * run.pruned_bytes + 2 * (layers - 1) * states,
    }
    host = 2 * sensitivity.token_bytes(run) if recipe.importance.weighs else 0
    disk = {"hidden states": 2 * models * states}
    sizes = run.solved, run.windows, run.length
    every = programs(*sizes, recipe.method, pattern, asymmetry=recipe.asymmetry > 0)
    return PhaseCosts(every, models * states, transfers, host, disk)


def without_zeros(run: RunSizes) -> PhaseCosts:
    """Returns what the loop costs that takes layers as they are: nothing is computed."""
    return PhaseCosts((), 0, {"solve": 0})


def quantization(run: RunSizes) -> PhaseCosts:
    """Returns what the loop that brings layers to a grid costs."""
    layers, states = len(run.architecture.layers), run.states_bytes(run.windows)
    moved = 2 * run.devices.count * run.stored_bytes("layers.") + 3 * layers * states
    transfers = {"quantize": moved + run.pruned_bytes + run.mask_bytes}
    sizes, kind = (run.solved, run.windows, run.length), run.recipe.quantize
    every = programs(*sizes, Magnitude(), Unstructured(0.0), quantization=kind)
    of_phase = (dataclasses.replace(program, phase="quantize") for program in every)
    return PhaseCosts(of_phase, states, transfers)


def programs(
    shapes: Shapes,
    windows: int,
    length: int,
    method: Method,
    pattern: Pattern,
    *,
    quantization: str | None = None,
    asymmetry: bool = False,
) -> Iterator[Program]:
    """Yields the programs that `solve_layer` calls on all layers.

    Args:
        shapes: the shapes of the run.
        windows: the number of calibration windows.
        length: tokens of a window.
        method: prunes each kernel.
        pattern: the pattern of each kernel.
        quantization: the type on whose grid kernels come after that; None: on none.
        asymmetry: whether the dense model goes along, and kernels make up for what their inputs
            lost.
    """
    x = shapes.batch(windows, length)
    solves = _Solves(shapes, method, pattern, quantization, asymmetry)
    for layer, count in shapes.layers.items():
        stack, params = 0, shapes.layer_params(layer)
        for totals, groups in sums(shapes, layer).items():
            given, total = [x], dict(totals)
            stack = max(stack, size_of([one for one in total.values() if _of_experts(one)]))
            add: Any = gram_matrices.accumulate
            if asymmetry:
                add, given = gram_matrices.accumulate_shift, [x, x]
            yield Program(
                "gram",
                "forward and Gram matrices",
                partial(add, layer),
                (params, *given, {}, [total, total] if asymmetry else total),
                count * groups * windows / x.shape[0],
                2 * size_of(given),  # one batch on its way in, one on its way out
                expert_flops(shapes, total, x.shape[0] * length),
            )
        yield from solves.programs(layer, count, stack)
        # nothing reads the last layer's output
        passed = count - (layer is shapes.architecture.layers[-1])
        yield shapes.forward("forward", layer, x, windows * passed)


def sums(
    shapes: Shapes, layer: Layer, captures: Collection[str] | None = None
) -> Counter[tuple[tuple[str, Any], ...]]:
    """Returns what Gram matrices are summed in, as items of `Totals` -> how many groups of a
    layer's inputs are summed in the like.

    Args:
        shapes: the shapes of the run.
        layer: the kind of layer.
        captures: the inputs; None: those of all linear layers but routers.
    """
    wanted = [
        capture
        for capture, paths in layer.inputs.items()
        if (capture in captures if captures is not None else not layer.routers.issuperset(paths))
    ]
    most, devices = gram_matrices.most_bytes(shapes.device_bytes), shapes.devices
    first = devices.abstract(Shape((), jnp.int32), None)
    found: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for group in gram_matrices.groups(layer, wanted, most, devices):
        total = gram_matrices.sums(layer, group, devices, devices.count)
        alike = jax.tree.map(lambda leaf: leaf if isinstance(leaf, Shape) else first, total)
        found[tuple(alike.items())] += 1
    return found


def _of_experts(total: Any) -> bool:
    return isinstance(total, ExpertTotals)


def expert_flops(shapes: Shapes, totals: Totals, tokens: int) -> Flops:
    """Returns those of experts' Gram matrices, when so many tokens are spread over all experts
    evenly."""
    routing, found = shapes.architecture.config.routing, Flops()
    for total in filter(_of_experts, totals.values()):
        count, n, _ = total.gram.shape
        rows = tokens if routing.route_all else tokens * routing.per_token // routing.experts
        found["float32"] += 2 * rows * count * products(n)
    return found


@dataclasses.dataclass(frozen=True)
class _Solves:
    """How the kernels of all layers are solved; see `programs` for the attributes."""

    shapes: Shapes
    method: Method
    pattern: Pattern
    quantization: str | None
    asymmetry: bool

    @cached_property
    def solving(self) -> Mapping[bool, partial[Any]]:
        """Whether the pattern fits a kernel -> its solve; where not, a rule gives another pattern,
        or none. Each is compiled once for all kernels of a shape."""
        patterns = {True: self.pattern, False: Unstructured(self.pattern.sparsity)}
        return {fits: partial(solve, self.method, one) for fits, one in patterns.items()}

    def programs(self, layer: Layer, count: int, stack: int) -> Iterator[Program]:
        """Yields the programs of the solves of a kind of layers.

        Args:
            layer: of that kind.
            count: the number of layers.
            stack: bytes of experts' Gram matrices that wait for their solves.
        """
        abstract = self.shapes.devices.abstract
        reads = {
            capture: paths
            for capture, paths in layer.reads.items()
            if not layer.routers.issuperset(paths)
        }
        grams = {
            capture: abstract(Shape((layer.features(capture),) * 2, jnp.float32), None)
            for capture in reads
        }
        waiting = {
            capture: gram
            for capture, gram in grams.items()
            if reads[capture][0] not in layer.experts
        }
        params = size_of(self.shapes.layer_params(layer))
        for capture, paths in reads.items():
            gram, times = grams[capture], count * layer.experts.get(paths[0], 1)
            waiting.pop(capture, None)
            made = jax.eval_shape(self.method.prepare, gram)
            prepared = jax.tree.map(lambda leaf: abstract(leaf, None), made)
            resident = params + stack + size_of(waiting)
            if self.asymmetry:
                resident += size_of((waiting, gram))
            prepare = self.method.prepare
            yield Program("solve", f"prepare {capture}", prepare, (gram,), times, resident)
            for path in paths:
                weight = abstract(Shape(layer.linears[path][-2:], jnp.float32), -1)
                for name, function, arguments, more in self._of_kernel(gram, prepared, weight):
                    beside = resident + more
                    yield Program("solve", f"{name} {path}", function, arguments, times, beside)

    def _of_kernel(self, gram: Shape, prepared: Any, weight: Shape) -> Iterator[tuple[Any, ...]]:
        """Yields names, functions and arguments of the programs of one kernel, and the bytes of the
        Gram matrix and of what is prepared of it where they are no arguments."""
        devices, pattern = self.shapes.devices, self.pattern
        of_gram, of_prepared = size_of(gram), size_of(prepared)
        if self.asymmetry:
            arguments: tuple[Any, ...] = gram, gram, weight, Shape((), jnp.float32)
            yield "target of", shifted_target, arguments, of_prepared - of_gram
        fits = not pattern.group or weight.shape[0] % pattern.group == 0
        yield "solve", self.solving[fits], (prepared, weight), of_gram
        mask = devices.abstract(Shape(weight.shape, jnp.bool_), -1)
        if self.quantization:
            moving = partial(quantize, bits=BITS[self.quantization])
            yield "quantize", moving, (gram, weight, weight, mask), of_prepared
        stored = devices.abstract(Shape(weight.shape, self.shapes.stored), -1)
        yield "store", kernel.store, (gram, stored, weight), of_prepared + mask.size


def solve(method: Method, pattern: Pattern, prepared: Any, weight: jax.Array) -> Any:
    """Calls a method, in the order of arguments that `partial` needs."""
    return method.solve(prepared, weight, pattern)
