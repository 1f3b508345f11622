"""Windows of token ids in a .npy file. Checks its header against its size, and its ids against
the vocabulary."""

import math
import os
import tokenize
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from convert.files import expand, open_regular
from jaxprune.errors import InputError

MOST_IDS = 2**31
"""Ids below it fit int32."""
HEADER_CHARACTERS = 10_000
_PARSER_ERRORS = (TypeError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError)
"""What Python's parser, which reads the header's dictionary, raises for other text."""
_BLOCK = 2**22
"""Ids that are looked at, and so in memory, at a time."""


def load_windows(
    source: str, length: int | None, vocab_size: int | None = None
) -> Integer[np.ndarray, "windows length"]:
    """Returns the first tokens of all windows of a file, mapped into memory, in the file's dtype.

    Args:
        source: a .npy file of integers [windows, at least length], of any width and byte order.
        length: tokens a window; None: all that it has.
        vocab_size: ids are below it; None: only what int32 cannot hold is refused.

    Raises:
        InputError: it is no such file, or an id lies outside the vocabulary; the first one's place
            is named.
    """
    path = expand(source)
    windows = _mapped(path)
    if length is None:
        length = windows.shape[1]
    if windows.shape[1] < length:
        raise InputError(
            f"its windows have {windows.shape[1]} tokens, fewer than {length}",
            file=source,
            options={"seqlen": windows.shape[1]} if windows.shape[1] > 1 else {},
        )
    windows = windows[:, :length]
    rows = max(1, _BLOCK // length)
    for start in range(0, len(windows), rows):
        require_ids(
            windows[start : start + rows],
            MOST_IDS if vocab_size is None else vocab_size,
            path,
            start,
        )
    return windows


def require_ids(
    windows: Integer[np.ndarray, "w t"], most: int, file: Path | None = None, first: int = 0
) -> None:
    """Raises InputError where an id is negative, or not below `most`.

    Args:
        windows: token ids.
        most: tokens of the vocabulary.
        file: where they come from, for the error.
        first: number of the first window, for the error.
    """
    if not windows.size or (windows.min() >= 0 and windows.max() < most):
        return
    window, position = (int(at[0]) for at in np.nonzero((windows < 0) | (windows >= most)))
    raise InputError(
        "a token id lies outside the vocabulary",
        file=file,
        entry=f"window {first + window}, position {position}",
        found=int(windows[window, position]),
        wanted=f"0 to {most - 1}, as the model's own tokenizer gives",
    )


def _mapped(path: Path) -> np.ndarray:
    with open_regular(path, InputError) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(file, max_header_size=HEADER_CHARACTERS)
        except (OSError, ValueError, KeyError, *_PARSER_ERRORS):
            raise InputError("its header is none of a .npy file", file=path) from None
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.kind not in "iu":
        raise InputError(
            "it does not hold integers",
            file=path,
            found=str(dtype),
            wanted="int8 to int64, or unsigned",
        )
    if len(shape) != 2 or not all(type(axis) is int and axis > 0 for axis in shape):
        raise InputError(
            "it does not hold windows of tokens",
            file=path,
            found=list(shape),
            wanted="[windows, length]",
        )
    if (needed := offset + math.prod(shape) * dtype.itemsize) > size:
        raise InputError(
            f"it has {size} bytes, but its header declares {needed}: it was cut", file=path
        )
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
