"""Windows of token ids in .npy files: taken as they are, or refused with the place of what is
wrong."""

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.command import worded
from jaxprune import calibration
from jaxprune.errors import InputError


def vocabulary(path: Path) -> None:
    calibration.require_vocabulary([str(path)], 4, 100)


def reads(path: Path) -> None:
    calibration.calibration_windows(str(path), None, 1, 4)


def evaluates(path: Path) -> None:
    calibration.evaluation_windows(str(path), None, 4)


def refused(message: str, path: Path, *checks: Callable[[Path], None]) -> None:
    """Expects the same line of all that read such a file."""
    for check in checks or (vocabulary, reads, evaluates):
        with pytest.raises(InputError) as caught:
            check(path)
        assert re.search(message, line := worded(caught.value)), line


def save(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


def test_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = np.arange(60).reshape(6, 10)
    for number, stored in enumerate(
        [
            ids,
            ids.astype(np.uint8),
            ids.astype(">i2"),
            ids.astype(np.uint64),
            np.asfortranarray(ids.astype(np.int32)),
        ]
    ):
        path = str(save(tmp_path / f"{number}.npy", stored))
        windows = calibration.calibration_windows(path, None, 6, 10, seed=0)
        assert windows.dtype == np.int32
        np.testing.assert_array_equal(windows, ids)
        some = calibration.calibration_windows(path, None, 2, 5, seed=0)
        assert all((row == ids[:, :5]).all(axis=1).any() for row in some)
        np.testing.assert_array_equal(
            calibration.evaluation_windows(path, None, 8, limit=3), ids[:3, :8]
        )


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("i8", 2**32 + 5), ("i8", 100), ("u8", 2**63 + 1), ("i4", -1), ("i8", -(2**40)), (">u4", 100)],
)
def test_the_first_id_outside_the_vocabulary_is_named(
    dtype: str, value: int, tmp_path: Path
) -> None:
    ids = np.full((5, 8), 99, dtype)
    ids[3, 2] = ids[4, 1] = value
    path = save(tmp_path / "ids.npy", ids)
    refused(f"window 3, position 2: .*, found {value}, wanted 0 to 99", path, vocabulary)
    if not 0 <= value < 2**31:
        refused("window 3, position 2", path, reads, evaluates)
    ids[3, 2] = ids[4, 1] = 99
    save(tmp_path / "ids.npy", ids)
    vocabulary(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 8)), "it does not hold integers, found 'float64'"),
        (np.ones((3, 8), bool), "found 'bool'"),
        (np.ones((3, 8), complex), "found 'complex128'"),
        (np.ones((3, 8), "U4"), "found '<U4'"),
        (np.ones((3, 8), "M8[s]"), "does not hold integers"),
        (np.zeros((3, 8), [("a", "i4")]), "does not hold integers"),
        (np.ones((0, 8), int), r"found \[0, 8\], wanted \[windows, length\]"),
        (np.ones((8, 0), int), r"found \[8, 0\]"),
        (np.ones(8, int), r"found \[8\]"),
        (np.ones((2, 2, 8), int), r"found \[2, 2, 8\]"),
        (np.ones((3, 3), int), "its windows have 3 tokens, fewer than 4: pass --seqlen 3"),
    ],
)
def test_what_is_no_windows_of_ids_is_refused(
    array: np.ndarray, message: str, tmp_path: Path
) -> None:
    refused(message, save(tmp_path / "ids.npy", array))


def test_too_few_windows(tmp_path: Path) -> None:
    path = save(tmp_path / "ids.npy", np.ones((6, 8), int))
    with pytest.raises(InputError) as caught:
        calibration.calibration_windows(str(path), None, 7, 8, 0)
    assert "holds 6 windows, not 7: pass --nsamples 6" in worded(caught.value)


def header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    content = text.encode("latin1")
    return (
        b"\x93NUMPY"
        + bytes(version)
        + struct.pack("<H" if version == (1, 0) else "<I", len(content))
        + content
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing",
        header(""),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (3, 4)}")[:30],
        header("{'descr': '|O', 'fortran_order': False, 'shape': (3, 4)}")
        + b"cos\nsystem\n(S'true'\ntR.",
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 1000000000)}"),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (" + "9" * 5000 + ", 4)}"),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (-3, -4)}") + bytes(96),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (3, 4)}") + bytes(95),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (True, 4)}") + bytes(32),
        header("{'descr': '<i8', 'fortran_order': False}") + bytes(96),
        header("{'descr': 7, 'fortran_order': False, 'shape': (3, 4)}") + bytes(96),
        header("{'descr': [('a', [('b',)])], 'fortran_order': False, 'shape': (3, 4)}") + bytes(96),
        header("(" * 9000),
        header("(" * 2000 + ")" * 2000),
        header("{'a': '''"),
        header("{'descr': '<i8', 'fortran_order': False, 'shape': (3, 4)}", (2, 0))[:9]
        + b"\xff\xff\xff",
        header("{}", (9, 9)),
    ],
)
def test_other_headers_are_refused_before_anything_is_allocated(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "ids.npy").write_bytes(content)
    refused("ids.npy: it", tmp_path / "ids.npy")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "loop.npy").symlink_to(tmp_path / "loop.npy")
    for name, message in {
        "fifo": "a FIFO",
        "folder": "a folder",
        "loop": "cannot be read",
        "none": "missing",
    }.items():
        refused(message, tmp_path / f"{name}.npy")
