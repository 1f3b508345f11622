import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from convert import CheckpointError, open_checkpoint
from convert.__main__ import main
from tests import tiny
from tests.convert.test_hf import same, tensors


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
