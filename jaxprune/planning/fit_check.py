"""Whether what a run needs is there: memory of devices and of the host, and disk; and what to
change where not."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

from convert.files import existing_parent
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.distill.tuning_costs import best_step_bytes
from jaxprune.errors import Change, InputError
from jaxprune.hardware import HEADROOM, device_memory
from jaxprune.planning.estimate import GIB, Need, need
from jaxprune.planning.this_machine import available_memory
from jaxprune.run_store.opening import store_folder


class Shortage(InputError):
    """What a run needs more than there is; its options say what would help."""


def require_fit(run: RunSizes) -> Need:
    """Returns what a run needs, once it is known to fit.

    Raises:
        InputError: it does not; all that is short is named.
    """
    within = (available_memory() if run.on_cpu else device_memory()) or 0
    found = need(run, within / 4)
    if short := list(shortages(found, run)):
        problems = "; ".join(str(one) for one in short)
        options = {name: value for one in short for name, value in one.options.items()}
        raise InputError(
            f"the run does not fit: {problems}", options={**options, "unchecked": True}
        )
    return found


def shortages(need: Need, run: RunSizes) -> Iterator[Shortage]:
    """Yields what does not fit, and what to change."""
    yield from device_shortages(need, run)
    yield from _host_and_disk(need, run)


def device_shortages(need: Need, run: RunSizes) -> Iterator[Shortage]:
    """Yields what does not fit on a device."""
    device = run.device_bytes or device_memory()
    for phase, row in need.phases.items():
        size = row.device
        if device is not None and size > HEADROOM * device:
            remedies: dict[str, Any] = {"seqlen": Change.LOWER}
            if phase == "solve":
                remedies = {"devices": Change.RAISE}
            elif phase == "tune":
                remedies = _untuned(run) | {"seqlen": Change.LOWER}
            yield Shortage(
                f"{phase} needs {size / GIB:.1f} GiB on a device, of which "
                f"{HEADROOM * device / GIB:.1f} can be had",
                options=remedies,
            )


def _untuned(run: RunSizes) -> dict[str, Any]:
    """Returns the options that leave the distillation out."""
    return {"tune_tokens" if run.recipe.tuning.tune_tokens else "tune_epochs": 0}


def _host_and_disk(need: Need, run: RunSizes) -> Iterator[Shortage]:
    """Yields what does not fit in host memory, or on a disk."""
    host, phase = max(
        (row.host + run.on_cpu * row.device, phase) for phase, row in need.phases.items()
    )
    free = available_memory()
    if host > free:
        problem = (
            f"{phase} needs {host / GIB:.1f} GiB of host memory, of which {free / GIB:.1f} are free"
        )
        in_memory = run.scratch is None  # the hidden states
        remedies: dict[str, Any] = {}
        if phase == "tune":  # most is weights: only what is enough
            if host - (best := best_step_bytes(run)) <= free:
                problem += (
                    f", {best / GIB:.1f} of them to keep the weights of the best step, as epochs "
                    "do not"
                )
                remedies["tune_epochs"] = 2
            if in_memory and host - need.phases[phase].states <= free:
                remedies["hidden"] = "disk"
            remedies |= _untuned(run)
        else:
            remedies |= {"nsamples": Change.LOWER, "seqlen": Change.LOWER}
            remedies |= {"hidden": "disk"} if in_memory else {}
        yield Shortage(problem, options=remedies)
    disk, room = sum(need.disk.values()), free_disk(run)
    if run.scratch:
        states, has = need.states, shutil.disk_usage(run.scratch).free
        if os.stat(run.scratch).st_dev == os.stat(existing_parent(run.out)).st_dev:
            disk += int(states)
        elif states > has:
            yield Shortage(
                f"{states / GIB:.1f} GiB are needed in {run.scratch}, {has / GIB:.1f} are free",
                options={"scratch": Change.OTHER},
            )
    if disk > room:
        yield Shortage(
            f"{disk / GIB:.1f} GiB of disk are needed, {room / GIB:.1f} are free there",
            options={"out": Change.OTHER},
        )


def free_disk(run: RunSizes) -> int:
    """Returns the bytes that the output's disk has free, with what the run has there already."""
    own = sum(path.stat().st_size for path in store_folder(run.out).rglob("*") if path.is_file())
    return shutil.disk_usage(existing_parent(run.out)).free + own
