"""Hugging Face folders: bit for bit there and back, and every kind of damage in one message."""

import functools
import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from convert import CheckpointError, create_checkpoint, open_checkpoint, parts
from convert.__main__ import main
from convert.shards import ShardWriter
from jaxprune import StreamedModel
from jaxprune.errors import InputError
from tests.helpers import tiny
from tests.helpers.checkpoints import same, tensors


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip_is_bit_for_bit(dtype: str, tied: bool, sharded: bool, tmp_path: Path) -> None:
    config = tiny.config(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    source = tiny.save(
        tmp_path / "source", config, dtype=dtype, max_shard_size="20KB" if sharded else "1GB"
    )
    assert (source / "model.safetensors.index.json").exists() == sharded
    assert main([str(source), str(tmp_path / "copy")]) == 0
    assert same(tensors(source), tensors(tmp_path / "copy"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()


def test_mixed_dtypes_and_shards_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.save(tmp_path / "source", tiny.config(), dtype="bfloat16")
    mixed = {k: v.astype(np.float32) if "norm" in k else v for k, v in tensors(source).items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(
        "convert.hf.ShardWriter", functools.partial(ShardWriter, max_shard_size=20_000)
    )
    reader = open_checkpoint(source)
    with create_checkpoint(tmp_path / "copy", reader.spec, reader.assets) as writer:
        for paths in reversed(parts(reader.spec).values()):
            writer.write(reader.read(paths))
    assert len(list((tmp_path / "copy").glob("model-*-of-*.safetensors"))) > 3
    assert same(mixed, tensors(tmp_path / "copy"))
    index = json.loads((tmp_path / "copy/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in mixed.values())
    again = open_checkpoint(tmp_path / "copy")
    assert again.spec == reader.spec


def test_kernels_are_inputs_by_outputs_and_contiguous_on_disk(
    checkpoint: Path, tmp_path: Path
) -> None:
    reader = open_checkpoint(checkpoint)
    path = "layers.0.mlp.up_proj.kernel"
    stored = tensors(checkpoint)["model.layers.0.mlp.up_proj.weight"]
    assert reader.spec[path].shape == (32, 48)
    np.testing.assert_array_equal(reader.read([path])[path], stored.T)
    with create_checkpoint(tmp_path / "copy", reader.spec, reader.assets) as writer:
        for paths in parts(reader.spec).values():
            writer.write({p: np.asfortranarray(a) for p, a in reader.read(paths).items()})
    assert same(tensors(checkpoint), tensors(tmp_path / "copy"))


def test_files_have_the_umasks_mode(checkpoint: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert main([str(checkpoint), str(tmp_path / "copy")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o750
    for file in (tmp_path / "copy").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, file


def test_old_buffers_and_stored_tied_heads_are_passed_over(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", tiny.config(tie_word_embeddings=True))
    stored = tensors(source)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4),
        "lm_head.weight": np.ones((300, 32)),
    }
    save_file(stored | extra, source / "model.safetensors", metadata={"format": "pt"})
    assert (
        open_checkpoint(source).spec.keys()
        == StreamedModel(open_checkpoint(source)).architecture.spec.keys()
    )


def broken(source: Path, target: Path, damage: str) -> Path:
    """A copy of a sharded checkpoint with one kind of damage."""
    shutil.copytree(source, target)
    shards = sorted(target.glob("*.safetensors"))
    index_path = target / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    if damage == "missing shard":
        shards[1].unlink()
    elif damage == "truncated shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-10])
    elif damage == "garbage shard":
        shards[1].write_bytes(b"\xff" * 200)
    elif damage == "absent tensor":
        index["weight_map"]["model.layers.0.mlp.extra.weight"] = shards[0].name
        index_path.write_text(json.dumps(index))
    elif damage == "swapped shards":
        a, b = shards[0].read_bytes(), shards[1].read_bytes()
        shards[0].write_bytes(b), shards[1].write_bytes(a)
    elif damage == "broken index":
        index_path.write_text("{")
    elif damage == "no config":
        (target / "config.json").unlink()
    elif damage == "broken config":
        (target / "config.json").write_text("{]")
    elif damage == "pickled":
        for file in [*shards, index_path]:
            file.unlink()
        (target / "pytorch_model.bin").write_bytes(b"")
    elif damage == "no weights":
        for file in [*shards, index_path]:
            file.unlink()
    elif damage == "escaping index":
        index["weight_map"] = {k: "../" + v for k, v in index["weight_map"].items()}
        index_path.write_text(json.dumps(index))
    return target


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing shard", "model-00002-of-.*: it is missing"),
        ("truncated shard", "model-00002-of-.* .*(cut short|truncated)"),
        ("garbage shard", "model-00002-of-.* .*(cut short|truncated)"),
        ("absent tensor", "mlp.extra.weight is in the index but not in"),
        ("swapped shards", "as the index says"),
        ("broken index", "index.json: it is not valid JSON"),
        ("no config", "config.json: it is missing"),
        ("broken config", "not valid JSON"),
        ("pickled", "python -c .*safetensors"),
        ("no weights", "is no checkpoint: expected a folder with config.json and \\*.safetensors"),
        ("escaping index", "outside the folder"),
    ],
)
def test_damage_is_one_clear_error(damage: str, message: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", tiny.config(), max_shard_size="20KB")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        open_checkpoint(broken(source, tmp_path / "broken", damage))


def misfit(source: Path) -> None:
    """Takes one tensor away, adds one and turns one."""
    stored = tensors(source)
    del stored["model.layers.1.mlp.up_proj.weight"]
    stored["model.layers.1.self_attn.q_norm.weight"] = np.ones(8)
    name = "model.layers.2.mlp.down_proj.weight"
    stored[name] = np.ascontiguousarray(stored[name].T)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})


def test_missing_surplus_and_misshapen_tensors_come_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tiny.save(tmp_path / "source", tiny.config())
    misfit(source)
    with pytest.raises(InputError) as error:
        StreamedModel(open_checkpoint(source))
    assert main([str(source), str(tmp_path / "copy")]) == 2
    assert not (tmp_path / "copy").exists()
    for text in (str(error.value), capsys.readouterr().err):
        assert "missing: layers.1.mlp.up_proj.kernel" in text
        assert "surplus: layers.1.self_attn.q_norm.scale" in text
        assert "misshapen: layers.2.mlp.down_proj.kernel is [32, 48]" in text


def test_a_configuration_of_another_size_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tiny.save(tmp_path / "source", tiny.config())
    config = json.loads((source / "config.json").read_text()) | {
        "num_hidden_layers": 4,
        "vocab_size": 301,
    }
    (source / "config.json").write_text(json.dumps(config))
    assert main([str(source), str(tmp_path / "copy")]) == 2
    text = capsys.readouterr().err
    assert "missing: all of layers.3" in text
    assert "misshapen: embed_tokens.embedding is [300, 32], without the configuration's 301" in text


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", tiny.config())
    config = json.loads((source / "config.json").read_text()) | {"model_type": "mamba"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="'mamba' is not supported; supported: .*llama, .*family.md says how"
    ):
        StreamedModel(open_checkpoint(source))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", tiny.config())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(CheckpointError, match="quantized \\(gptq\\)"):
        open_checkpoint(source)
    (source / "config.json").write_text(json.dumps(config))
    stored = tensors(source)
    stored["model.norm.weight"] = np.ones(32, np.int8)
    save_file(stored, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.norm.weight is stored as I8"):
        open_checkpoint(source)


def test_an_existing_target_is_never_touched(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("kept")
    assert main([str(checkpoint), str(target)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert (target / "precious").read_text() == "kept"
    assert main([str(checkpoint), str(target), "--overwrite"]) == 2
    assert "move or remove it yourself" in capsys.readouterr().err
    assert (target / "precious").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_an_interrupted_write_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(checkpoint)
    with (
        pytest.raises(CheckpointError, match="never written"),
        create_checkpoint(tmp_path / "out", reader.spec, reader.assets) as writer,
    ):
        writer.write(reader.read(["norm.scale"]))
    with (
        pytest.raises(KeyboardInterrupt),
        create_checkpoint(tmp_path / "out", reader.spec, reader.assets),
    ):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_at_the_start(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    reader = open_checkpoint(checkpoint)
    with (
        pytest.raises(CheckpointError, match="no room for .* GB"),
        create_checkpoint(tmp_path / "out", reader.spec, reader.assets),
    ):
        pytest.fail("the error comes before any work")
    assert list(tmp_path.iterdir()) == []


def test_reading_a_layer_reads_only_that_layer(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class Spy:
        def __init__(self, *args: object, **options: object) -> None:
            self.file = safe_open(*args, **options)

        def __enter__(self) -> "Spy":
            self.file.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def get_tensor(self, name: str) -> np.ndarray:
            opened.append(name)
            return self.file.get_tensor(name)

    reader = open_checkpoint(checkpoint)
    monkeypatch.setattr("convert.stored.safe_open", Spy)
    reader.read(parts(reader.spec)["layers.1"])
    assert len(opened) == 9
    assert all(name.startswith("model.layers.1.") for name in opened)
