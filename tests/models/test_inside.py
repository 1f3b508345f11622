"""Text models inside others: the text model is pruned, and everything else goes through."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune import load
from jaxprune.commands.convert import main as convert
from jaxprune.commands.prune import main as prune
from jaxprune.commands.verify import main as verify
from tests.helpers import families, tiny
from tests.helpers.optional import needs_torch, torch

pytestmark = needs_torch
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(params=["newer", "older"])
def gemma3(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Gemma3ForConditionalGeneration, its tensors named as transformers 5 names them, or as on
    the hub."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = families.config("gemma3_text", "plain")
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=299,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path / "gemma3"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Gemma3ImageProcessor"})
    )
    tensors = load_file(folder / "model.safetensors")
    moved = (
        {"model.language_model.": "language_model.model.", "model.": ""}
        if request.param == "older"
        else {}
    )
    for before, after in moved.items():
        tensors = {
            after + name.removeprefix(before) if name.startswith(before) else name: tensor
            for name, tensor in tensors.items()
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_text_model_is_pruned_and_the_rest_goes_through(
    gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    monkeypatch.chdir(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 299, (4, 40))
    np.save("ids.npy", tokens)
    line = (
        "--ckpt gemma3 --method wanda --pattern 2:4 --calib ids.npy --nsamples 4 --seqlen 40 "
        "--eval ppl --eval-text"
    )
    assert prune([*line.split(), "ids.npy", "--out", "pruned", "--save-masks", "masks"]) == 0
    assert verify(["pruned", "--against", "gemma3"]) == 0
    dense, pruned = (
        load_file(Path(folder) / "model.safetensors") for folder in ("gemma3", "pruned")
    )
    assert dense.keys() == pruned.keys()
    kernels = {name for name in dense if "language_model" in name and name.endswith("_proj.weight")}
    assert len(kernels) == 3 * 7 and load_file("masks").keys() == kernels
    for name, tensor in pruned.items():
        if name in kernels:
            assert ((tensor.reshape(-1, 4) == 0).sum(axis=1) == 2).all(), name
        else:
            np.testing.assert_array_equal(tensor, dense[name], err_msg=name)
    for file in ("config.json", "preprocessor_config.json"):
        assert (Path("pruned") / file).read_bytes() == (gemma3 / file).read_bytes()
    loaded, info = AutoModelForImageTextToText.from_pretrained("pruned", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = loaded.double().eval()(input_ids=torch.tensor(tokens)).logits.numpy()
    found = load("pruned").logits(tokens.astype(np.int32))
    assert np.abs(found - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())


def test_orbax_and_back_is_bit_for_bit(gemma3: Path, tmp_path: Path) -> None:
    assert convert([str(gemma3), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert convert([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    before, after = (
        load_file(folder / "model.safetensors") for folder in (gemma3, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
