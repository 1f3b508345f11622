"""Print what a run would need, and whether it fits. config.json alone is enough.

It takes the flags of jaxprune prune. Exit status: 0 if the run fits, else 1.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.command import worded
from convert.errors import InputError
from convert.files import expand
from jaxprune.commands.progress import longest
from jaxprune.commands.prune import require_suitable
from jaxprune.commands.run_options import Config, group_of, read
from jaxprune.commands.terminal import choose_devices, command, console, duration, print_table
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.hardware import writing_for
from jaxprune.phases import require_recipe
from jaxprune.planning import estimate, fit_check
from jaxprune.planning.estimate import GIB, Need
from jaxprune.planning.target_hardware import Target, target_of, without_cache
from jaxprune.planning.this_machine import describe_hardware, matrix_rate
from jaxprune.recipe import Recipe
from jaxprune.sharding import Devices
from jaxprune.solve.rules import effective_recipe

EXAMPLES = """Examples:

    jaxprune plan --ckpt llama2-70b --device-memory 16 --dtype bfloat16
    jaxprune plan --ckpt ./model --preset best --sparsity 0.7"""
EVALUATION_TOKENS = 350_000
"""Assumed length of a text without --eval-windows: that of WikiText-2's test split."""
WORTH_A_WORD = 1.3
"""Minimum speedup of matrix products in bfloat16 for which the plan suggests --dtype."""


@partial(command, group_of=group_of)
def main(argv: Sequence[str]) -> int:
    """Runs a command line."""
    _, config, recipe, sparsity = read(argv, __name__)
    return plan(config, recipe, sparsity)


def plan(config: Config, recipe: Recipe, sparsity: float | None = None) -> int:
    """Prints what a run would need; returns the exit status.

    Args:
        config: the options of the run.
        recipe: its recipe.
        sparsity: the sparsity that the user typed, if any: see `rules.require_sparsity`.

    Raises:
        InputError, CheckpointError: something cannot be used.
    """
    if config.target:
        return _plan_for_targets(config, recipe, sparsity)
    devices = choose_devices(config.device, config.devices, config.meeting(recipe))
    require_suitable(config, recipe, sparsity)
    run = sizes_of(config, recipe, devices)
    need = estimate.need(run)
    times = {} if run.device_bytes else estimate.seconds(need, run.devices)
    host = {phase: row.host + run.on_cpu * row.device for phase, row in need.phases.items()}
    columns = [_device_column(need), Column("host, GiB", host, max, _gib), _flops_column(need)]
    if times:
        columns.append(Column("about", times, sum, duration))
    _print_phases(need.phases, columns)
    disk = ", ".join(f"{what} {size / GIB:.2f}" for what, size in need.disk.items() if size)
    console.print(f"disk, GiB, at most: {disk}; kept in the end: {need.kept / GIB:.2f}")
    if run.scratch:
        console.print(f"scratch, GiB, at most: {need.states / GIB:.2f}")
    _say_uncounted(config)
    _say_patterns(run)
    if times:
        console.print(
            f"time: from the matrix rate of {describe_hardware()}, measured now; {longest(times)}"
        )
        if run.on_cpu and np.dtype(run.architecture.config.dtype) == np.float32:
            gain = matrix_rate("bfloat16") / matrix_rate("float32")
            if gain > WORTH_A_WORD:
                console.print(
                    f"products in bfloat16 are {gain:.1f} times as fast: try --dtype bfloat16"
                )
    problems = list(fit_check.shortages(need, run))
    for problem in problems:
        console.print(f"does not fit: {worded(problem)}")
    if not problems:
        console.print("it fits")
    return int(bool(problems))


def _plan_for_targets(config: Config, recipe: Recipe, sparsity: float | None) -> int:
    """Prints the needs and the time of a run on target hardware; returns the exit status."""
    for name, given in (
        ("device", config.device != "auto"),
        ("device-memory", config.device_memory is not None),
    ):
        if given:
            raise InputError(f"--target already selects the hardware: leave --{name} out")
    require_suitable(config, recipe, sparsity)
    names = [name.strip() for name in (config.target or "").split(",")]
    targets, count = {name: target_of(name) for name in names}, config.devices or 1
    for target in targets.values():
        if not target.has_compiler:
            if count > 1:
                raise InputError(
                    f"several {target.display_name} need their compiler: {target.install}"
                )
            console.print(
                f"The compiler for {target.display_name} is not installed ({target.install}). "
                "The plan counts every intermediate result in memory and omits memory traffic."
            )
    summary: list[list[str]] = []
    problems: list[str] = []
    for name, target in targets.items():
        devices = target.devices(count) if target.has_compiler else Devices()
        with writing_for(target.hardware), without_cache():
            run = sizes_of(config, recipe, devices, target)
            need = estimate.need(run, target=target)
        console.print(f"{count} × {target.display_name}")
        _print_phases(need.phases, _target_columns(need))
        short = list(fit_check.device_shortages(need, run))
        if target.has_compiler:
            fits = "no" if short else "yes"
            problems += [f"does not fit: {name}: {worded(one)}" for one in short]
        else:  # without the compiler, the need is an upper bound
            fits = "perhaps" if short else "yes"
            problems += [f"may not fit (its compiler can tell): {name}: {one}" for one in short]
        needed = f"{_gib(need.device)} of {_gib(target.usable)}"
        summary.append([name, needed, fits, duration(need.seconds)])
    if len(summary) > 1:
        print_table(summary, ["target", "device, GiB", "fits", "at least"])
    for problem in problems:
        console.print(problem)
    _say_uncounted(config)
    _say_patterns(run)
    console.print(
        "times are predictions at the data sheets' rates, without compilation or anything that the "
        "host does"
    )
    return int(bool(problems))


def _say_uncounted(config: Config) -> None:
    if uncounted := [name for name in config.measures if name != "ppl"]:
        console.print(f"not counted: --eval {','.join(uncounted)}")


def _say_patterns(run: RunSizes) -> None:
    """Says whether removed layers break a pattern that llama.cpp derives from layers' numbers."""
    structure = run.recipe.structure
    if not structure.layer_count:
        return
    removal = run.removal_of("layers")
    before, after = removal.before.config.kinds, removal.after.config.kinds
    if structure.chooses_layers and before.count(before[0]) < len(before):
        console.print(
            "kinds of layers alternate: name layers of whole periods in --drop-layers if "
            "you want a GGUF file of the result"
        )
    if structure.named_layers and after != before[: len(after)]:
        console.print(
            "no GGUF file can be made of the result: llama.cpp derives the kind of a layer "
            "from its number, and the layers that stay break this pattern"
        )


def sizes_of(
    config: Config, recipe: Recipe, devices: Devices, target: Target | None = None
) -> RunSizes:
    """Returns the sizes of a run, from headers or config.json alone.

    Raises:
        InputError, CheckpointError: there is not even that, or the windows are longer than the
            model takes.
    """
    assert config.out
    spec, saved, architecture, removed = estimate.shapes_of(
        config.ckpt, config.computation_dtype, config.save_dtype, recipe.structure
    )
    architecture.require_length(config.seqlen)
    left = removed[-1].after if removed else architecture
    require_recipe(left, recipe)
    length = config.eval_seqlen or config.seqlen
    text = config.eval_windows or max(1, EVALUATION_TOKENS // length), length
    return RunSizes(
        spec=spec,
        saved=saved,
        architecture=architecture,
        removals=removed,
        recipe=effective_recipe(left, recipe),
        windows=config.nsamples,
        length=config.seqlen,
        texts=[text] * len(config.plan().texts),
        out=Path(expand(config.out)).absolute(),
        scratch=config.scratch_folder(config.out),
        devices=devices,
        device_bytes=target.usable
        if target
        else config.device_memory * GIB
        if config.device_memory
        else None,
    )


class Column(NamedTuple):
    """A column of the table of phases.

    Attributes:
        heading: the heading.
        values: phase -> value; one that is not known is left out.
        total: all values -> the value of the last row.
        text: writes a value.
    """

    heading: str
    values: Mapping[str, float]
    total: Callable[[Iterable[float]], float]
    text: Callable[[float], str]


def _print_phases(phases: Iterable[str], columns: Sequence[Column]) -> None:
    """Prints a row for each phase, and one for all."""
    rows = [
        [phase, *(one.text(one.values[phase]) if phase in one.values else "" for one in columns)]
        for phase in phases
    ]
    totals = (one.text(one.total(one.values.values())) if one.values else "" for one in columns)
    print_table([*rows, ["all", *totals]], ["", *(one.heading for one in columns)])


def _target_columns(need: Need) -> list[Column]:
    """Returns what each phase needs and takes on a target."""

    def column(heading: str, field: str, text: Callable[[float], str]) -> Column:
        every = {phase: getattr(row, field) for phase, row in need.phases.items()}
        return Column(heading, every if any(every.values()) else {}, sum, text)

    sent = column("sent to others, GB", "exchanged", _giga)
    return [
        _device_column(need),
        _flops_column(need),
        column("in its memory, TB", "traffic", lambda count: f"{count / 1e12:.4g}"),
        *([sent] if sent.values else []),
        column("from and to the host, GB", "transfers", _giga),
        column("at least", "seconds", duration),
    ]


def _device_column(need: Need) -> Column:
    every = {phase: row.device for phase, row in need.phases.items()}
    return Column("device, GiB", every, max, _gib)


def _flops_column(need: Need) -> Column:
    every = {phase: row.flops.total() for phase, row in need.phases.items()}
    return Column("TFLOP", every, sum, _tera)


def _tera(count: float) -> str:
    """Returns TFLOP, four digits or more."""
    return f"{count / 1e12:,.0f}" if count >= 1e15 else f"{count / 1e12:.4g}"


def _giga(count: float) -> str:
    return f"{count / 1e9:.4g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
