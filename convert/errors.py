"""Errors that a user can mend. They carry fields; only a command line words the remedy and names
its flag."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any


class Change(Enum):
    """How an option would have to change, where no single value can be named."""

    OTHER = "choose another"
    LOWER = "lower"
    RAISE = "raise"
    OMIT = "leave out"


class _Missing(Enum):
    MISSING = "missing"


MISSING = _Missing.MISSING
"""Stands for an entry that is not there; None is a value that JSON knows."""


class UserError(ValueError):
    """Something of the user's that cannot be used: a file, an option, a machine.

    `str` of it is one line without remedies that would need an option's name.

    Attributes:
        problem: what is wrong, as a clause without a full stop.
        file: the file or folder that is meant, or None.
        entry: the place in it: a JSON path, a tensor's name, a row; "" for all of it.
        found: what is there, where that says more than `problem`; `MISSING` where nothing is.
        wanted: what should be there, in words, or "".
        options: option's name, as in Python, -> the value that would mend it, or a `Change`.
        again: when the same command can succeed and use the work that was finished before the
            error: a clause such as "once there is room,"; None: it cannot. A caller that knows more
            than the class sets it.
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
    """An option, a text or a number that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be found, read or written."""


class DamagedError(CheckpointError):
    """A file whose content cannot be what its author wrote; it has to be fetched or made again."""

    again = "once the file is replaced,"


class NoRoomError(CheckpointError):
    """A disk that is full, or a folder that cannot be written."""

    again = "once there is room,"


class OccupiedError(CheckpointError):
    """A place that is taken by something which is not ours to replace."""

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
    """Returns several problems as one clause; the later ones are only counted."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _brief(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        value = value if len(value) <= 8 else f"{len(value)} entries"
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
