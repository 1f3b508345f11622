"""Text of the user's own: what is no text is one error that names its place, and nothing waits or
fills the memory."""

import bz2
import gzip
import json
import lzma
import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from convert.command import worded
from convert.errors import UserError
from convert.zstd import zstd
from jaxprune import calibration
from jaxprune.calibration import documents as _documents
from jaxprune.calibration import text_files
from jaxprune.calibration.documents import Documents
from tests.helpers import tiny


def refused(message: str, path: Path, split: str = "train") -> None:
    with pytest.raises(UserError) as caught:
        text_files.documents(path, split)
    assert re.search(message, line := worded(caught.value)), line


GOOD = b'{"text": "a cat"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.pdf",
            b"x",
            "its name says no known kind of text, wanted .jsonl, .json, .parquet, .txt",
        ),
        ("a.jsonl", b"", "it holds no text"),
        ("a.jsonl", b"\n\r\n  \n", "it holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "it holds no text"),
        ("a.jsonl", GOOD + b'\n{"words": "x"}', r"line 3\.text: an entry is missing"),
        (
            "a.jsonl",
            b'{"conversations": []}',
            "its first row has neither text nor messages, wanted rows as",
        ),
        (
            "a.jsonl",
            GOOD + b'{"text": null}',
            r"line 2\.text: an entry cannot be used, found None, wanted a valid",
        ),
        ("a.jsonl", GOOD + b'{"text": 5}', r"line 2\.text: .*found 5"),
        ("a.jsonl", GOOD + b'{"text": ["a"]}', r"line 2\.text: .*found \['a'\]"),
        ("a.jsonl", GOOD + b'{"text": NaN}', r"line 2\.text: .*found nan"),
        ("a.jsonl", GOOD + b'["a"]', "line 2: an entry cannot be used"),
        ("a.jsonl", GOOD + b'{"text": "a"', "line 2: it is not valid JSON"),
        ("a.jsonl", GOOD + b"{" * 100_000, "line 2: it is not valid JSON"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}', "line 2: it is not valid JSON"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}', "line 2: it is not UTF-8: convert it"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: it is not UTF-8"),
        ("a.json", b'[{"text": "\xff"}]', "byte 11: it is not UTF-8"),
        (
            "a.json",
            b'[{"text": "a"}, {"text": null}]',
            r"1\.text: an entry cannot be used, found None",
        ),
        ("a.json", b'[{"text": "a"},', "it is not valid JSON"),
        ("a.json", b"[]", "it holds no text"),
        ("a.txt", b"", "it holds no text"),
        ("a.txt", b"ab\xffc", "byte 2: it is not UTF-8"),
        ("a.txt", b"ab\0c", "character 2: it is no text, it holds a null byte"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "it is no .parquet file, or damaged"),
        ("a.parquet", b"", "it is no .parquet file, or damaged"),
        ("a.jsonl.gz", b"not packed", "it cannot be unpacked or read"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-12], "it cannot be unpacked or read"),
        ("a.jsonl.bz2", bz2.compress(GOOD)[:-12], "it cannot be unpacked or read"),
        ("a.jsonl.xz", lzma.compress(GOOD)[:-12], "it cannot be unpacked or read"),
        ("a.jsonl.zst", b"not packed", "it cannot be unpacked or read"),
        (
            "a.jsonl.zst",
            zstd.compress(GOOD) + zstd.compress(GOOD)[:-5],
            "it cannot be unpacked or read",
        ),
        ("a.txt.zst", zstd.compress(GOOD)[:-5], "it cannot be unpacked or read"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "it is no .parquet file, or damaged"),
    ],
)
def test_what_is_no_text_is_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(f"{re.escape(name)}: .*{message}" if message[0] != "i" else message, tmp_path / name)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"words": ["a"]}, "its first row has neither text nor messages, wanted rows as"),
        ({"text": ["a", None]}, r"row 2\.text: an entry cannot be used, found None"),
        ({"text": [1, 2]}, r"row 1\.text: an entry cannot be used, found 1"),
        ({"text": [["a"]]}, r"row 1\.text: .*found \['a'\]"),
        ({"text": [{"a": "b"}]}, r"row 1\.text: .*found \{'a': 'b'\}"),
        ({"text": pyarrow.array([], pyarrow.string())}, "it holds no text"),
    ],
)
def test_columns_of_parquet_files(column: dict[str, Any], message: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    refused(message, tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    refused("no .parquet file, or damaged", tmp_path / "a.parquet")


def test_a_later_file_without_text_says_what_it_has(tmp_path: Path) -> None:
    for number, name in enumerate(("text", "words")):
        parquet.write_table(pyarrow.table({name: ["a"]}), tmp_path / f"{number}.parquet")
    refused(r"1\.parquet: text: a column is missing, found \['words'\]", tmp_path)


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "*.jsonl", "a?{b}.jsonl", "a::b.jsonl", "x%20 $HOME.jsonl"]
)
def test_a_name_is_taken_literally(name: str, tmp_path: Path) -> None:
    (tmp_path / "a1.jsonl").write_bytes(b'{"text": "another"}\n')
    (tmp_path / name).write_bytes(GOOD)
    assert list(text_files.documents(tmp_path / name, "train")) == ["a cat"]
    folder = tmp_path / name.removesuffix(".jsonl")
    folder.mkdir()
    (folder / name).write_bytes(GOOD)
    assert list(text_files.documents(folder, "train")) == ["a cat"]


def test_marks_and_line_ends_of_other_systems(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n\r\n{"text": "c"}\r\n')
    assert list(text_files.documents(tmp_path / "a.jsonl", "train")) == ["a\r\nb", "c"]
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nb\rc".encode())
    assert list(text_files.documents(tmp_path / "a.txt", "train")) == ["a\nb\nc"]
    (tmp_path / "a.json").write_text(
        json.dumps([{"text": "a"}, {"text": "b", "score": None}], indent=1)
    )
    assert list(text_files.documents(tmp_path / "a.json", "train")) == ["a", "b"]
    (tmp_path / "b.json").write_text('\n\n[{"text": "a"},\n{"text": "b"}]')
    assert list(text_files.documents(tmp_path / "b.json", "train")) == ["a", "b"]


@pytest.mark.parametrize("pack", [bz2, gzip, lzma, zstd])
def test_packed_files(pack: Any, tmp_path: Path) -> None:
    suffix = {bz2: "bz2", gzip: "gz", lzma: "xz", zstd: "zst"}[pack]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack.compress(GOOD * 3) + pack.compress(GOOD))
    assert list(text_files.documents(tmp_path / f"a.jsonl.{suffix}", "train")) == ["a cat"] * 4
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    (tmp_path / f"a.parquet.{suffix}").write_bytes(
        pack.compress((tmp_path / "a.parquet").read_bytes())
    )
    assert list(text_files.documents(tmp_path / f"a.parquet.{suffix}", "train")) == ["a", "b"]


def test_what_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_documents, "DOCUMENT_BYTES", 2**20)
    monkeypatch.setattr(_documents, "UNPACKED_BYTES", 2**22)
    monkeypatch.setattr(_documents, "IN_MEMORY", 2**20)
    for name, content, message in (
        ("a.jsonl.gz", bytes(2**21), "line 1: a line is too long, wanted at most 1048576 bytes"),
        ("b.jsonl.gz", GOOD * 2**18, "it is too large once unpacked, wanted at most 4194304 bytes"),
        (
            "a.txt.gz",
            b"a" * 2**21,
            "it is too large to be read whole, wanted at most 1048576 bytes",
        ),
        ("a.json.gz", b"[\n" + b" " * 2**21, "it is too large to be read whole"),
        ("a.parquet.gz", bytes(2**23), "it is too large once unpacked"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content, mtime=0))
        refused(message, tmp_path / name)
        (tmp_path / name).with_suffix(".zst").write_bytes(zstd.compress(content))
        refused(message, (tmp_path / name).with_suffix(".zst"))


def test_documents_come_back_from_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a cat", "", "東京" * 100, "🙂"] * 20
    for most in (2**20, 100):
        monkeypatch.setattr(_documents, "IN_MEMORY", most)
        kept = Documents(texts)
        assert (len(kept), list(kept), kept[3], kept[-2], kept[1:5]) == (
            80,
            texts,
            "🙂",
            "東京" * 100,
            texts[1:5],
        )
        with pytest.raises(IndexError):
            kept[80]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    refused("it is a FIFO, wanted a regular file", tmp_path / "fifo.jsonl")
    refused("it is a FIFO, wanted a regular file", tmp_path)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    refused("it cannot be read", tmp_path / "loop.jsonl")
    refused("its name says no known kind", Path("/dev/zero"))
    for name in ("x" * 5000, "a\0b", "~nobody-of-this-name/x.jsonl"):
        with pytest.raises(UserError):
            calibration.calibration_windows(name, tiny.tokenizer(), 1, 10, 0)


def test_the_splits_of_a_folder(tmp_path: Path) -> None:
    def write(name: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")

    (tmp_path / "README.md").write_text("train")
    refused("it has no train split, it has no .jsonl, .json, .parquet, .txt files", tmp_path)
    write("data/train-00001-of-00002.jsonl")
    write("data/train-00000-of-00002.jsonl")
    write("data/.hidden-test.jsonl")
    refused("it has no test split, it has train", tmp_path, "test")
    write("data/validation.jsonl")
    assert list(text_files.documents(tmp_path, "test")) == ["data/validation.jsonl"]
    write("data/test.jsonl")
    assert list(text_files.documents(tmp_path, "test")) == ["data/test.jsonl"]
    ordered = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert list(text_files.documents(tmp_path, "train")) == ordered
    write("more/latest.jsonl")  # no word of it is a split's
    refused("its train split lies in several folders, found", tmp_path)
    (tmp_path / "more/latest.jsonl").unlink()
    (tmp_path / "data/train.txt").write_text("a")
    refused("its train split has files of several kinds", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.jsonl").write_bytes(GOOD)
    assert list(text_files.documents(tmp_path / "train", "train")) == ["a cat"]


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MOST_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_bytes(GOOD)
    refused("it holds too many files, wanted at most 3", tmp_path)
