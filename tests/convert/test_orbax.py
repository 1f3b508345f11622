import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from convert import CheckpointError, open_checkpoint
from convert.__main__ import main
from convert.orbax import save_tree
from tests.helpers import tiny
from tests.helpers.checkpoints import same, tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_bit_for_bit(dtype: str, tied: bool, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", tiny.config(tie_word_embeddings=tied), dtype=dtype)
    assert main([str(source), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert open_checkpoint(tmp_path / "orbax").spec == open_checkpoint(source).spec
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    assert same(tensors(source), tensors(tmp_path / "back"))
    assert (tmp_path / "back" / "tokenizer.json").exists()


def test_parts_are_plain_orbax_pytrees(checkpoint: Path, tmp_path: Path) -> None:
    assert main([str(checkpoint), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    tree = ocp.load(tmp_path / "orbax" / "params" / "layers.1")
    reader = open_checkpoint(checkpoint)
    for leaf, array in traverse_util.flatten_dict(tree, sep=".").items():
        path = f"layers.1.{leaf}"
        np.testing.assert_array_equal(array, reader.read([path])[path])


def test_a_missing_part_is_one_error(checkpoint: Path, tmp_path: Path) -> None:
    assert main([str(checkpoint), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    shutil.rmtree(tmp_path / "orbax" / "params" / "layers.1")
    with pytest.raises(CheckpointError, match="(?s)incomplete.*layers.1"):
        open_checkpoint(tmp_path / "orbax")


def test_a_relative_folder_is_read_and_its_manifest_stays(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(checkpoint), str(tmp_path / "q"), "--to", "orbax"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["./q", "./hf"]) == 0
    assert same(tensors(checkpoint), tensors(tmp_path / "hf"))
    assert not (tmp_path / "hf" / "params.json").exists()


@pytest.mark.parametrize("name", ["a\\b", os.fsdecode(b"a\xffb")])
def test_a_folder_whose_name_tensorstore_cannot_spell(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    assert main([str(checkpoint), str(folder), "--to", "orbax"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert main([str(folder), str(tmp_path / "back")]) == 0
    assert same(tensors(checkpoint), tensors(tmp_path / "back"))


def bomb(folder: Path) -> None:
    """A part that is all zeros, which take no room."""
    shutil.rmtree(folder / "params" / "norm")
    ocp.save(folder / "params" / "norm", {"scale": np.zeros((9 * 2**23,), np.float32)})


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda o: fifo(o / "params/norm/fifo"), "fifo: it is a FIFO"),
        (lambda o: (o / "params/norm/loop").symlink_to("loop"), "links"),
        (
            lambda o: next((o / "params/norm").rglob("_METADATA")).write_text("[[["),
            "norm: it cannot be read",
        ),
        (
            lambda o: next((o / "params/norm").rglob("_METADATA")).unlink(),
            "norm: it cannot be read",
        ),
        (lambda o: (o / "params.json").write_text('{"parts": ["../../x"]}'), "parts.0"),
        (lambda o: (o / "params.json").write_text('{"parts": ["/x"]}'), "parts.0"),
        (lambda o: (o / "params.json").write_text('{"parts": 3}'), "parts"),
        (lambda o: (o / "params.json").write_text("{}"), "parts: an entry is missing"),
        (lambda o: (o / "params.json").write_text("["), "not valid JSON"),
        (lambda o: fifo(o / "params.json"), "params.json: it is a FIFO"),
        (lambda o: fifo(o / "tokenizer.json"), "tokenizer.json: it is a FIFO"),
        (bomb, "larger than its files can hold, found 301989888"),
    ],
)
def test_damage_is_one_error(
    damage: Callable[[Path], object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    assert main([str(checkpoint), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    damage(tmp_path / "orbax")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "orbax")


def test_the_manifest_names_the_parts(checkpoint: Path, tmp_path: Path) -> None:
    assert main([str(checkpoint), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    manifest = json.loads((tmp_path / "orbax" / "params.json").read_text())
    assert manifest == {
        "parts": ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "lm_head"]
    }


@pytest.mark.parametrize("look", range(5, 50, 5))
def test_a_save_outlasts_a_sleep(
    look: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks = time.time, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() + 24 * 3600 * (next(looks) > look))
        save_tree(tmp_path / "tree", {"a.b": np.ones(3)})
    np.testing.assert_array_equal(ocp.load(tmp_path / "tree")["a"]["b"], np.ones(3))
