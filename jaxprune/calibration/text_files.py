"""The user's own text: .jsonl, .json, .parquet, .txt, packed or not, or a folder as hub datasets
are laid out.

A .txt file is one document; in the others each row's `text` is one or, where the first row has
none, each row's `messages`, which are a conversation. A .json file is as .jsonl, or one array of
rows. A row in memory is all that reading takes, and `documents.IN_MEMORY` bytes of text; a
document, or an array of rows, may hold 128 MiB, a file 16 GiB once it is unpacked.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from convert import schema
from jaxprune.calibration.documents import (
    COMPRESSED,
    Conversations,
    Documents,
    decoded,
    unpacked,
    whole,
)
from jaxprune.calibration.row_files import S, json_rows, parquet_rows
from jaxprune.errors import InputError

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words in a file's or a folder's name that say so, as on the hub."""
MOST_FILES = 100_000
"""Files of a folder that are looked at."""
WANTED = 'rows as {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
"""What a file of rows has to have."""


class Row(schema.Schema):
    """A row of a file of texts."""

    text: str


class Message(schema.Schema):
    """A message of a conversation."""

    role: str
    content: str


class Conversation(schema.Schema):
    """A row of a file of conversations."""

    messages: Annotated[list[Message], Field(min_length=1)]


class First(schema.Schema):
    """What a file's first row says of the others."""

    text: Any = None
    messages: Any = None


def documents(path: Path, split: str, most: int | None = None) -> Sequence[str]:
    """Returns the texts of a file, whatever the split, or of a folder's split; or their
    `Conversations`.

    Args:
        path: the path of the file or the folder.
        split: train or test; where a folder has no test split, its validation split will do.
        most: the first so many; None: all.

    Raises:
        InputError: an unknown kind of file, a row without text, text that is none, or too much of
            it.
        NoRoomError: no room for a temporary file.
    """
    files = _files(path, split) if os.path.isdir(path) else [path]
    kind = Conversations if _holds_conversations(files[0]) else Documents
    content = _conversations if kind is Conversations else _texts
    texts = kind(islice((text for file in files for text in content(file)), most))
    if not any(texts):
        raise InputError("it holds no text", file=path)
    return texts


def read_rows(row: type[S], path: Path) -> Iterator[S]:
    """Yields the rows of a .json, .jsonl or .parquet file, packed or not.

    Args:
        row: what each has to be.
        path: the path of the file.

    Raises:
        InputError: the file cannot be read, or a row is not what it has to be; its line and entry
            are named.
    """
    with unpacked(path) as file:
        yield from (parquet_rows if kind_of(path) == ".parquet" else json_rows)(row, file, path)


def kind_of(path: Path) -> str | None:
    """Returns which of `FORMATS` a file's name says that it has, packed or not; None: none of
    them."""
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name
    suffix = Path(name).suffix
    return suffix if suffix in FORMATS else None


def _holds_conversations(path: Path) -> bool:
    if kind_of(path) is None:
        raise InputError(
            "its name says no known kind of text",
            file=path,
            wanted=f"{', '.join(FORMATS)} (also packed), or .npy",
        )
    first = None if kind_of(path) == ".txt" else next(read_rows(First, path), None)
    if first is not None and not first.model_fields_set:
        raise InputError("its first row has neither text nor messages", file=path, wanted=WANTED)
    return first is not None and first.text is None and first.messages is not None


def _conversations(path: Path) -> Iterator[str]:
    for row in read_rows(Conversation, path):
        yield json.dumps([message.model_dump() for message in row.messages])


def _texts(path: Path) -> Iterator[str]:
    if kind_of(path) == ".txt":
        with unpacked(path) as file:
            yield _txt(file, path)
    else:
        yield from (row.text for row in read_rows(Row, path))


def _txt(file: BufferedIOBase, path: Path) -> str:
    text = decoded(whole(file, path), path).removeprefix("\ufeff")
    if (at := text.find("\0")) >= 0:
        raise InputError("it is no text, it holds a null byte", file=path, entry=f"character {at}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _files(folder: Path, split: str) -> list[Path]:
    """Returns the files of a folder's split, which have to be of one kind and lie in one folder."""
    found: dict[str, list[Path]] = {}
    for file in _text_files(folder):
        found.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    chosen = split
    if split == "test" and split not in found:
        chosen = "validation"
    if chosen not in found:
        there = (
            f"it has {', '.join(sorted(found))}"
            if found
            else f"it has no {', '.join(FORMATS)} files"
        )
        raise InputError(f"it has no {split} split, {there}", file=folder)
    files = sorted(found[chosen])
    if len({kind_of(file) for file in files}) > 1:
        raise InputError(
            f"its {chosen} split has files of several kinds",
            file=folder,
            wanted="one kind, or one file",
        )
    if len(folders := sorted({str(file.parent.relative_to(folder)) for file in files})) > 1:
        raise InputError(
            f"its {chosen} split lies in several folders",
            file=folder,
            found=folders,
            wanted="one of them",
        )
    return files


def _text_files(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder whose names say that they hold text; hidden ones and links to
    folders are left out."""
    seen = 0
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            seen += 1
            if seen > MOST_FILES:
                raise InputError(
                    "it holds too many files", file=folder, wanted=f"at most {MOST_FILES}"
                )
            if not name.startswith(".") and kind_of(Path(name)):
                yield Path(parent) / name


def _unreadable(error: OSError) -> None:
    raise InputError(f"it cannot be read ({error.strerror})", file=error.filename) from error


def _split_of(path: Path) -> str:
    """Returns the split that a file's name, else its folders' names, speak of; train where they
    speak of none."""
    for name in (path.name, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-z]+", name.lower())
        for split, said in SPLITS.items():
            if any(word in said for word in words):
                return split
    return "train"
