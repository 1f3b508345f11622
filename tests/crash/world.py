"""A folder as users have it, with a checkpoint, runs in it, and what must hold whatever happens to
them."""

import hashlib
import itertools
import os
import re
import shutil
import stat
import threading
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash.operations import Answer, Operation
from tests.crash.processes import Command
from tests.helpers import tiny

TIMES = {"jaxprune.json", "report.html", "README.md", ".jaxprune-files.json"}
"""Files of a result that tell the time, or the digests of those that do."""
HALF = re.compile(r"work/\.out\.\w{8}\.partial(/|$)")
"""What a conversion leaves that is killed: nobody can prove whose it is, so it stays. A run's are
in its store."""
RUN, CONVERT = "jaxprune.run", "convert.__main__"


class Line(NamedTuple):
    """A command line.

    Attributes:
        module: whose `main` it is.
        options: beside those that name files.
        before: options of an earlier one to the same places; None: nothing is there.
    """

    module: str
    options: str
    before: str | None = None


QUICK = "--method magnitude --unchecked"
LINES = {
    "best": Line(
        RUN, "--preset best --sparsity 0.6 --tune-windows 2 --tune-epochs 2 --tune-gradual 0.5"
    ),
    "admm": Line(RUN, "--method admm --asymmetry 0.25"),
    "quick": Line(RUN, QUICK),
    "overwrite": Line(RUN, f"{QUICK} --overwrite", f"{QUICK} --sparsity 0.3"),
    "convert": Line(CONVERT, ""),
    "convert-over": Line(CONVERT, "--overwrite", "--to orbax"),
}


class World:
    """A copy of the folder, for one case.

    Attributes:
        folder: of everything.
        work: the folder that results are made in, beside the user's own files.
        out: the result to be.
        masks: the file of masks to be.
        checkpoint: the dense one.
        before: what was there in the beginning, but for an earlier result.
    """

    def __init__(self, folder: Path, logs: Path) -> None:
        self.folder, self._logs = folder, logs
        self.work = folder / "work"
        self.out, self.masks = self.work / "out", self.work / "masks"
        self.checkpoint, self.text = folder / "models/tiny", folder / "models/text.jsonl"
        self._number = itertools.count()
        self.look()

    def look(self) -> None:
        """Takes note of what is there."""
        self.before = snapshot(self.folder, {self.out, self.masks})
        self.old = contents(self.out) if self.out.is_dir() else {}

    def argv(self, line: Line, options: str | None = None, **places: Path) -> list[str]:
        """The arguments of a command line; its options changed, or its `out`, `masks`, `ckpt`."""
        more = (line.options if options is None else options).split()
        ckpt, out = places.get("ckpt", self.checkpoint), places.get("out", self.out)
        if line.module == CONVERT:
            return [str(ckpt), str(out), *more]
        files = {
            "ckpt": ckpt,
            "calib": self.text,
            "out": out,
            "save-masks": places.get("masks", self.masks),
        }
        named = [text for name, path in files.items() for text in (f"--{name}", str(path))]
        return [*named, *"--nsamples 4 --seqlen 32 --eval none".split(), *more]

    def start(
        self,
        line: Line,
        answer: Answer = lambda operation: None,
        argv: list[str] | None = None,
        **how: Any,
    ) -> Command:
        """Starts a command line; see `Command`."""
        log = self._logs / f"{self.folder.name}-{next(self._number)}"
        how = {"current": self.folder} | how
        return Command(line.module, argv or self.argv(line), self.folder, answer, log, **how)

    def faults(self) -> list[str]:
        """What is wrong with the user's files, at any moment."""
        now = snapshot(self.folder, {self.out, self.masks})
        return [
            f"{name} has changed: {was} was, {now.get(name)} is"
            for name, was in self.before.items()
            if now.get(name) != was
        ]

    def half_replaced(self, new: dict[str, str]) -> list[str]:
        """What is wrong with an earlier result that is replaced: not whole at its place, nor both
        beside it."""
        if not self.old:
            return []
        found = [contents(path) for path in [self.out, *self.work.rglob("*/")] if path.is_dir()]
        if self.out.is_dir() and (found[0] == self.old or timeless(found[0]) == new):
            return []
        if self.old in found and new in map(timeless, found):
            return []
        return ["neither the earlier result nor the new one is whole"]

    def unfinished(self, new: dict[str, str], masks: str | None) -> list[str]:
        """What is wrong with a finished command's result."""
        faults = self.faults()
        if not self.out.is_dir():
            return [*faults, "there is no result"]
        found = timeless(contents(self.out))
        faults += [
            f"{name} of the result differs"
            for name in sorted(found.keys() | new.keys())
            if found.get(name) != new.get(name)
        ]
        if masks and (not self.masks.is_file() or digest(self.masks) != masks):
            faults.append("the masks differ")
        more = snapshot(self.folder, {self.out, self.masks}).keys() - self.before.keys()
        return faults + [f"{name} is left over" for name in sorted(more) if not HALF.match(name)]


class Reference(NamedTuple):
    """An uninterrupted command.

    Attributes:
        result: digests of its files by name, but those that tell the time.
        masks: digest of the masks; None without any.
        operations: on files, in order.
    """

    result: dict[str, str]
    masks: str | None
    operations: list[Operation]


class Worlds:
    """Makes copies of the folder, and runs each command line once undisturbed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self._references: dict[str, Reference] = {}
        self._making = threading.RLock()
        (folder / "logs").mkdir(parents=True)
        models, work = folder / "template/models", folder / "template/work"
        tiny.save(
            models / "tiny", tiny.config(num_hidden_layers=2, hidden_size=16, intermediate_size=24)
        )
        tiny.write_text(models / "text.jsonl", documents=100)
        (models / "tiny/notes.md").write_text("kept beside the weights")
        for name in (
            "notes.txt",
            "out.txt",
            "masks.old",
            ".hidden",
            "out.unfinished.txt",
            "models/mine.bin",
        ):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(f"the user's own {name}")
        (work / "notes.txt").chmod(0o600)
        (work / "link").symlink_to("notes.txt")
        (work / "dangling").symlink_to("nowhere")

    def new(self, name: str) -> World:
        """A fresh copy, with the earlier result that a command line replaces."""
        line = LINES[name]
        world = self._copy(self._folder / "template")
        if line.before is None:
            return world
        earlier = self._folder / f"before-{name}"
        with self._making:
            if not earlier.exists():
                status = world.start(line, argv=world.argv(line, line.before)).wait()
                assert status == 0, "the earlier result was not made"
                world.folder.rename(earlier)
        return self._copy(earlier)

    def _copy(self, template: Path) -> World:
        folder = self._folder / f"world-{next(self._numbers)}"
        shutil.copytree(template, folder, symlinks=True)
        return World(folder, self._folder / "logs")

    def reference(self, name: str) -> Reference:
        """What a command line does undisturbed."""
        with self._making:
            if name not in self._references:
                self._references[name] = self._undisturbed(name)
        return self._references[name]

    def _undisturbed(self, name: str) -> Reference:
        world, operations = self.new(name), []
        command = world.start(LINES[name], operations.append)
        assert command.wait() == 0, command.printed()
        masks = digest(world.masks) if world.masks.exists() else None
        found = Reference(timeless(contents(world.out)), masks, operations)
        faults = world.unfinished(*found[:2])
        assert not faults, faults
        shutil.rmtree(world.folder)
        return found


def snapshot(folder: Path, skip: set[Path]) -> dict[str, tuple]:
    """Kind, permissions, time and content of all that is in a folder, by relative path."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(root, name) not in skip]
        for path in (Path(root, name) for name in folders + files):
            if path in skip:
                continue
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                content = status.st_mtime_ns, digest(path)
            else:
                content = os.readlink(path) if path.is_symlink() else None
            found[str(path.relative_to(folder))] = stat.filemode(status.st_mode), content
    return found


def contents(folder: Path) -> dict[str, str]:
    """Digests of a folder's files, by relative path."""
    return {
        str(path.relative_to(folder)): digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def timeless(found: dict[str, str]) -> dict[str, str]:
    """Without the files that tell the time."""
    return {name: value for name, value in found.items() if name not in TIMES}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
