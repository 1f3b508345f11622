"""Checkpoints of other people: whatever stands in place of a file, one clear error before anything
waits or is made."""

import json
import logging
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import CheckpointError, open_checkpoint
from convert.__main__ import main
from convert.assets import copy_assets, load_config, load_tokenizer, read_config
from convert.consistency import check
from convert.files import expand
from convert.hub import resolve
from convert.safetensors_header import header
from jaxprune import StreamedModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, capsys: pytest.CaptureFixture) -> str:
    """The line with which a conversion refuses a checkpoint."""
    target = folder.with_name("target")
    assert main([str(folder), str(target)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and not target.exists()
    return line


# --- config.json


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("vocab_size", -1),
        ("hidden_size", 10**12),
        ("num_attention_heads", 0),
        ("intermediate_size", 3.5),
        ("max_position_embeddings", "1024"),
        ("rms_norm_eps", -1e-5),
        ("tie_word_embeddings", "yes"),
        ("quantization_config", [1]),
        ("model_type", ["llama"]),
        ("dtype", "load"),
        ("eos_token_id", "</s>"),
        ("configuration_files", ["config.4.0.0.json"]),
        ("per_layer_config", {"0": {"hidden_size": 3}}),
    ],
)
def test_entries_of_the_wrong_type_or_size_are_named(
    entry: str, value: Any, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    edit(folder / "config.json", **{entry: value})
    assert f"config.json: {entry}: an entry cannot be used" in refused(folder, capsys)


@pytest.mark.parametrize("text", ["NaN", "1e999", "9" * 5000, "[" * 5000, '"\\ud800"', "", "{"])
def test_json_that_no_parser_should_take(
    text: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"attention_dropout": 0.0', f'"attention_dropout": {text}')
    )
    assert "config.json: it " in refused(folder, capsys)


def test_missing_entries_name_the_model_type(folder: Path, capsys: pytest.CaptureFixture) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert (
        "hidden_size: an entry that a decoder has is missing, found \"model type 'llama'\""
        in refused(folder, capsys)
    )


def test_null_is_no_quantization(folder: Path) -> None:
    edit(folder / "config.json", quantization_config=None)
    assert StreamedModel(open_checkpoint(folder)).num_layers == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 7}, "head_dim|rotary"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            "rope_parameters.rope_theta",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}}, "factor"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 0,
                    "truncate": True,
                }
            },
            "factor",
        ),
        ({"rope_parameters": {"rope_type": 5, "rope_theta": 1e4}}, "rope_type"),
        ({"hidden_act": "tanh"}, "activation 'tanh'"),
    ],
)
def test_entries_of_the_family_are_checked(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        StreamedModel(open_checkpoint(folder))
    assert str(error.value).startswith(str(folder / "config.json"))


def test_transformers_sees_what_was_checked(folder: Path) -> None:
    # transformers' own reader would go on to config.4.0.0.json, or run auto_map's code.
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    config = load_config(folder)
    assert {name: getattr(config, name) for name in ("hidden_size", "vocab_size")} == {
        "hidden_size": 32,
        "vocab_size": 300,
    }


# --- what stands in place of a file


def put(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket", "loop", "folder"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        WEIGHTS,
        INDEX,
    ],
)
def test_only_regular_files_are_opened(
    name: str,
    kind: str,
    folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)  # a socket's path may have a hundred characters
    put(kind, folder / name)
    said = refused(folder, capsys)
    assert name in said and (
        "wanted a regular file" in said or "links" in said or "leads outside" in said
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_one_error(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "tokenizer.json").chmod(0)
    assert "tokenizer.json: it cannot be read (no permission)" in refused(folder, capsys)


def test_links_that_lead_outside(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "inside.txt").symlink_to("config.json")
    (tmp_path / "copy").mkdir()
    with caplog.at_level(logging.WARNING, "convert"):
        copy_assets(folder, tmp_path / "copy")
    assert "notes.txt was not copied" in caplog.text and "secret.txt" in caplog.text
    assert (
        not (tmp_path / "copy/notes.txt").exists()
        and not (tmp_path / "copy/inside.txt").is_symlink()
    )
    for name in (WEIGHTS, "config.json"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: it is a link that leads outside"):
            open_checkpoint(folder)
        (folder / name).unlink()
        shutil.move(tmp_path / name, folder / name)


def test_a_file_whose_name_is_no_text_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("")
    assert main([str(folder), str(tmp_path / "copy")]) == 0
    assert "was not copied: its name is no UTF-8" in capsys.readouterr().err
    assert not list((tmp_path / "copy").glob("caf*"))


def test_records_of_an_earlier_run_are_not_copied(folder: Path, tmp_path: Path) -> None:
    for name in ("params.json", "jaxprune.json", ".marker.json", "lm-eval-dense.json", INDEX):
        (folder / name).write_text("{}")
    (tmp_path / "copy").mkdir()
    copy_assets(folder, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# --- weights


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a\0.safetensors", "x.bin", "", 5]
)
def test_shards_lie_in_the_folder(shard: Any, folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    assert "weight_map.model.norm.weight: a shard's name cannot be used" in refused(folder, capsys)


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[NORM].update(shape=[-32]), "model.norm.weight.shape.0"),
        (lambda h: h[NORM].update(shape=[2**40] * 8), "does not fill its 128 bytes"),
        (lambda h: h[NORM].update(shape=[1] * 100), "model.norm.weight.shape"),
        (lambda h: h[NORM].update(data_offsets=[2**70, 2**70 + 128]), "data_offsets.0"),
        (lambda h: h[NORM].update(data_offsets=h[HEAD]["data_offsets"]), "overlap|gap"),
        (lambda h: h[NORM].update(dtype="F7"), "its dtype is unknown, found 'F7'"),
        (lambda h: h.update(__metadata__={"format": 1}), "__metadata__"),
        (lambda h: h.update(x=[]), "x: an entry cannot be used"),
        (lambda h: h.pop(NORM), "gap|truncated"),
    ],
)
def test_headers_are_held_against_the_file(
    change: Callable[[dict], None], message: str, folder: Path
) -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    described = json.loads(content[8 : 8 + length])
    change(described)
    text = json.dumps(described).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(CheckpointError, match=message):
        header(folder / WEIGHTS)


@pytest.mark.parametrize("length", [0, 1, 2**25 + 1, 2**64 - 1])
def test_the_headers_length_is_held_against_the_file(length: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("given", "like"),
    [("norm.weight", NORM), ("model.lm_head.weight", HEAD), ("model.norm.scale", NORM)],
)
def test_two_names_for_one_param_are_both_named(
    given: str, like: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    stored = load_file(folder / WEIGHTS)
    save_file(stored | {given: stored[like].copy()}, folder / WEIGHTS)
    said = refused(folder, capsys)
    assert "two names for one param" in said and given in said and like in said


@pytest.mark.parametrize(
    "name",
    ["model./tmp/x.weight", "../x.weight", "layers.\u00b2.x.weight", "weight", f"a.{'9' * 5000}"],
)
def test_names_cannot_lead_anywhere(name: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    stored = load_file(folder / WEIGHTS)
    save_file(stored | {name: np.ones(3, np.float32)}, folder / WEIGHTS)
    assert "no tensor of a model has such a name" in refused(folder, capsys)


def test_a_name_is_not_the_beginning_of_another(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    stored = load_file(folder / WEIGHTS)
    save_file(stored | {"model.layers.0.mlp": np.ones(3, np.float32)}, folder / WEIGHTS)
    assert "is the beginning of another" in refused(folder, capsys)


def test_comparing_layers_takes_time_by_tensors(tmp_path: Path) -> None:
    # 4000 layers of one tensor each, no two of one name: layers times names would be 16 million
    # comparisons.
    names = {f"model.layers.{i}.x{i}.weight": np.ones(1, np.float32) for i in range(4000)}
    save_file(names, tmp_path / WEIGHTS)
    needed = {"model_type": "llama", "vocab_size": 1, "hidden_size": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(needed | {"num_hidden_layers": 4000}))
    spec = open_checkpoint(tmp_path).spec
    with pytest.raises(CheckpointError, match=r"surplus: layers.0.x0.scale \[1\].* and 3995 more"):
        check(spec, read_config(tmp_path))


# --- tokenizers


def test_a_tokenizer_of_more_tokens_is_refused(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["the"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match="another model's, found 5000, wanted ids below .* of 300"
    ):
        load_tokenizer(folder)


def test_tokens_that_a_tokenizer_adds_are_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token_id == 300
    assert "adds tokens up to id 300; the model knows 300" in caplog.text


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": NaN}'),
        (
            "tokenizer.json",
            '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": 3, "merges": '
            "[]}}",
        ),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"model_max_length": "1024"}'),
        ("tokenizer_config.json", '{"model_input_names": 3}'),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["evil.X", null]}}',
        ),
        ("special_tokens_map.json", "\xff"),
    ],
)
def test_damaged_tokenizers_are_one_error(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text, encoding="latin-1")
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    with pytest.raises(CheckpointError):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "it is missing, and the other files make no tokenizer: take the one"),
        ("garbage", r"it is not valid JSON \(expected value"),
        ("{}", r"it makes no tokenizer \(KeyError: 'added_tokens'\): take the one"),
    ],
)
def test_what_keeps_a_tokenizer_from_being_read_is_named(
    text: str | None, problem: str, folder: Path
) -> None:
    path = folder / "tokenizer.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {problem}"):
        load_tokenizer(folder)


def test_a_panic_is_an_error_and_a_stop_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):  # pyo3's
        pass

    def raising(error: BaseException) -> Callable[..., None]:
        def load(*args: object, **options: object) -> None:
            raise error

        return load

    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", raising(PanicException("index out of bounds"))
    )
    with pytest.raises(CheckpointError, match="PanicException: index out of bounds"):
        load_tokenizer(folder)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "text", ["[]", '{"eos_token_id": "</s>"}', '{"temperature": NaN}', '{"top_p": -1}', "{"]
)
def test_generation_settings_are_checked(
    text: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json: " in refused(folder, capsys)


# --- names of checkpoints


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name is empty"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "no file can have this name"),
        ("~nobody-here/model", "no home folder"),
        ("owner--x/na..me", "no name that a hub repository can have"),
        ("ow ner/name", "no checkpoint 'ow ner/name'"),
        ("\udcff\udcfe", "no checkpoint"),
        ("../nothing/here", "no checkpoint"),
    ],
)
def test_names_of_no_checkpoint(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        resolve(name)
    assert len(str(error.value)) < 600


def test_links_to_nothing_and_loops_are_distinguished(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="a link to nothing"):
        resolve(tmp_path / "dangling")
    with pytest.raises(CheckpointError, match="Too many levels"):
        resolve(tmp_path / "loop")


def test_home_folders_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/x") == tmp_path / "x" and expand("x~") == Path("x~")


def test_a_cache_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("huggingface_hub.snapshot_download", denied)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        CheckpointError, match="hub: the hub's cache cannot be used for .* HF_HUB_CACHE"
    ):
        resolve("llama-7b")
