"""GGUF files that are written: what is read back, by this package and by transformers, is the
checkpoint."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from convert import open_checkpoint
from convert.__main__ import main
from convert.assets import load_tokenizer
from convert.errors import CheckpointError
from convert.gguf.header import Header
from convert.gguf.reading import Reader
from jaxprune import load
from tests.helpers import families, tiny
from tests.helpers.gguf_files import CASES, LLAMA3_ROPE
from tests.helpers.optional import needs_torch, torch
from tests.helpers.zeros import pruned


def made(folder: Path, family: str, **others: Any) -> Path:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **{**families.SIZES, **CASES[family][1], **others})
    families.save(folder / "hf", config)
    return folder / "hf"


@needs_torch
@pytest.mark.parametrize("family", CASES)
def test_what_is_read_back_is_the_checkpoint(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(made(tmp_path, family))
    assert main([str(tmp_path / "hf"), str(tmp_path / "made.gguf"), "--type", "f32"]) == 0
    found = open_checkpoint(tmp_path / "made.gguf")
    assert found.spec == source.spec
    for path in source.spec:
        expected = source.read([path])[path]
        if family.startswith("gemma") and path.endswith(".scale"):
            expected = (expected + np.float32(1)) - np.float32(1)
        np.testing.assert_array_equal(found.read([path])[path], expected, err_msg=path)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 60), np.int32)
    expected = load(tmp_path / "hf").logits(tokens)
    np.testing.assert_allclose(
        load(tmp_path / "made.gguf").logits(tokens),
        expected,
        atol=1e-5 * np.abs(expected).max(),
        rtol=1e-4,
    )


@needs_torch
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The given NumPy array is not writable"
)
@pytest.mark.parametrize("family, others", [("llama", {"attention_bias": False}), ("qwen2", {})])
def test_logits_are_those_of_transformers(
    family: str, others: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = made(tmp_path, family, **others)
    assert main([str(folder), str(tmp_path / "made.gguf"), "--type", "f32"]) == 0
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(*place, **options)(tokens).logits
            for place, options in (([folder], {}), ([tmp_path], {"gguf_file": "made.gguf"}))
        )
    torch.testing.assert_close(ours, theirs)


def test_llama3s_factors_come_back(tmp_path: Path) -> None:
    tiny.save(tmp_path / "hf", tiny.config(rope_parameters=LLAMA3_ROPE))
    assert main([str(tmp_path / "hf"), str(tmp_path / "made.gguf")]) == 0
    read = load(tmp_path / "made.gguf").hf_config
    assert read["rope_scaling"] | {"rope_theta": read["rope_theta"]} == LLAMA3_ROPE


@pytest.mark.parametrize(
    "kind, most",
    [
        ("f32", 0),
        ("f16", 5e-4),
        ("bf16", 4e-3),
        ("q8_0", 5e-3),
        ("q5_0", 0.05),
        ("q4_0", 0.15),
        ("q4_1", 0.15),
    ],
)
def test_zeros_stay_where_a_type_has_zero(kind: str, most: float, tmp_path: Path) -> None:
    config = tiny.config(hidden_size=64, intermediate_size=96)
    source = pruned(tiny.save(tmp_path / "dense", config), tmp_path / "pruned")
    assert main([str(source), str(tmp_path / "made.gguf"), "--type", kind]) == 0
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "made.gguf")
    kept = True
    for path in before.spec:
        array, found = before.read([path])[path], after.read([path])[path]
        assert np.abs(array - found).max() <= most * np.abs(array).max()
        kept &= not found[array == 0].any()
    assert kept == (kind != "q4_1")
    kinds = {tensor.name: tensor.kind.name for tensor in Header(tmp_path / "made.gguf").tensors}
    assert {*kinds.values()} >= {"F32", kind.upper()} and kinds[
        "blk.1.ffn_up.weight"
    ] == kind.upper()
    of_embedding = kind.upper() if kind in ("f32", "f16", "bf16") else "Q8_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == of_embedding


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "hf", tiny.config(hidden_size=64, intermediate_size=72))
    assert main([str(source), str(tmp_path / "made.gguf"), "--type", "q8_0"]) == 0
    kinds = {tensor.name: tensor.kind.name for tensor in Header(tmp_path / "made.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize(
    "entries, line, message",
    [
        ({}, "--type q3_k", "f32, f16"),
        ({}, "--zstd 3", "leave --zstd out"),
        ({"hidden_act": "relu"}, "", "hidden_act"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "",
            "dynamic",
        ),
        ({"model_type": "opt"}, "", "cannot be written, found 'opt'"),
        (None, "", "no tokenizer"),
    ],
)
def test_what_cannot_be_a_file_is_refused_and_nothing_is_made(
    entries: dict[str, Any] | None,
    line: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    source = tiny.save(tmp_path / "hf", tiny.config())
    if entries is None:
        for file in source.glob("tokenizer*"):
            file.unlink()
    elif entries:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | entries))
    assert main([str(source), str(tmp_path / "made.gguf"), *line.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_only_llama_cpp_rounds_to_is_not_compared(checkpoint: Path, tmp_path: Path) -> None:
    assert main([str(checkpoint), str(tmp_path / "model.gguf"), "--type", "q8_0"]) == 0
    reader, path = Reader(tmp_path / "model.gguf"), "lm_head.kernel"
    tensor, expert = reader._tensors[path]
    reader._tensors[path] = tensor._replace(kind=GGMLQuantizationType.Q6_K), expert
    with pytest.raises(CheckpointError, match="nothing but llama.cpp rounds to Q6_K"):
        reader.held(path, np.zeros((256, 8), np.float32))


def test_numbers_beyond_float16_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tiny.save(tmp_path / "hf", tiny.config())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 7e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert main([str(source), str(tmp_path / "made.gguf")]) == 2
    assert "float16 cannot hold: pass --type bf16" in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "made.gguf"), "--type", "bf16"]) == 0


def test_a_file_of_ours_is_replaced_and_a_changed_one_is_not(
    checkpoint: Path, tmp_path: Path
) -> None:
    line = [str(checkpoint), str(tmp_path / "made.gguf")]
    assert main(line) == 0
    assert main(line) == 2
    assert main([*line, "--overwrite"]) == 0
    with (tmp_path / "made.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert main([*line, "--overwrite"]) == 2


def sentencepiece() -> PreTrainedTokenizerFast:
    """As the fast tokenizers of Llama 2 and Gemma are: SentencePiece's space, unknown characters as
    bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    generator = np.random.default_rng(0)
    made.train_from_iterator(
        [" ".join(generator.choice(tiny.WORDS, 8)) for _ in range(500)], trainer
    )
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    made = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_tokens_are_the_same(kind: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "hf", tiny.config(vocab_size=400))
    tokenizer = sentencepiece() if kind == "sentencepiece" else tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(source)
    assert main([str(source), str(tmp_path / "made.gguf")]) == 0
    reader = open_checkpoint(tmp_path / "made.gguf")
    found = load_tokenizer(reader.assets)
    for text in ("The cat sat on the mat.", "a big old tree, é ü 12", "then  it was\nvery small"):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.chat_template == tokenizer.chat_template
    header = Header(tmp_path / "made.gguf")
    assert len(header.get("tokenizer.ggml.tokens")) == 400
    kinds = header.get("tokenizer.ggml.token_type")
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert kinds.count(gguf.TokenType.BYTE) == (256 if kind == "sentencepiece" else 0)


@pytest.mark.parametrize(
    "steps, name",
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        (
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ],
            "smollm",
        ),
        (
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)],
            "default",
        ),
    ],
)
def test_cuts_have_llama_cpps_names(
    steps: list[Any], name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tiny.save(tmp_path / "hf", tiny.config())
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    )
    tokenizer.save_pretrained(source)
    assert main([str(source), str(tmp_path / "made.gguf")]) == 0
    assert Header(tmp_path / "made.gguf").get("tokenizer.ggml.pre") == name
    assert ("warning" in capsys.readouterr().err) == (name == "default")
