"""Formats of files: each lists the changes of a content that make sense in it, and makes one."""

import functools
import gzip
import io
import json
import random
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.hostile.json_edits import VALUES, change_json, json_edits


class Format(NamedTuple):
    """How the content of one kind of file is changed.

    Attributes:
        edits: content -> (kind, place) of each change.
        apply: (content, kind, place) -> the changed content; ValueError, LookupError or TypeError
            where that is impossible, as it may be after another change.
    """

    edits: Callable[[bytes], Iterator[tuple[str, str]]]
    apply: Callable[[bytes, str, str], bytes]


def _json_apply(content: bytes, kind: str, place: str) -> bytes:
    return change_json(content.decode(), kind, place).encode()


def _json_edits(content: bytes) -> Iterator[tuple[str, str]]:
    yield from json_edits(json.loads(content))
    yield from ((kind, "") for kind in VALUES)


def _lines_edits(content: bytes) -> Iterator[tuple[str, str]]:
    """Of rows of JSON: the first, one in the middle, the last."""
    lines = content.splitlines()
    for number in sorted({0, len(lines) // 2, len(lines) - 1}):
        yield from json_edits(json.loads(lines[number]), str(number))
        yield from ((kind, str(number)) for kind in VALUES)


def _lines_apply(content: bytes, kind: str, place: str) -> bytes:
    lines = content.splitlines()
    number, slash, pointer = place.partition("/")
    lines[int(number)] = change_json(lines[int(number)].decode(), kind, slash + pointer).encode()
    return b"\n".join(lines) + b"\n"


def _unpack(content: bytes) -> tuple[str, bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length].decode(), content[8 + length :]


def _pack(header: str, data: bytes) -> bytes:
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


_PAYLOADS = {
    "F32": {"nan": "0000c07f", "inf": "0000807f", "top": "ffff7f7f"},
    "F64": {"nan": "000000000000f87f", "inf": "000000000000f07f", "top": "ffffffffffffef7f"},
    "U8": {"nan": "ff", "inf": "80", "top": "01"},
}


def _safetensors_edits(content: bytes) -> Iterator[tuple[str, str]]:
    header, _ = _unpack(content)
    tree = json.loads(header)
    yield from json_edits(tree)
    yield from ((kind, "") for kind in VALUES)
    for value in (0, 1, 7, len(header) - 1, len(header) + 1, 10**8, 2**31, 2**63, 2**64 - 1):
        yield "length", str(value)
    for size in (4, 8, 9, 8 + len(header) // 2, 8 + len(header), 9 + len(header), len(content) - 1):
        yield "cut", str(size)
    yield from (("blanks", str(10**6)), ("blanks", str(10**8)), ("appended", "8"))
    names = [name for name in tree if name != "__metadata__"]
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        yield from ((kind, f"{name}|{other}") for kind in ("swapped", "overlapped"))
        yield from ((f"payload-{kind}", name) for kind in ("nan", "inf", "top", "zero"))
        yield "aliased", name


def _safetensors_apply(content: bytes, kind: str, place: str) -> bytes:
    if kind == "length":
        return struct.pack("<Q", int(place)) + content[8:]
    if kind in ("cut", "appended"):
        return content[: int(place)] if kind == "cut" else content + bytes(int(place))
    header, data = _unpack(content)
    if kind == "blanks":
        return _pack(header + " " * int(place), data)
    tree = {} if place.startswith("/") or not place else json.loads(header)
    name, _, other = place.partition("|")
    if kind == "swapped":
        tree[name], tree[other] = tree[other], tree[name]
    elif kind == "overlapped":
        tree[name]["data_offsets"] = tree[other]["data_offsets"]
    elif kind == "aliased":
        start, end = tree[name]["data_offsets"]
        alias = name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"
        tree[alias] = tree[name] | {"data_offsets": [len(data), len(data) + end - start]}
        data += data[start:end]
    elif kind.startswith("payload-"):
        start, end = tree[name]["data_offsets"]
        value = bytes.fromhex(_PAYLOADS[tree[name]["dtype"]].get(kind.removeprefix("payload-"), ""))
        # Somewhere in the middle of the tensor, or all of it zero.
        at = start + (end - start) // 2 // 8 * 8
        data = (
            data[:at] + value + data[at + len(value) :]
            if value
            else data[:start] + bytes(end - start) + data[end:]
        )
    else:
        return _pack(change_json(header, kind, place), data)
    return _pack(json.dumps(tree), data)


@functools.lru_cache(4)
def _spans(content: bytes) -> tuple[list[tuple[str, int, int, bool]], int, int]:
    """The pieces of a GGUF file's header, as (name, offset, size, whether it begins an entry), and
    where the header and the padding after it end.
    """
    import gguf

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        Path(file.name).write_bytes(content)
        reader = gguf.GGUFReader(file.name)
        found, end = [], 0
        for field in [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]:
            at = field.offset
            for number, part in enumerate(field.parts):
                # Of a long array the first elements and the last.
                if number < 9 or number >= len(field.parts) - 2:
                    found.append((f"{field.name}.{number}", at, part.nbytes, number == 0))
                at += part.nbytes
            end = max(end, at)
        return found, end, int(reader.data_offset)


def _gguf_edits(content: bytes) -> Iterator[tuple[str, str]]:
    spans, end, data = _spans(content)
    entries = [at for _, at, _, first in spans if first]
    for name, at, size, first in spans:
        place = f"{name}@{at}+{size}"
        yield from (
            (kind, place)
            for kind in ("cut", "zeros", "ones", "top", "more", "less", "random", "nan")
        )
        # And where the entry, all of them, and the padding end: what an earlier edit has damaged is
        # not parsed again.
        place += f"~{min((start for start in entries if start > at), default=end)}~{end}~{data}"
        if first and name == "general.architecture.0":
            yield "strings", f"{place}*4000000"
        if first and not name.startswith("GGUF."):
            yield from ((kind, place) for kind in ("removed", "twice"))


def _gguf_apply(content: bytes, kind: str, place: str) -> bytes:
    place, _, repeat = place.partition("*")
    place, *ends = place.split("~")
    at, size = map(int, place.rpartition("@")[2].split("+"))
    piece = content[at : at + size]
    number = int.from_bytes(piece[:8], "little")
    if kind == "cut":
        return content[:at]
    if kind in ("removed", "twice", "strings"):
        next_at, end, data = map(int, ends)
        entry = content[at:next_at]
        now = {"removed": b"", "twice": entry * 2, "strings": entry + _strings(int(repeat or 0))}[
            kind
        ]
        header = content[:at] + now + content[next_at:end]
        # where the header counts its kind
        count = 8 if place.startswith(("blk.", "token_embd.", "output")) else 16
        (number,) = struct.unpack_from("<Q", header, count)
        header = (
            header[:count]
            + struct.pack("<Q", number + (-1 if kind == "removed" else 1))
            + header[count + 8 :]
        )
        return header + bytes(-len(header) % 32) + content[data:]
    changed = {
        "zeros": bytes(size),
        "ones": b"\xff" * size,
        "top": piece[:-1] + b"\x7f",
        "more": (number + 1).to_bytes(9, "little")[: min(size, 8)],
        "less": (number - 1).to_bytes(9, "little", signed=True)[: min(size, 8)],
        "nan": bytes.fromhex("0000c07f")[:size],
        "random": random.Random(place).randbytes(size),
    }[kind]
    return content[:at] + changed + piece[len(changed) :] + content[at + size :]


def _strings(count: int) -> bytes:
    """A GGUF entry that is an array of empty strings, eight bytes each."""
    name = b"general.notes"
    return struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)


_ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as-float": lambda ids: ids + 0.5,
    "as-whole-float": lambda ids: ids.astype(np.float64),
    "as-nan": lambda ids: np.where(ids == ids.max(), np.nan, ids),
    "as-complex": lambda ids: ids.astype(np.complex64),
    "as-bool": lambda ids: ids > 5,
    "as-text": lambda ids: ids.astype(str),
    "as-date": lambda ids: ids.astype("M8[s]"),
    "as-record": lambda ids: np.rec.fromarrays([ids, ids]),
    "as-bytes": lambda ids: ids.astype(np.uint8),
    "big-endian": lambda ids: ids.astype(">i8"),
    "in-columns": np.asfortranarray,
    "flat": np.ravel,
    "scalar": lambda ids: ids[0, 0],
    "3-d": lambda ids: ids[None],
    "no-rows": lambda ids: ids[:0],
    "no-columns": lambda ids: ids[:, :0],
    "one-row": lambda ids: ids[:1],
    **{
        f"id{value}": lambda ids, value=value: np.where(
            ids == ids[1, 3], np.array(value, np.asarray(value).dtype), ids
        )
        for value in (-1, 299, 300, 2**31, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1)
    },
}


def _npy_edits(content: bytes) -> Iterator[tuple[str, str]]:
    yield from ((kind, "") for kind in _ARRAYS)
    for shape in (
        "()",
        "(-1, 16)",
        "(10**18, 16)",
        "(4294967296, 4294967296)",
        "(8, 16.0)",
        "x",
        "(" * 5000,
    ):
        yield "shape", shape
    yield from (
        ("descr", d) for d in ("|O", "<f2", "<i16", "<V8", "<U1000000000", "x", "<M8[s]", "|S0")
    )
    yield from (("length", str(length)) for length in (0, 1, 10, 65535))
    yield from (("version", str(version)) for version in (0, 2, 3, 255))


def _npy_apply(content: bytes, kind: str, place: str) -> bytes:
    if kind == "length":
        return content[:8] + struct.pack("<H", int(place)) + content[10:]
    if kind == "version":
        return content[:6] + bytes([int(place)]) + content[7:]
    (length,) = struct.unpack("<H", content[8:10])
    if kind in ("shape", "descr"):
        was = rf"'{kind}': (\(.*?\)|'.*?')"
        now = f"'{kind}': " + (place if kind == "shape" else repr(place))
        header = re.sub(was, lambda _: now, content[10 : 10 + length].decode("latin1")).encode()
        return content[:8] + struct.pack("<H", len(header)) + header + content[10 + length :]
    file = io.BytesIO()
    np.save(file, _ARRAYS[kind](np.load(io.BytesIO(content))))
    return file.getvalue()


_TABLES = ("no-text", "numbers", "nulls", "lists", "bytes", "no-rows", "structs")


def _parquet_apply(content: bytes, kind: str, place: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet

    text = pyarrow.parquet.read_table(io.BytesIO(content)).column(0).to_pylist()
    columns: dict[str, Any] = {
        "no-text": {"body": text},
        "numbers": {"text": list(range(len(text)))},
        "nulls": {"text": [None] * len(text)},
        "lists": {"text": [[one] for one in text]},
        "bytes": {"text": [one.encode() + b"\xff" for one in text]},
        "no-rows": {"text": pa.array([], pa.string())},
        "structs": {"text": [{"text": one} for one in text]},
    }
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns[kind]), file)
    return file.getvalue()


def _gzip_apply(content: bytes, kind: str, place: str) -> bytes:
    if kind == "bomb":  # members follow one another: 4 GB in 300 KB, made in a moment
        return gzip.compress(b'{"text": "' + b" " * 2**25, 1) + gzip.compress(b" " * 2**25, 1) * 128
    return gzip.compress(_lines_apply(_unpacked(content), kind, place), 1)


def _gzip_edits(content: bytes) -> Iterator[tuple[str, str]]:
    yield "bomb", ""
    yield from _lines_edits(_unpacked(content))


def _unpacked(content: bytes) -> bytes:
    """The content of a .gz file; ValueError where it is a bomb, which is not to go off here."""
    with gzip.open(io.BytesIO(content)) as file:
        found = file.read(2**24)
        if file.read(1):
            raise ValueError("it is too large to be edited")
    return found


def _text_apply(content: bytes, kind: str, place: str) -> bytes:
    return {
        "blank": b"\n \n" * 100,
        "line": b"the cat sat " * 200_000,
        "controls": bytes(range(32)) * 500,
    }[kind]


NO_EDITS = Format(lambda content: iter(()), lambda content, kind, place: content)
FORMATS = {
    "json": Format(_json_edits, _json_apply),
    "jsonl": Format(_lines_edits, _lines_apply),
    "safetensors": Format(_safetensors_edits, _safetensors_apply),
    "gguf": Format(_gguf_edits, _gguf_apply),
    "npy": Format(_npy_edits, _npy_apply),
    "parquet": Format(lambda content: ((kind, "") for kind in _TABLES), _parquet_apply),
    "gz": Format(_gzip_edits, _gzip_apply),
    "txt": Format(
        lambda content: ((kind, "") for kind in ("blank", "line", "controls")), _text_apply
    ),
}


def format_of(path: Path) -> Format:
    """By the file's suffix; files of Orbax's own that hold JSON have none."""
    if found := FORMATS.get(path.suffix.removeprefix(".")):
        return found
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return NO_EDITS
    return FORMATS["json"]
