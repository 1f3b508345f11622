"""Errors that a user can fix. They carry fields; only the command line words the remedy and names
its flag."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any


class Change(Enum):
    """How to change an option, if no single value would fix the error."""

    OTHER = "choose another"
    LOWER = "lower"
    RAISE = "raise"
    OMIT = "leave out"


class _Missing(Enum):
    MISSING = "missing"


MISSING = _Missing.MISSING
"""A missing entry, in contrast to None, which JSON can express."""


class UserError(ValueError):
    """Something from the user cannot be used: a file, an option, a machine.

    `str` gives one line, without remedies that need an option's name.

    Attributes:
        problem: the problem, as a clause without a full stop.
        file: the file or folder, or None.
        entry: the place in the file: a JSON path, a tensor's name, a row; "" for the whole file.
        found: the value found, if it adds to `problem`; `MISSING` if there is none.
        wanted: a description of the expected value, or "".
        options: option's Python name -> the value that would fix the error, or a `Change`.
        again: when the same command can succeed and reuse the work finished before the error: a
            clause such as "once there is room,"; None: never. A caller with more information than
            the class sets it.
    """

    again: str | None = None

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        entry: str = "",
        found: Any = MISSING,
        wanted: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.problem, self.file, self.entry = problem, file, entry
        self.found, self.wanted = found, wanted
        self.options = dict(options or {})
        super().__init__(problem)

    def __str__(self) -> str:
        entry = (
            self.entry
            if len(self.entry) <= 200
            else f"{self.entry[:180]}… ({len(self.entry)} characters)"
        )
        place = ": ".join(str(part) for part in (self.file, entry) if part not in (None, ""))
        text = f"{place}: {self.problem}" if place else self.problem
        if self.found is not MISSING:
            text += f", found {_brief(self.found)}"
        return f"{text}, wanted {self.wanted}" if self.wanted else text


class InputError(UserError):
    """An option, a text or a number cannot be used."""


class CheckpointError(UserError):
    """A checkpoint cannot be found, read or written."""


class DamagedError(CheckpointError):
    """A file is damaged: its author cannot have written this content. It must be downloaded or made
    again."""

    again = "once the file is replaced,"


class NoRoomError(CheckpointError):
    """A disk is full, or a folder is not writable."""

    again = "once there is room,"


class OccupiedError(CheckpointError):
    """A place is occupied by something that jaxprune must not replace."""

    again = "once that place is free,"


def is_panic(error: BaseException) -> bool:
    """Returns whether an error is a panic of a library in Rust: no Exception, of a class that
    cannot be imported."""
    return type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """Returns what the error of a library says, which may be of any kind, a panic included. Raises
    what is no error, such as KeyboardInterrupt."""
    if not isinstance(error, Exception) and not is_panic(error):
        raise error
    return f"{type(error).__name__}: {error}"[:300]


def joined(problems: list[str], most: int = 8) -> str:
    """Joins problems into one clause; of those after the first `most`, it gives only the number."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _brief(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        value = value if len(value) <= 8 else f"{len(value)} entries"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
