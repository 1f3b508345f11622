"""Say what a run would need, and whether it fits; config.json alone is enough."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from convert.command import worded
from convert.files import expand
from jaxprune.commands.config import Config, read
from jaxprune.commands.progress import longest
from jaxprune.commands.terminal import choose_devices, console, duration, print_table, run_main
from jaxprune.planning import fit, preflight
from jaxprune.planning.machine import hardware
from jaxprune.planning.preflight import GIB, Need, Work
from jaxprune.pruning.experts import without_experts
from jaxprune.pruning.whole_model import require_recipe
from jaxprune.recipe import Recipe
from jaxprune.sharding import Devices

DESCRIPTION = "Say what a run would need, and whether it fits; it takes the flags of jaxprune prune."
EXAMPLES = """Examples:

    jaxprune plan --ckpt llama2-70b --device-memory 16 --dtype bfloat16
    jaxprune plan --ckpt ./model --preset best --sparsity 0.7"""
EVALUATION_TOKENS = 350_000
"""Assumed of a text where --eval-windows does not say: WikiText-2's test split has so many."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0 if the run fits, else 1."""
    return run_main(lambda argv: plan(*read(argv, "jaxprune plan", DESCRIPTION, EXAMPLES)[1:]), argv)


def plan(config: Config, recipe: Recipe) -> int:
    """Prints what a run would need; returns the exit status.

    Raises:
        InputError, CheckpointError: something cannot be used.
    """
    work = work_of(config, recipe, choose_devices(config.device, config.devices, config.join))
    need = preflight.need(work)
    times = {} if work.device_bytes else preflight.seconds(need, work.devices)
    header, rows = table(need, work, times)
    print_table(rows, header)
    disk = ", ".join(f"{what} {size / GIB:.2f}" for what, size in need.disk.items() if size)
    console.print(f"disk, GiB, at most: {disk}; kept in the end: {need.kept / GIB:.2f}")
    if work.scratch:
        console.print(f"scratch, GiB, at most: {max(need.scratch.values()) / GIB:.2f}")
    if times:
        console.print(f"time: from the matrix rate of {hardware()}, measured now; {longest(times)}")
    problems = list(fit.shortages(need, work))
    for problem in problems:
        console.print(f"does not fit: {worded(problem)}")
    if not problems:
        console.print("it fits")
    return int(bool(problems))


def work_of(config: Config, recipe: Recipe, devices: Devices) -> Work:
    """Returns what a run is asked to do, from headers or config.json alone.

    Raises:
        InputError, CheckpointError: there is not even that, or the windows are longer than the model takes.
    """
    assert config.out
    spec, architecture = preflight.shapes_of(config.ckpt, config.computation_dtype)
    architecture.require_length(config.seqlen)
    require_recipe(without_experts(architecture, recipe.experts.drop_experts), recipe)
    evaluation = None
    if "ppl" in config.measures:
        length = config.eval_seqlen or config.seqlen
        evaluation = config.eval_windows or max(1, EVALUATION_TOKENS // length), length
    return Work(
        spec,
        architecture,
        recipe,
        config.nsamples,
        config.seqlen,
        evaluation,
        Path(expand(config.out)).absolute(),
        config.scratch_folder(config.out),
        devices,
        config.device_memory * GIB if config.device_memory else None,
    )


def table(need: Need, work: Work, times: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: what each phase needs, and how many seconds it takes, where that is known."""
    rows = []
    for phase, device in need.device.items():
        row = [phase, _gib(device), _gib(need.host[phase] + work.on_cpu * device)]
        row.append(_tera(sum(need.flops[phase].values())))
        rows.append([*row, duration(times[phase])] if times else row)
    every = sum(sum(flops.values()) for flops in need.flops.values())
    most = max(need.host[phase] + work.on_cpu * device for phase, device in need.device.items())
    rows.append(["all", _gib(max(need.device.values())), _gib(most), _tera(every)])
    rows[-1] += [duration(sum(times.values()))] * bool(times)
    return ["", "device, GiB", "host, GiB", "TFLOP", *["about"] * bool(times)], rows


def _tera(count: int) -> str:
    """Returns TFLOP, four digits or more."""
    return f"{count / 1e12:,.0f}" if count >= 1e15 else f"{count / 1e12:.4g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


if __name__ == "__main__":
    sys.exit(main())
