"""Places that a command must not replace or empty, and what it says of them."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.crash.cases import make, said
from tests.crash.world import LINES, TIMES, World, Worlds, snapshot

Prepared = tuple[str, dict[str, Path], Path | None]
"""The line, the places that differ from the world's own, and the current folder."""


def _tuned(world: World) -> None:
    # same size, as fine-tuning in place leaves it
    with open(world.out / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def _earlier_version(world: World) -> None:
    for name in TIMES:
        if name.startswith("."):
            (world.out / name).unlink(missing_ok=True)


def _linked_result(world: World) -> None:
    world.out.rename(world.work / "elsewhere")
    world.out.symlink_to("elsewhere")


def _linked_store(world: World) -> None:
    (world.work / "out.unfinished").symlink_to("models")


def _used_store(world: World) -> None:
    (world.work / "out.unfinished/result").mkdir(parents=True)
    (world.work / "out.unfinished/result/data").write_text("the user's")
    (world.work / "out.unfinished/notes").write_text("the user's")


def _nothing(world: World) -> None:
    del world


def _add(name: str) -> Callable[[World], None]:
    return lambda world: make("file", world.work / name)


PLACES: dict[str, tuple[str, Callable[[World], None], Callable[[World], Prepared]]] = {
    "the checkpoint": ("overwrite", _nothing, lambda w: ("overwrite", {"out": w.checkpoint}, None)),
    "the checkpoint's parent": (
        "overwrite",
        _nothing,
        lambda w: ("overwrite", {"out": w.checkpoint.parent}, None),
    ),
    "inside the checkpoint": (
        "quick",
        _nothing,
        lambda w: ("quick", {"out": w.checkpoint / "out"}, None),
    ),
    "the current folder": (
        "overwrite",
        _nothing,
        lambda w: ("overwrite", {"out": Path(".")}, w.work / "models"),
    ),
    "a folder of the user's": (
        "overwrite",
        _nothing,
        lambda w: ("overwrite", {"out": w.work / "models"}, None),
    ),
    "a result with another file": (
        "overwrite",
        _add("out/notes"),
        lambda w: ("overwrite", {}, None),
    ),
    "a result that was fine-tuned in place": (
        "overwrite",
        _tuned,
        lambda w: ("overwrite", {}, None),
    ),
    "a result without a list of its files": (
        "overwrite",
        _earlier_version,
        lambda w: ("overwrite", {}, None),
    ),
    "a link to a result": ("overwrite", _linked_result, lambda w: ("overwrite", {}, None)),
    "a dangling link": (
        "quick",
        lambda w: make("dangling link", w.out),
        lambda w: ("quick", {}, None),
    ),
    "files in OUT.unfinished": ("quick", _used_store, lambda w: ("quick", {}, None)),
    "OUT.unfinished a link": ("quick", _linked_store, lambda w: ("quick", {}, None)),
    "masks in OUT": ("quick", _nothing, lambda w: ("quick", {"masks": w.out / "masks"}, None)),
    "masks at OUT": ("quick", _nothing, lambda w: ("quick", {"masks": w.out}, None)),
    "masks at a file of the user's": (
        "overwrite",
        _nothing,
        lambda w: ("overwrite", {"masks": w.work / "notes.txt"}, None),
    ),
    "convert: the checkpoint": (
        "convert",
        _nothing,
        lambda w: ("convert-over", {"out": w.checkpoint}, None),
    ),
    "convert: its parent": (
        "convert",
        _nothing,
        lambda w: ("convert-over", {"out": w.checkpoint.parent}, None),
    ),
    "convert: a folder of the user's": (
        "convert",
        _nothing,
        lambda w: ("convert-over", {"out": w.work / "models"}, None),
    ),
    "convert: a dangling link": (
        "convert",
        lambda w: make("dangling link", w.out),
        lambda w: ("convert", {}, None),
    ),
}
"""What is there -> the line whose world it is, how to put it there, and the command."""


def refused(worlds: Worlds, what: str) -> list[str]:
    """A command whose places are not its own changes nothing, and says so in one line."""
    name, prepare, prepared = PLACES[what]
    world = worlds.new(name)
    prepare(world)
    line, places, current = prepared(world)
    before = snapshot(world.folder, set())
    argv = world.argv(LINES[line], **places)
    command = world.start(LINES[line], argv=argv, current=current or world.folder)
    status = command.wait()
    now = snapshot(world.folder, set())
    faults = [f"{each} has changed" for each in sorted(before) if now.get(each) != before[each]]
    faults += [f"{each} is left over" for each in sorted(now.keys() - before.keys())]
    return said(command, status, 2, "error: ") + faults
