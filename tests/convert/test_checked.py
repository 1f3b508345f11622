"""Tensors are checked once, while they stream by."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert.hf
from convert import DamagedError, open_checkpoint, parts
from convert.checked import ChangedError, CheckedReader, digest, require_finite
from tests.helpers import tiny

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(3, 70_001), (7,), (2, 3, 5)])
def test_the_first_number_that_is_not_finite_is_named(
    dtype: type, bad: float, shape: tuple[int, ...]
) -> None:
    largest = ml_dtypes.finfo(dtype).max
    array = np.full(shape, largest, dtype)
    array.reshape(-1)[::2] = -largest
    for order in (array, array.T):
        require_finite("x", order)
        broken = order.copy(order="K")
        last = tuple(size - 1 for size in broken.shape)
        broken[last] = bad
        with pytest.raises(DamagedError, match="not finite") as raised:
            require_finite("x", broken)
        assert raised.value.entry == f"x{list(last)}"


def test_nothing_to_look_at_is_finite() -> None:
    require_finite("x", np.zeros((0, 4), np.float32))
    require_finite("x", np.zeros((), np.float32))


def test_digests_tell_dtypes_shapes_and_bytes_apart() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    others = [
        array.T,
        array.reshape(4, 3),
        array.astype(np.float16),
        np.where(array == 5, 6, array),
    ]
    assert len({digest(one) for one in [array, *others]}) == 5
    assert digest(array) == digest(array.copy())
    assert digest(np.float32([0.0])) != digest(np.float32([-0.0]))


def test_each_tensor_is_looked_at_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr("convert.checked.digest", lambda array: looked.append("") or digest(array))
    reader = open_checkpoint(checkpoint)
    assert isinstance(reader, CheckedReader)
    reader.read(["norm.scale"])
    assert not looked and not reader.digests
    reader.remember({})
    for _ in range(2):
        for paths in parts(reader.spec).values():
            reader.read(paths)
    assert len(looked) == len(reader.spec) == len(reader.digests)


@pytest.mark.parametrize(
    "name", ["embed_tokens.embedding", "layers.1.mlp.up_proj.kernel", "norm.scale"]
)
def test_a_tensor_that_changed_is_named(name: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, tiny.config())
    before = open_checkpoint(folder)
    assert isinstance(before, CheckedReader)
    before.remember({})
    for paths in parts(before.spec).values():
        before.read(paths)
    signature = before.signature()

    after = CheckedReader(convert.hf.Reader(folder))
    after.remember(before.digests)
    after.require_unchanged(signature)
    assert not after._met  # the files' signature is enough
    os.utime(folder / "model.safetensors")
    after.require_unchanged(signature)
    assert after._met == after.spec.keys()

    times = os.stat(folder / "model.safetensors")
    flip(folder / "model.safetensors", after._reader, name)
    os.utime(folder / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    after = CheckedReader(convert.hf.Reader(folder))
    after.remember(before.digests)
    with pytest.raises(ChangedError) as raised:
        after.require_unchanged(signature)
    assert raised.value.entry == name
    with pytest.raises(ChangedError):
        CheckedReader.read(after, [name])


def flip(file: Path, reader: object, name: str) -> None:
    """Changes the lowest bit of a tensor's first number in its file."""
    array = reader.read([name])[name]  # type: ignore[attr-defined]
    stored = (array.T if name.endswith(".kernel") else array).tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(stored)] ^= 1
    file.write_bytes(content)
