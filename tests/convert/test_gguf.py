"""GGUF files against what transformers loads from them."""

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from convert import CheckpointError, open_checkpoint
from convert.__main__ import main
from convert.assets import load_tokenizer, read_config
from convert.gguf.header import ELEMENTS, Header
from jaxprune import StreamedModel
from jaxprune.models.common.rope import Rope
from tests.helpers import tiny
from tests.helpers.checkpoints import write_gguf
from tests.helpers.gguf_files import LLAMA3_ROPE
from tests.helpers.optional import needs_torch, torch

Q = gguf.GGMLQuantizationType


@needs_torch
@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The given NumPy array is not writable"
)
def test_tensors_and_tokens_are_those_of_transformers(
    kind: gguf.GGMLQuantizationType, tied: bool, tmp_path: Path
) -> None:
    config = tiny.config(hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "model.gguf", config, kind)
    assert main([str(path), str(tmp_path / "hf")]) == 0
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = reference.state_dict()
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")("The cat sat.")[
        "input_ids"
    ]
    assert load_tokenizer(tmp_path / "hf")("The cat sat.")["input_ids"] == ids
    assert mine.config.rms_norm_eps == 1e-5
    StreamedModel(open_checkpoint(path))


def test_assets_have_the_entries_that_transformers_4_reads(tmp_path: Path) -> None:
    reader = open_checkpoint(write_gguf(tmp_path / "a.gguf", tiny.config(), Q.F32))
    config = read_config(reader.assets)
    assert config["rope_theta"] == 10000.0 and "rope_parameters" not in config
    tokenizer = json.loads((reader.assets / "tokenizer_config.json").read_text())
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


def test_llama3_rope_factors_become_the_configuration(tmp_path: Path) -> None:
    config = tiny.config(head_dim=64, rope_parameters=LLAMA3_ROPE)
    plain = Rope.from_hf(
        {"rope_type": "default", "rope_theta": 500000.0}, 64, 1024
    ).inverse_frequencies(8)[0]
    scaled = Rope.from_hf(LLAMA3_ROPE, 64, 1024).inverse_frequencies(8)[0]
    reader = open_checkpoint(write_gguf(tmp_path / "a.gguf", config, Q.F32, factors=plain / scaled))
    assert AutoConfig.from_pretrained(reader.assets).rope_parameters == LLAMA3_ROPE
    other = write_gguf(
        tmp_path / "b.gguf", config, Q.F32, factors=np.linspace(1, 9, 32, dtype=np.float32)
    )
    with pytest.raises(CheckpointError, match="not Llama 3's"):
        open_checkpoint(other)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -100])
def test_a_damaged_file_is_one_error(keep: int, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", tiny.config(), Q.F32).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="no GGUF file, or a damaged one"):
        open_checkpoint(tmp_path / "cut.gguf")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="'rwkv6'"):
        open_checkpoint(tmp_path / "other.gguf")


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def strings(name: str, count: int) -> bytes:
    """The beginning of a field that is an array of so many strings, empty ones if zeros follow."""
    return field(name, 9, struct.pack("<IQ", 8, count))


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(
    path: Path,
    fields: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: int = 0,
    **told: int,
) -> Path:
    """A file of these fields and tensors; `told` are counts that differ from them."""
    counts = told.get("tensors", len(infos)), told.get("count", len(fields))
    header = struct.pack("<4sIQQ", b"GGUF", 3, *counts) + b"".join([*fields, *infos])
    path.write_bytes(header + bytes(-len(header) % 32 + data))
    return path


ALIGNMENT = "general.alignment"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensors": 10**12, "data": 1000}, "so many tensors, found 1000000000000"),
        ({"count": 10**12, "data": 1000}, "so many fields, found 1000000000000"),
        (
            {"fields": [strings("x", 4_000_000)], "data": 2**22},
            "x: .* so many strings, found 4000000",
        ),
        ({"fields": [strings("x", ELEMENTS + 1)], "data": 10**3}, f"at most {ELEMENTS} in all"),
        (
            {"fields": [field("x", 9, struct.pack("<IQ", 9, 1))]},
            "only arrays of numbers and of strings",
        ),
        ({"fields": [field("x", 9, struct.pack("<IQ", 0, 2**63))]}, "too early"),
        ({"fields": [field("x", 8, struct.pack("<Q", 2**63))]}, "a string is too long"),
        ({"fields": [field("x", 8, struct.pack("<Q", 2) + b"\xff\xff")]}, "not UTF-8"),
        ({"fields": [field("x", 77, b"")]}, "x: .*type is unknown, found 77"),
        ({"fields": [field("x", 0, b"1")] * 2}, "x: .*given twice"),
        ({"fields": [field(ALIGNMENT, 4, struct.pack("<I", 0))]}, "alignment cannot be, found 0"),
        ({"fields": [field(ALIGNMENT, 4, struct.pack("<I", 48))]}, "alignment cannot be, found 48"),
        (
            {"fields": [field(ALIGNMENT, 4, struct.pack("<I", 2**31))]},
            "alignment cannot be, found 2147483648",
        ),
        ({"infos": [info("x", [100])]}, "x: .*does not lie in the file"),
        ({"infos": [info("x", [2**40, 2**40])], "data": 99}, "x: .*does not lie in the file"),
        ({"infos": [info("x", [4], offset=2**63)], "data": 99}, "x: .*does not lie in the file"),
        ({"infos": [info("x", [1] * 5)], "data": 99}, "x: .*dimensions cannot be, found 5"),
        ({"infos": [info("x", [])], "data": 99}, "x: .*dimensions cannot be, found 0"),
        ({"infos": [info("x", [0])], "data": 99}, "x: .*cannot have such a shape"),
        ({"infos": [info("x", [33], kind=8)], "data": 99}, "x: .*Q8_0 cannot have such a shape"),
        ({"infos": [info("x", [4], kind=99)], "data": 99}, "x: .*type is unknown, found 99"),
        ({"infos": [info("x", [4])] * 2, "data": 99}, "x: .*given twice"),
        ({"infos": [info("x", [9]), info("y", [4], offset=32)], "data": 99}, "y: .*overlaps"),
    ],
)
def test_what_a_header_declares_is_held_against_the_files_size(
    options: dict, message: str, tmp_path: Path
) -> None:
    path = file(tmp_path / "x.gguf", **options)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        Header(path)
    assert time.perf_counter() - start < 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_arrays_cost_nothing_until_they_are_asked_for(tmp_path: Path) -> None:
    path = file(tmp_path / "x.gguf", [strings("x", 100_000)], data=800_000)
    tracemalloc.start()
    header = Header(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert header.get("x") == [""] * 100_000
    numbers = Header(
        file(tmp_path / "y.gguf", [field("y", 9, struct.pack("<IQ3f", 6, 3, 1, 2, 3))])
    )
    assert numbers.get("y") == [1.0, 2.0, 3.0] and numbers.get("z") is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("llama.block_count", struct.pack("<I", 10**9), "llama.block_count: .*found 1000000000"),
        ("llama.embedding_length", struct.pack("<I", 0), "llama.embedding_length: .*found 0"),
        ("llama.attention.head_count_kv", struct.pack("<I", 7), "not whole heads"),
        (
            "llama.attention.layer_norm_rms_epsilon",
            struct.pack("<f", float("nan")),
            "epsilon: .*found nan",
        ),
        ("llama.rope.freq_base", struct.pack("<f", float("inf")), "freq_base: .*found inf"),
        (
            "tokenizer.ggml.eos_token_id",
            struct.pack("<I", 300),
            "eos_token_id to be one of 300 tokens",
        ),
    ],
)
def test_fields_are_checked(name: str, value: bytes, message: str, tmp_path: Path) -> None:
    content = bytearray(write_gguf(tmp_path / "x.gguf", tiny.config(), Q.F32).read_bytes())
    at = content.index(text(name)) + len(text(name)) + 4  # after the type
    content[at : at + 4] = value
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        # the tokenizer is made when it is asked for
        _ = open_checkpoint(tmp_path / "x.gguf").assets


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"it is a {kind}"):
        open_checkpoint(path)
