"""Cases as data: what is changed in a file, a path or a command line, printed, read back and done
again.

An `Edit` names a file, a kind of change and a place in the file; a `Case` is a target and its
edits. Nothing else decides what a case does, so that its printed form alone repeats it.
"""

import os
import random
import socket
import struct
import tokenize
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from tests.hostile.formats import format_of


class Edit(NamedTuple):
    """One change of one file, or of one option of a command line.

    Attributes:
        file: relative to the working folder; a flag such as --nsamples for a command line.
        kind: what is done.
        place: where in the file, or "" for all of it.
    """

    file: str
    kind: str
    place: str = ""


class Case(NamedTuple):
    """A target and what is changed before it is tried."""

    target: str
    edits: tuple[Edit, ...] = ()

    def __str__(self) -> str:
        edits = (":".join(quote(part, safe="/.-+@") for part in edit) for edit in self.edits)
        return " ".join([self.target, *edits])


def parse(text: str) -> Case:
    """The case that `str` printed."""
    target, *edits = text.split()
    return Case(target, tuple(Edit(*map(unquote, edit.split(":"))) for edit in edits))


# What can be done to any file.

_BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda content, _: b"",
    "half": lambda content, _: content[: len(content) // 2],
    "doubled": lambda content, _: content * 2,
    "zeroed": lambda content, _: bytes(len(content)),
    "utf-16": lambda content, _: content.decode("latin1").encode("utf-16"),
    "utf-8-sig": lambda content, _: b"\xef\xbb\xbf" + content,
    "latin-1": lambda content, _: (
        content[: len(content) // 2].replace(b"e", b"\xe9") + content[len(content) // 2 :]
    ),
    "overlong": lambda content, _: content.replace(b'"', b"\xc0\xa2", 3),
}


def _flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    early = min(len(content), 4096) if chance.random() < 0.7 else len(content)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(early)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _spliced(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    end = at + chance.choice([1, 4, 8, 64])
    return (
        content[:at]
        + chance.choice([b"", chance.randbytes(8), b"\xff" * (end - at)])
        + content[end:]
    )


RANDOM = {"flipped": _flipped, "spliced": _spliced}
SEEDS = 40
"""Random changes of each kind that a file gets among its single edits; pairs draw more."""


def _socket(path: Path) -> None:
    # it stays in the folder; its own name may be too long for the call
    with socket.socket(socket.AF_UNIX) as made:
        there = os.open(path.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{there}/{path.name}")
        os.close(there)


PATHS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": _socket,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "endless": lambda path: path.symlink_to("x/" * 2040 + "x"),
    "unreadable": lambda path: path.touch(0),
}
"""What can stand where a file should."""
if os.geteuid() == 0:  # whom no mode keeps from reading
    del PATHS["unreadable"]


def edits_of(root: Path, file: str) -> Iterator[Edit]:
    """Every single change of a file."""
    path = root / file
    content = path.read_bytes()
    for kind, place in format_of(path).edits(content):
        yield Edit(file, kind, place)
    yield from (Edit(file, kind) for kind in [*_BYTES, *PATHS])
    if content:
        yield from (Edit(file, kind, str(seed)) for kind in RANDOM for seed in range(SEEDS))


def apply(root: Path, edit: Edit) -> None:
    """Changes a file; its place is left as it is where the change is impossible, as it may be after
    another one."""
    path = root / edit.file
    if edit.kind in PATHS:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        PATHS[edit.kind](path)
        return
    if path.is_symlink() or not path.is_file():
        return
    content = path.read_bytes()
    try:
        if edit.kind in _BYTES:
            changed = _BYTES[edit.kind](content, random.Random(0))
        elif edit.kind in RANDOM and edit.place.isdecimal():
            changed = RANDOM[edit.kind](content, random.Random(f"{edit.file} {edit.place}"))
        else:
            changed = format_of(path).apply(content, edit.kind, edit.place)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        OSError,
        EOFError,
        SyntaxError,
        struct.error,
        tokenize.TokenError,
        zlib.error,
    ):
        return
    path.unlink()  # never through a link to the original
    path.write_bytes(changed)


# Values of command lines.

ARGUMENTS = {
    "nothing": "",
    "blank": " ",
    "word": "x",
    "zero": "0",
    "one": "1",
    "negative": "-1",
    "fraction": "0.3",
    "nan": "nan",
    "infinity": "inf",
    "exponent": "1e400",
    "int64": str(2**63),
    "digits": "9" * 5000,
    "long": "x" * 300,
    "long-path": "x/" * 2500,
    "not-utf-8": os.fsdecode(b"out-\xff\xfe"),
    "surrogate": "out-\ud800",
    "nul": "out-\0",
    "backslash": "out-\\x",
    "escape": "out-\x1b[2J\n",
    "commas": ",,",
    "colons": "3:0",
    "home": "~nobody-of-this-name/x",
    "glob": "out-[*]{a,b}",
    "checkpoint": "hf",
    "here": ".",
    "parent": "..",
    "file": "text.jsonl",
    "fifo": "odd/fifo",
    "loop": "odd/loop",
    "dangling": "odd/dangling",
    "device": "odd/device",
    "socket": "odd/socket",
    "inside": "hf/out",
    "below-file": "text.jsonl/out",
}


def odd_paths(folder: Path) -> None:
    """A folder with one of each kind of path that is no regular file."""
    folder.mkdir()
    for kind in ("fifo", "loop", "dangling", "device", "socket"):
        PATHS[kind](folder / kind)
