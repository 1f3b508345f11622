"""Masks in files and from checkpoints: bits, names, and what is refused."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import CheckpointError, create_checkpoint, open_checkpoint
from convert.errors import DamagedError, UserError
from jaxprune import Exact, InputError, Magnitude, StreamedModel, Unstructured, Wanda, prune_layers
from jaxprune.loop import other_params
from jaxprune.sparsity import masks as mask_module
from jaxprune.sparsity.masks import (
    FORMAT,
    MaskWriter,
    from_checkpoint,
    from_file,
    is_stored,
    pack,
    unpack,
)
from tests.helpers import tiny


@pytest.mark.parametrize("shape", [(8, 3), (48, 32), (13, 5), (1, 1)])
def test_bits_are_those_of_the_format(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.5
    packed = np.asarray(pack(jnp.asarray(mask)))
    assert packed.shape == (shape[1], -(-shape[0] // 8))
    np.testing.assert_array_equal(
        np.unpackbits(packed, axis=1, count=shape[0], bitorder="little"), mask.T
    )
    np.testing.assert_array_equal(unpack(packed, shape[0]), mask)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (4, 32), dtype=np.int32)


@pytest.fixture(scope="module")
def pruned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint, and its masks in a file."""
    folder = tmp_path_factory.mktemp("masks")
    reader = open_checkpoint(checkpoint)
    masks = MaskWriter(
        folder / "masks.safetensors", StreamedModel(reader).architecture.kernel_shapes()
    )
    with create_checkpoint(folder / "pruned", reader.spec, reader.assets) as out:
        for layer in prune_layers(
            StreamedModel(reader), tokens(), Wanda(), Unstructured(0.6, per_output=True)
        ):
            out.write(layer.params)
            masks.write(layer.index, layer.masks)
        for paths in other_params(reader.spec):
            out.write(reader.read(paths))
    masks.finish()
    return folder / "pruned", folder / "masks.safetensors"


def test_a_mask_file_is_readable_without_jaxprune(pruned: tuple[Path, Path]) -> None:
    checkpoint, file = pruned
    weights = load_file(checkpoint / "model.safetensors")
    masks = load_file(file)
    assert masks.keys() == {name for name in weights if "_proj" in name}
    with safe_open(file, framework="numpy") as opened:
        shapes = json.loads(opened.metadata()["shapes"])
    for name, packed in masks.items():
        assert tuple(shapes[name]) == weights[name].shape
        bits = np.unpackbits(packed, axis=1, count=shapes[name][1], bitorder="little")
        np.testing.assert_array_equal(bits == 1, weights[name] != 0)


def test_masks_from_a_file_and_from_the_checkpoint_agree(pruned: tuple[Path, Path]) -> None:
    checkpoint, file = pruned
    by_checkpoint, by_file = (
        mask_module.load(f"from-checkpoint:{checkpoint}"),
        mask_module.load(f"from-file:{file}"),
    )
    for (index, linear), shape in (
        StreamedModel(open_checkpoint(checkpoint)).architecture.kernel_shapes().items()
    ):
        one, other = by_checkpoint(index, linear), by_file(index, linear)
        assert one.shape == other.shape == shape
        np.testing.assert_array_equal(one.read(), other.read())
    assert is_stored("from-file:x") and is_stored("from-checkpoint:x") and not is_stored("wanda")


def test_weights_rewound_under_a_checkpoints_mask(
    checkpoint: Path, pruned: tuple[Path, Path]
) -> None:
    reader, path = open_checkpoint(checkpoint), pruned[0]
    original = list(
        prune_layers(StreamedModel(reader), tokens(), Wanda(), Unstructured(0.6, per_output=True))
    )
    rewound = list(
        prune_layers(
            StreamedModel(reader), tokens(), Exact(), from_checkpoint(open_checkpoint(path))
        )
    )
    for before, after in zip(original, rewound, strict=True):
        for linear, packed in before.masks.items():
            np.testing.assert_array_equal(after.masks[linear], packed)
            zeros = after.params[f"layers.{after.index}.{linear}.kernel"] == 0
            np.testing.assert_array_equal(~zeros, unpack(packed, len(zeros)))
            assert after[linear].error <= before[linear].error


def test_a_dense_checkpoint_gives_no_mask(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="has 0 % zeros at most in its first, middle and last layer: it is not pruned",
    ):
        mask_module.load(f"from-checkpoint:{checkpoint}")
    rounded = tiny.save(tmp_path, tiny.config())
    stored_weights = load_file(rounded / "model.safetensors")
    stored_weights["model.layers.0.mlp.up_proj.weight"][3, :5] = 0
    save_file(stored_weights, rounded / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="it is not pruned"):
        mask_module.load(f"from-checkpoint:{rounded}")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        mask_module.load("from-checkpoint:nowhere-at-all")
    # by a run that left the first layers dense
    stored_weights["model.layers.2.mlp.up_proj.weight"][:] = 0
    save_file(stored_weights, rounded / "model.safetensors", metadata={"format": "pt"})
    assert not mask_module.load(f"from-checkpoint:{rounded}")(2, "mlp.up_proj").read().any()


def test_masks_of_another_model_are_refused(
    checkpoint: Path, pruned: tuple[Path, Path], tmp_path: Path
) -> None:
    other = open_checkpoint(tiny.save(tmp_path / "wide", tiny.config(intermediate_size=64)))
    deep = open_checkpoint(tiny.save(tmp_path / "deep", tiny.config(num_hidden_layers=4)))
    for masks in (from_checkpoint(open_checkpoint(pruned[0])), from_file(pruned[1])):
        with pytest.raises(
            InputError, match=r"mask of layers.0.mlp.gate_proj is \[32, 48\], but its kernel"
        ):
            prune_layers(StreamedModel(other), tokens(), Magnitude(), masks)
        with pytest.raises(InputError, match="layers.3.self_attn.q_proj"):
            prune_layers(StreamedModel(deep), tokens(), Magnitude(), masks)


def test_files_that_are_no_mask_files_are_refused(
    checkpoint: Path, pruned: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="it is missing"):
        from_file(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="it is a folder, wanted a regular file"):
        mask_module.load(f"from-file:{tmp_path}")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="it is a FIFO, wanted a regular file"):
        mask_module.load(f"from-file:{tmp_path / 'fifo'}")
    for name in ("from-file:", "from-checkpoint:"):
        with pytest.raises(UserError, match="empty|names no checkpoint"):
            mask_module.load(name)
    (tmp_path / "text.safetensors").write_text("no masks here")
    with pytest.raises(InputError, match="it cannot be read"):
        from_file(tmp_path / "text.safetensors")
    with pytest.raises(InputError, match="has no masks"):
        from_file(checkpoint / "model.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(pruned[1].read_bytes()[:-100])
    with pytest.raises(InputError, match="it cannot be read"):
        from_file(cut)
    arrays = load_file(pruned[1])
    with safe_open(pruned[1], framework="numpy") as opened:
        metadata = opened.metadata()
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(arrays | {name: arrays[name][:, :-1].copy()}, cut, metadata=metadata)
    with pytest.raises(
        DamagedError, match="its masks and their shapes disagree: model.layers.1.mlp.up_proj"
    ):
        from_file(cut)
    del arrays[name]
    save_file(arrays, cut, metadata=metadata)
    with pytest.raises(DamagedError, match="disagree"):
        from_file(cut)


@pytest.mark.parametrize(
    "shapes",
    ["", "[]", "1", '{"a": [1]}', '{"a": [1, 2, 3]}', '{"a": [0, 2]}', '{"a": [1, 2.5]}', None],
)
def test_a_mask_files_header_has_a_schema(
    shapes: str | None, pruned: tuple[Path, Path], tmp_path: Path
) -> None:
    metadata = {"format": FORMAT} | ({} if shapes is None else {"shapes": shapes})
    save_file(load_file(pruned[1]), tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(DamagedError, match=r"__metadata__\.shapes"):
        from_file(tmp_path / "x.safetensors")


def test_bits_beyond_the_inputs_are_damage(tmp_path: Path) -> None:
    masks = MaskWriter(tmp_path / "masks.safetensors", {(0, "mlp.up_proj"): (13, 2)})
    masks.write(0, {"mlp.up_proj": np.full((2, 2), 255, np.uint8)})
    masks.finish()
    with pytest.raises(DamagedError, match="bits are set beyond the 13 inputs"):
        from_file(tmp_path / "masks.safetensors")(0, "mlp.up_proj").read()


def test_masks_that_were_never_written_are_missed(tmp_path: Path) -> None:
    masks = MaskWriter(tmp_path / "masks.safetensors", {(0, "mlp.up_proj"): (13, 2)})
    with pytest.raises(CheckpointError, match="never written"):
        masks.finish()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_kept_weight_that_is_zero_in_the_dense_model_is_still_kept_in_the_file(
    dtype: str, tmp_path: Path
) -> None:
    path = tiny.save(tmp_path, tiny.config(num_hidden_layers=1), dtype=dtype)
    mask = np.ones((32, 32), bool)
    reader = open_checkpoint(path)
    (layer,) = prune_layers(StreamedModel(reader), tokens(), Magnitude(), Unstructured(0.0))
    np.testing.assert_array_equal(unpack(layer.masks["self_attn.q_proj"], 32), mask)
