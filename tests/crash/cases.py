"""What happens to a command at one of its file operations, and what must hold then and after the
same command again."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.ownership import MARKER
from tests.crash.operations import Answer, Operation
from tests.crash.processes import Command, clock
from tests.crash.world import LINES, Reference, World, Worlds, contents, digest, timeless

PHASES = {
    "publish": r"^(rename|link)\S* .* -> work/(out|masks) |^rename\S* work/(out|masks) ",
    "tidying": r"^(unlink|unlinkat|rmdir) ",
    "states": r"/states\.",
    "sensitivity": r"unfinished/sensitivity",
    "layer": r"unfinished/pruned",
    "tuning": r"unfinished/tuning",
    "tuned layer": r"unfinished/tuned",
    "record": r"jaxprune\.json|report\.html|README\.md",
    "masks": r"masks",
    "export": r"model.*safetensors|(config|tokenizer\S*|index)\.json|notes\.md",
    "reading": r"^read models",
    "store": r"unfinished",
}
"""Phase -> what its operations look like; the first that fits."""


def phase(operation: Operation) -> str:
    return next(
        (name for name, pattern in PHASES.items() if re.search(pattern, str(operation))), "other"
    )


Wanted = Callable[[Operation], bool]


def points(reference: Reference, wanted: Wanted) -> dict[str, list[Operation]]:
    """Phase -> the operations that something can happen at; one read a phase, for reading changes
    nothing."""
    found: dict[str, list[Operation]] = defaultdict(list)
    for operation in reference.operations:
        opens = (
            wanted is changes and str(operation).startswith("read models") and operation.times == 1
        )
        if wanted(operation) or opens:
            found[phase(operation)].append(operation)
    return found


def changes(operation: Operation) -> bool:
    return operation.changes


def grows(operation: Operation) -> bool:
    return operation.grows


class At:
    """An answer that is given at one operation, or from there on.

    Attributes:
        met: whether the operation came.
    """

    def __init__(self, which: str | int, given: int, lasting: bool = False) -> None:
        self._which, self._given, self._lasting = which, given, lasting
        self._number, self.met = 0, False

    def __call__(self, operation: Operation) -> int | None:
        self._number += operation.changes
        first = not self.met and self._which in (str(operation), self._number)
        self.met = self.met or first
        if self._lasting:
            refused = operation.changes if self._given == errno.EROFS else operation.grows
            return self._given if self.met and refused else None
        return self._given if first else None


def killed(worlds: Worlds, name: str, which: str | int, times: int = 1) -> list[str] | None:
    """Kills a command at an operation, its successors at random ones; returns what is wrong, None:
    it did not come."""
    world, reference = worlds.new(name), worlds.reference(name)
    generator, faults = random.Random(f"{name} {which}"), []
    for attempt in range(times):
        at = At(which, -signal.SIGKILL)
        command = world.start(LINES[name], at)
        status = command.wait()
        if not at.met:
            if attempt == 0:
                return None
            break
        if status != -signal.SIGKILL:
            faults.append(f"exit status {status}, although it was killed")
        faults += world.faults() + world.half_replaced(reference.result)
        which = generator.randint(1, 150)
    return faults + goes_on(world, name, reference)


def full(worlds: Worlds, name: str, which: str, error: int = errno.ENOSPC) -> list[str] | None:
    """The disk is full (or, error EROFS, cannot be written) from an operation on; then there is
    room again."""
    return _hindered(worlds, name, At(which, error, lasting=True), 2, "error: ")


class WithoutRenameat2:
    """The answers of a disk, such as NFS, that knows neither renames that replace nothing nor
    exchanges; two calls then make a rename, the first of which claims the name.

    Args:
        number: the rename into the folder of what is finished that is killed between its two calls;
            None: none is.

    Attributes:
        refused: how often the disk was asked for such a rename.
        met: whether there were so many.
    """

    def __init__(self, number: int | None = None) -> None:
        self._number, self._paths, self._calls, self._into = number, set[str](), 0, 0
        self.refused, self.met = 0, False

    def __call__(self, operation: Operation) -> int | None:
        if operation.call == "renameat2":
            self.refused += 1
            if re.search(r"-> work/out\.unfinished/(?!work-)", str(operation)):
                self._into += 1
                if self._into == self._number:
                    self._paths = set(operation.paths)
            return errno.EINVAL
        self._calls += operation.changes and not self._paths.isdisjoint(operation.paths)
        self.met = self.met or self._calls == 2
        return -signal.SIGKILL if self._calls == 2 else None


def elsewhere(worlds: Worlds, name: str) -> list[str]:
    """A command on a disk without `renameat2`."""
    world, answer = worlds.new(name), WithoutRenameat2()
    command = world.start(LINES[name], answer)
    faults = [f"exit status {status}: {command.printed()}"] if (status := command.wait()) else []
    faults += [] if answer.refused else ["the disk was asked for no such rename"]
    return faults + world.unfinished(*worlds.reference(name)[:2])


def killed_elsewhere(worlds: Worlds, name: str, number: int) -> list[str]:
    """Kills a command on such a disk in the middle of a rename, the one of this number."""
    world, answer = worlds.new(name), WithoutRenameat2(number)
    status = world.start(LINES[name], answer).wait()
    faults = [] if answer.met and status == -signal.SIGKILL else ["it was not killed"]
    faults += world.faults() + world.half_replaced(worlds.reference(name).result)
    return faults + goes_on(world, name, worlds.reference(name), answer=WithoutRenameat2())


def unfinished_states(worlds: Worlds, name: str, folder: Path) -> list[Path]:
    """Copies of what kills of a command leave in OUT.unfinished, until its result is finished.

    Args:
        worlds: makes a world.
        name: of the command line.
        folder: the copies go into folders in it.
    """
    world, found = worlds.new(name), list[Path]()
    unfinished, seen = world.out.with_name("out.unfinished"), list[dict[str, str]]()
    # what is half-written there is removed before anything is read
    half, finished = shutil.ignore_patterns("work-*"), False

    def answer(operation: Operation) -> None:
        nonlocal finished
        finished = finished or MARKER in operation.where
        if finished or not operation.changes or not unfinished.is_dir():
            return
        if not re.search(r"work/out\.unfinished/(?!work-)", operation.where):
            return
        copy = folder / f"{len(found)}/out.unfinished"
        shutil.copytree(unfinished, copy, ignore=half)
        if (content := contents(copy)) in seen:
            shutil.rmtree(copy.parent)
        else:
            seen.append(content)
            found.append(copy.parent)

    assert world.start(LINES[name], answer).wait() == 0
    return found


def stopped(
    worlds: Worlds, name: str, which: str, number: int = signal.SIGTERM
) -> list[str] | None:
    """A signal asks a command to stop."""
    return _hindered(worlds, name, At(which, -number), 130, "stopped")


def _hindered(worlds: Worlds, name: str, at: At, wanted: int, line: str) -> list[str] | None:
    world, reference = worlds.new(name), worlds.reference(name)
    command = world.start(LINES[name], at)
    status = command.wait()
    if not at.met:
        return None
    faults = said(command, status, wanted, line) if status else world.unfinished(*reference[:2])
    faults += world.faults() + world.half_replaced(reference.result)
    return faults + goes_on(world, name, reference)


def raced(worlds: Worlds, names: list[str], gate: str, apart: bool = False) -> list[str]:
    """Commands race for one result, or for one file of masks, from their first operations that look
    alike.

    Args:
        worlds: makes one.
        names: of their lines; results of lines but the first may be another's.
        gate: the operation that each waits at until all have come there, or ended.
        apart: whether each has a result of its own, so that they race for the masks alone.
    """
    world, reference = worlds.new(names[0]), worlds.reference(names[0])
    barrier = threading.Barrier(len(names))

    def racing() -> Answer:
        passed = False

        def answer(operation: Operation) -> None:
            nonlocal passed
            if not passed and re.search(gate, str(operation)):
                passed = True
                with contextlib.suppress(threading.BrokenBarrierError):
                    barrier.wait(20)

        return answer

    commands = []
    for number, name in enumerate(names):
        out = world.work / f"out{number}" if apart and number else world.out
        commands.append(world.start(LINES[name], racing(), world.argv(LINES[name], out=out)))
    statuses = []
    for command in commands:
        statuses.append(command.wait())
        barrier.abort()
    # Equal masks that are there already are as good as one's own.
    faults = (
        [] if statuses.count(0) == 1 or (apart and 0 in statuses) else [f"exit statuses {statuses}"]
    )
    for command, status in zip(commands, statuses, strict=True):
        faults += said(command, status, 2, "error: ") if status else []
    winner = worlds.reference(names[statuses.index(0)]) if 0 in statuses else reference
    if apart:
        return (
            faults
            + world.faults()
            + ([] if digest(world.masks) == reference.masks else ["the masks differ"])
        )
    if names[0] == names[-1]:
        return faults + world.unfinished(*winner[:2])
    kept = timeless(contents(world.out)) if world.out.is_dir() else None
    return (
        faults + world.faults() + ([] if kept == winner.result else ["the winner's result differs"])
    )


def appeared(worlds: Worlds, name: str, what: str, gate: str, place: str = "out") -> list[str]:
    """Something appears at the result's or the masks' place, just before an operation."""
    world, reference = worlds.new(name), worlds.reference(name)
    path, done = getattr(world, place), []

    def answer(operation: Operation) -> None:
        if not done and re.search(gate, str(operation)):
            done.append(operation)
            make(what, path)

    command = world.start(LINES[name], answer)
    status = command.wait()
    faults = (
        ([] if done else ["the operation did not come"])
        + said(command, status, 2, "error: ")
        + world.faults()
    )
    with tempfile.TemporaryDirectory() as folder:
        make(what, Path(folder, "wanted"))
        if not os.path.lexists(path) or seen(path) != seen(Path(folder, "wanted")):
            faults.append("what appeared was replaced or changed")
    if faults:
        return faults
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    return goes_on(world, name, reference)


def make(what: str, path: Path) -> None:
    """Puts a file, a folder, an empty folder or a link somewhere."""
    if what == "file":
        path.write_text("the user's")
    elif what == "link":
        path.symlink_to("models")
    elif what == "dangling link":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
        if what == "folder":
            (path / "data").write_text("the user's")


def seen(path: Path) -> Any:
    return (
        os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else contents(path)
    )


def leapt(worlds: Worlds, name: str, which: str, years: float) -> list[str] | None:
    """The clock leaps at an operation, and what is there then comes from all times when the command
    is run again."""
    world, reference = worlds.new(name), worlds.reference(name)
    seconds, wrong = years * 365 * 24 * 3600, clock()
    at = At(which, 0)

    def answer(operation: Operation) -> int | None:
        given = at(operation)
        wrong.value = seconds if at.met else 0
        return given

    command = world.start(LINES[name], answer, clock=wrong)
    status = command.wait()
    if not at.met:
        return None
    faults = said(command, status, 2, "error: ") if status else world.unfinished(*reference[:2])
    for number, path in enumerate(sorted(world.work.rglob("out.unfinished/**/*"))):
        moment = time.time() + (-1) ** number * seconds
        os.utime(path, (moment, moment))
    faults += goes_on(world, name, reference, tidy=False)
    spent = json.loads((world.out / "jaxprune.json").read_text())["seconds"] if not faults else {}
    return faults + [f"{phase} took {seconds} s" for phase, seconds in spent.items() if seconds < 0]


def goes_on(
    world: World,
    name: str,
    reference: Reference,
    *,
    tidy: bool = True,
    answer: Answer = lambda operation: None,
) -> list[str]:
    """The same command again, where it is not yet finished: its result is that of one that nothing
    happened to."""
    wanted = reference.result, reference.masks
    if world.unfinished(*wanted):
        command = world.start(LINES[name], answer)
        if status := command.wait():
            return [f"the same command again: exit status {status}: {command.printed()[-1000:]}"]
    faults = world.unfinished(*wanted)
    if tidy and not faults:
        shutil.rmtree(world.folder)
    return faults


def said(command: Command, status: int, wanted: int, begin: str) -> list[str]:
    """What is wrong with how a command ended: with this exit status and one line."""
    printed = command.printed()
    # a progress bar may stand before it on the line
    ends = re.findall(r"error: |stopped$", printed, re.MULTILINE)
    if status == wanted and ends == [begin] and "Traceback" not in printed:
        return []
    return [f"exit status {status}, printed: {printed[-1500:]}"]
