"""Long texts in chunks: the ids of the whole, whatever the tokenizer, and memory that does not grow
with the text."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from convert import CheckpointError, open_checkpoint
from convert.assets import load_tokenizer
from jaxprune import load
from jaxprune.calibration import tokenization
from jaxprune.commands.prune import main
from jaxprune.errors import InputError
from jaxprune.evaluation.samples import Prompts
from tests.helpers import tiny

WORDS = [
    *tiny.WORDS,
    "Straße",
    "naïve",
    "東京",
    "日本語。",
    "e\u0301te\u0301",
    "🙂🙃",
    "<|end|>",
    "don't",
    "we'll",
    "x=1;",
    "3.14159",
]
SPACES = [" ", " ", " ", "\n", "\n\n", "  ", "\t", " \n ", "\u00a0", "\u3000", "\r\n", "   \n\n"]


def text(generator: random.Random, words: int) -> str:
    """Words of many scripts, more or less apart, with long runs now and then."""
    parts = []
    for _ in range(words):
        parts += [
            generator.choice(WORDS),
            generator.choice(SPACES) if generator.random() < 0.9 else "",
        ]
        if generator.random() < 0.002:
            parts.append(generator.choice([" ", "a", "ab", "\n", "."]) * generator.randint(1, 3000))
    return "".join(parts)


def wrapped(made: Tokenizer) -> PreTrainedTokenizerFast:
    """With tokens around a text, as LLaMA's."""
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama() -> PreTrainedTokenizerFast:
    """As LLaMA's first: BPE over the whole text, spaces as ▁ and one before it, bytes for what is
    unknown."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    # for the training only, as merges within words are learnt
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    made.train_from_iterator(tiny.sentences(random.Random(0), 500), trainer)
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return wrapped(made)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: a path through a lattice, after compatibility composition."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    made.train_from_iterator(tiny.sentences(random.Random(0), 500), trainer)
    return wrapped(made)


def smollm() -> PreTrainedTokenizerFast:
    reader = open_checkpoint("smollm2-135m")
    return load_tokenizer(reader.assets)


@pytest.mark.parametrize("make", [tiny.tokenizer, llama, unigram, smollm])
def test_chunks_give_the_ids_of_the_whole(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, generator = make(), random.Random(0)
    for number in range(6):
        overlap = generator.choice([128, 256, 512])
        monkeypatch.setattr(tokenization, "OVERLAP", overlap)
        monkeypatch.setattr(tokenization, "CHUNK", generator.randint(4, 8) * overlap)
        content = text(generator, 1500)
        whole = tokenizer(content, add_special_tokens=bool(number % 2), verbose=False)["input_ids"]
        cuts = sorted(generator.sample(range(len(content)), 20))
        fragments = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
        chunks = list(tokenization.ids_in_chunks(tokenizer, fragments, special=bool(number % 2)))
        assert len(chunks) > 1
        np.testing.assert_array_equal(np.concatenate(chunks), whole)
        np.testing.assert_array_equal(
            tokenization.token_ids(tokenizer, content, special=bool(number % 2)), whole
        )


def test_where_nothing_can_be_cut_the_chunk_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "OVERLAP", 64)
    monkeypatch.setattr(tokenization, "CHUNK", 512)
    tokenizer = tiny.tokenizer()
    content = "a cat " * 200 + "a" * 5000 + " the cat" * 200
    np.testing.assert_array_equal(
        tokenization.token_ids(tokenizer, content), tokenizer(content)["input_ids"]
    )
    monkeypatch.setattr(tokenization, "LONGEST", 2048)
    with pytest.raises(
        InputError, match="no white space at which it can be cut, wanted at most 2048 characters"
    ):
        tokenization.token_ids(tokenizer, content)


def test_a_tokenizer_that_does_not_say_where_tokens_lie_gets_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    monkeypatch.setattr(tokenization, "CHUNK", 512)
    monkeypatch.setattr(tokenization, "LONGEST", 2048)
    assert tokenization.token_ids(Slow(), "a" * 2048).tolist() == [97] * 2048
    with pytest.raises(InputError, match="cannot take it in chunks"):
        tokenization.token_ids(Slow(), "a" * 2049)


@pytest.fixture
def panicking(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer panics at many a and a b: its regular expression tries all ways
    to divide them."""
    folder = tiny.save(tmp_path / "panicking", tiny.config())
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, content["pre_tokenizer"]],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


PANIC = (
    "panicking: its tokenizer fails at a text that begins with 'the cat a{32}' \\(Onig: "
    ".*retry-limit-in-match "
    "over\\): take the tokenizer files that the model's authors publish, or leave that text out"
)


@pytest.mark.parametrize("size", [tokenization.CHUNK, 20])
def test_a_panic_of_a_tokenizer_is_an_error(
    size: int, panicking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "CHUNK", size)
    tokenizer = load_tokenizer(panicking)
    assert len(tokenization.token_ids(tokenizer, "the cat"))
    with pytest.raises(CheckpointError, match="its tokenizer fails at a text that begins with"):
        tokenization.token_ids(tokenizer, "the cat " + "a" * 60 + "b")


def test_a_panic_of_a_tokenizer_is_one_line(
    panicking: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat " + "a" * 60 + "b")
    options = [*"--nsamples 1 --seqlen 16 --pack --eval none --out".split(), str(tmp_path / "out")]
    assert main(["--ckpt", str(panicking), "--calib", str(prompts), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(f"error: {re.escape(str(tmp_path))}/{PANIC}", line), line
    with pytest.raises(CheckpointError, match=PANIC):
        Prompts(prompts).ids(load(panicking), 4)


def test_a_stop_while_a_text_is_tokenized_is_none(
    panicking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*texts: object, **options: object) -> None:
        raise KeyboardInterrupt

    tokenizer = load_tokenizer(panicking)
    monkeypatch.setattr(type(tokenizer), "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        tokenization.token_ids(tokenizer, "the cat")
