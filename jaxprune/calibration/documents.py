"""Documents on a disk, and the packed files that they come from, read in bounded memory."""

import bz2
import contextlib
import gzip
import lzma
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, cast, overload

from convert.files import open_regular
from convert.writing import failing
from convert.zstd import zstd
from jaxprune.errors import InputError

DOCUMENT_BYTES = 2**27
"""The most that a document, a line or a file that is read whole may hold."""
UNPACKED_BYTES = 2**34
"""The most that a file may hold once it is unpacked."""
IN_MEMORY = 2**26
"""Bytes of documents in memory; more go to a temporary file, of which nothing stays."""
COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": zstd.open,
}
"""Suffix -> what opens such a file; all of them read streams that follow each other in one file."""
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
"""What these raise while they read a file that is damaged."""


class Documents(Sequence[str]):
    """Texts, of which `IN_MEMORY` bytes and an offset each are in memory, and the rest in a
    temporary file.

    Args:
        texts: the documents, taken one by one.

    Raises:
        NoRoomError: no room for the temporary file.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)
        weakref.finalize(self, self._file.close)
        self._ends, folder = array("q", [0]), Path(tempfile.gettempdir())
        for text in texts:
            content = text.encode()
            with failing(folder):
                self._file.write(content)
            self._ends.append(self._ends[-1] + len(content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start, end = self._ends[number], self._ends[number + 1]
        self._file.seek(start)
        return self._file.read(end - start).decode()


class Conversations(Documents):
    """Conversations, each as JSON: a list of messages, each with role and content."""


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[BufferedIOBase]:
    """Yields a regular file's content, unpacked where its name says that it is packed.

    Raises:
        InputError: it cannot be opened or, while it is read, unpacked.
    """
    with open_regular(path, InputError) as file:
        try:
            with _unpacker(path, file) as content:
                yield content
        except DAMAGED as error:
            raise InputError(f"it cannot be unpacked or read ({error})", file=path) from error


def lines(file: BufferedIOBase, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file that are not blank, with their numbers from 1.

    Raises:
        InputError: a line, or all of them, are longer than may be.
    """
    number = total = 0
    while line := file.readline(DOCUMENT_BYTES + 1):
        number, total = number + 1, total + len(line)
        if len(line) > DOCUMENT_BYTES:
            raise InputError(
                "a line is too long",
                file=path,
                entry=f"line {number}",
                wanted=_most(DOCUMENT_BYTES),
            )
        if total > UNPACKED_BYTES:
            raise InputError(
                "it is too large once unpacked", file=path, wanted=_most(UNPACKED_BYTES)
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def whole(file: BufferedIOBase, path: Path) -> bytes:
    """Returns all of a file.

    Raises:
        InputError: it holds more than a document may.
    """
    content = file.read(DOCUMENT_BYTES + 1)
    if len(content) > DOCUMENT_BYTES:
        raise InputError(
            "it is too large to be read whole", file=path, wanted=_most(DOCUMENT_BYTES)
        )
    return content


def decoded(content: bytes, path: Path, entry: str = "") -> str:
    """Returns the text of bytes; raises InputError for what is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "it is not UTF-8: convert it, for example with `iconv -f LATIN1 -t UTF-8`",
            file=path,
            entry=entry or f"byte {error.start}",
        ) from None


@contextlib.contextmanager
def seekable(file: BufferedIOBase, path: Path) -> Iterator[BufferedIOBase]:
    """Yields a file whose places can be reached at once: itself, or, where it is packed, a
    temporary copy.

    Raises:
        InputError: it is too large once unpacked.
        NoRoomError: no room for the copy.
    """
    if path.suffix not in COMPRESSED:
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        while part := file.read(2**20):
            if copy.tell() + len(part) > UNPACKED_BYTES:
                raise InputError(
                    "it is too large once unpacked", file=path, wanted=_most(UNPACKED_BYTES)
                )
            with failing(Path(tempfile.gettempdir())):
                copy.write(part)
        copy.seek(0)
        yield cast(BufferedIOBase, copy)


def _unpacker(path: Path, file: IO[bytes]) -> contextlib.AbstractContextManager[BufferedIOBase]:
    opened = COMPRESSED.get(path.suffix)
    return (
        cast(BufferedIOBase, opened(file))
        if opened
        else contextlib.nullcontext(cast(BufferedIOBase, file))
    )


def _most(count: int) -> str:
    return f"at most {count} bytes"
