"""Damaged files: whatever their bytes, an error that says so or a checkpoint, and no more memory
than they warrant."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert.gguf
import convert.hf
from convert import CheckpointError, parts
from convert.assets import read_config
from convert.consistency import check
from tests.helpers import tiny
from tests.helpers.checkpoints import write_gguf

EXAMPLES = int(os.environ.get("JAXPRUNE_FUZZ", "50"))
"""Damaged files of each kind; JAXPRUNE_FUZZ=1000 is two minutes."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    tiny.save(folder / "hf", tiny.config(num_hidden_layers=1))
    config = tiny.config(num_hidden_layers=1)
    whole = write_gguf(folder / "model.gguf", config, gguf.GGMLQuantizationType.F32)
    return {"gguf": whole, "safetensors": folder / "hf/model.safetensors"}


def load(path: Path) -> None:
    """All that a conversion does before it writes."""
    reader = (convert.gguf if path.is_file() else convert.hf).Reader(path)
    check(reader.spec, read_config(reader.assets))
    for paths in parts(reader.spec).values():
        reader.read(paths)


def header_of(content: bytes) -> int:
    """Bytes of a file before its tensors' data, about."""
    return 8 + struct.unpack("<Q", content[:8])[0] if content[:4] != b"GGUF" else len(content) // 2


@st.composite
def damages(draw: Callable) -> Callable[[bytes], bytes]:
    """A function that damages a file's content."""
    kind = draw(st.sampled_from(["bytes", "truncate", "length", "number", "insert"]))
    where, value = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 2**64 - 1))
    count, early = draw(st.integers(1, 8)), draw(st.booleans())

    def damage(content: bytes) -> bytes:
        end = header_of(content) if early else len(content)
        at = int(where * end)
        changed = bytearray(content)
        if kind == "bytes":
            for i in range(count):
                changed[(at + i * 7) % end] ^= 1 + value % 255
        elif kind == "truncate":
            del changed[at:]
        elif kind == "length":
            changed[: min(8, len(changed))] = struct.pack("<Q", value)
        elif kind == "number":
            changed[at : at + 8] = struct.pack("<Q", value >> (8 * count % 64))
        else:
            changed[at:at] = bytes([value % 256]) * count
        return bytes(changed)

    return damage


@st.composite
def headers(draw: Callable) -> Callable[[dict], None]:
    """A function that changes a safetensors file's header, which stays JSON."""
    which, field = (
        draw(st.integers(0, 100)),
        draw(st.sampled_from(["dtype", "shape", "data_offsets", None])),
    )
    number = st.one_of(
        st.integers(-(2**65), 2**65),
        st.integers(-3, 100),
        st.floats(),
        st.text(max_size=3),
        st.none(),
    )
    value = draw(
        st.one_of(
            number,
            st.lists(number, max_size=4),
            st.sampled_from(["F32", "F4", "I64", "BF16", "BOOL"]),
        )
    )

    def change(header: dict) -> None:
        name = sorted(header)[which % len(header)]
        if field is None or not isinstance(header[name], dict):
            header[name] = value
        else:
            header[name][field] = value

    return change


def survive(path: Path, size: int) -> bool:
    """Whether a damaged file is refused; it must not ask for memory that its size does not
    warrant."""
    tracemalloc.start()
    try:
        load(path)
        return False
    except CheckpointError as error:
        assert len(str(error)) < 5000
        return True
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * size + 2**24, peak


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_damaged_bytes(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    content = files[kind].read_bytes()
    path = tmp_path / files[kind].name
    counts = [0, 0]
    if kind == "safetensors":
        (tmp_path / "config.json").write_bytes(files[kind].with_name("config.json").read_bytes())

    @settings(
        max_examples=EXAMPLES,
        deadline=10_000,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(damages())
    def each(damage: Callable[[bytes], bytes]) -> None:
        path.write_bytes(damage(content))
        counts[survive(tmp_path if kind == "safetensors" else path, len(content))] += 1

    each()
    print(f"{kind}: {counts[1]} of {sum(counts)} refused")
    assert counts[1] > EXAMPLES / 10


def test_damaged_safetensors_headers(files: dict[str, Path], tmp_path: Path) -> None:
    content = files["safetensors"].read_bytes()
    (tmp_path / "config.json").write_bytes(
        files["safetensors"].with_name("config.json").read_bytes()
    )
    length = struct.unpack("<Q", content[:8])[0]
    counts = [0, 0]

    @settings(
        max_examples=EXAMPLES,
        deadline=10_000,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(headers())
    def each(change: Callable[[dict], None]) -> None:
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(
            struct.pack("<Q", len(text)) + text + content[8 + length :]
        )
        counts[survive(tmp_path, len(content))] += 1

    each()
    print(f"safetensors headers: {counts[1]} of {sum(counts)} refused")
    assert counts[1] > EXAMPLES / 2
