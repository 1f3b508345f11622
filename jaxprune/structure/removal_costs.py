"""What it costs to remove heads or channels, and to choose a mix of parts: the programs, with their
shapes."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape

from jaxprune.costs.program import PhaseCosts, Program, size_of
from jaxprune.costs.run_sizes import Removal, RunSizes
from jaxprune.costs.shapes import Shapes
from jaxprune.evaluation import perplexity
from jaxprune.models import Layer
from jaxprune.solve import gram_matrices, layer_costs, sensitivity
from jaxprune.structure import input_groups, mix
from jaxprune.structure.removal import WINDOWS
from jaxprune.structure.shapes import Units, measured_units, units_of

PLANNED = 3
"""The number of mixes that a plan assumes: the first one, and one step to heads and to layers."""


def costs(kind: str, run: RunSizes) -> PhaseCosts:
    """Returns what the removal of one kind of parts costs.

    Args:
        kind: heads or channels.
        run: the sizes of the run.
    """
    removal = run.removal_of(kind)
    layers, states = len(removal.before.layers), run.states_bytes(run.windows)
    weights = run.devices.count * run.stored_bytes("layers.")
    kept, moved = sensitivity.states_and_transfers(run, min(WINDOWS, run.windows))
    moved += 2 * weights + (3 * layers - 2) * states
    return PhaseCosts(
        programs(run, removal),
        max(states, kept),
        {kind: moved},
        disk={"hidden states": 2 * states},
    )


def programs(run: RunSizes, removal: Removal) -> Iterator[Program]:
    """Yields the programs of a removal."""
    shapes, after = (run.shapes_of(one) for one in (removal.before, removal.after))
    smaller_of = dict(zip(removal.before.layers, removal.after.layers, strict=True))

    def measured(layer: Layer) -> sensitivity.Units:
        return measured_units(layer, units_of(layer, smaller_of[layer], removal.groups))

    some = min(WINDOWS, run.windows)
    yield from sensitivity.programs(shapes, some, run.length, units=measured, phase=removal.kind)
    x = shapes.batch(run.windows, run.length)
    last = removal.after.layers[-1]
    passed = dict(after.layers)
    passed[last] -= 1  # nothing reads the last layer's output
    for layer, smaller in smaller_of.items():
        count = shapes.layers[layer]
        units = units_of(layer, smaller, removal.groups)
        params = shapes.layer_params(layer)
        for totals, groups in layer_costs.sums(shapes, layer, units).items():
            given = dict(totals)
            yield Program(
                removal.kind,
                "forward and Gram matrices",
                partial(gram_matrices.accumulate, layer),
                (params, x, {}, given),
                count * groups * run.windows / x.shape[0],
                2 * size_of(x),
                layer_costs.expert_flops(shapes, given, x.shape[0] * run.length),
            )
        for one in units.values():
            yield from _of_input(shapes, layer, one, removal.kind, count, size_of(params))
        yield after.forward(removal.kind, smaller, x, run.windows * passed[smaller])


def _of_input(
    shapes: Shapes, layer: Layer, units: Units, kind: str, count: int, resident: int
) -> Iterator[Program]:
    """Yields the programs that choose the units of one input, and re-optimize what reads them."""
    n = layer.kernels[units.readers[0]][0]
    m = sum(layer.kernels[path][1] for path in units.readers)
    abstract = shapes.devices.abstract
    gram, kernel = (
        abstract(Shape((n, n), jnp.float32), None),
        abstract(Shape((n, m), jnp.float32), -1),
    )
    rows = Shape((units.keep * n // units.count,), jnp.int32)
    changes = Shape((units.count,), jnp.float32)
    select = partial(input_groups.selected, units.keep)
    given = gram, kernel, changes
    yield Program(kind, f"select inputs of {units.readers[0]}", select, given, count, resident)
    solve = input_groups.optimum
    yield Program(kind, f"solve {units.readers[0]}", solve, (gram, kernel, rows), count, resident)


def mix_costs(run: RunSizes) -> PhaseCosts:
    """Returns what the choice of a mix costs, if a few mixes are tried, all about as costly as the
    removal of channels alone."""
    count = min(mix.WINDOWS, run.windows)
    few = dataclasses.replace(run, windows=count)
    one = costs("channels", few)
    moved = sum(one.transfers.values()) * PLANNED
    return PhaseCosts(mix_programs(few), 3 * one.states, {"mix": moved}, disk=one.disk)


def mix_programs(run: RunSizes) -> Iterator[Program]:
    """Yields the programs that choose a mix."""
    removal = run.removal_of("channels")
    for program in programs(run, removal):
        yield dataclasses.replace(program, phase="mix", calls=PLANNED * program.calls)
    for architecture, times in ((removal.before, 1), (removal.after, PLANNED)):
        shapes = run.shapes_of(architecture)
        x = shapes.batch(run.windows, run.length)
        for layer, number in shapes.layers.items():
            yield shapes.forward("mix", layer, x, times * number * run.windows)
    tokens = run.windows * (run.length - 1)
    yield perplexity.comparison("mix", run.shapes_of(removal.after), tokens, 2, PLANNED)
