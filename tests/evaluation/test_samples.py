"""Prompts, and what models make of them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxprune import InputError, load
from jaxprune.commands.evaluate import main
from jaxprune.evaluation.samples import PROMPTS, Prompts, samples
from jaxprune.reporting import record as records
from tests.helpers import tiny
from tests.helpers.zeros import pruned


def test_pieces_are_the_continuation(checkpoint: Path) -> None:
    model = load(checkpoint)
    found = samples(model, Prompts(), 6)
    assert [sample.prompt for sample in found] == list(PROMPTS)
    for sample in found:
        ids = model.tokenizer(sample.prompt)["input_ids"]
        # of one length for all, so one program: what comes later is not seen
        window = np.zeros((1, 128), np.int32)
        window[0, : len(ids)] = ids
        made = []
        for at in range(len(ids), len(ids) + 6):
            made.append(int(model.logits(window)[0, at - 1].argmax()))
            window[0, at] = made[-1]
            if made[-1] == model.tokenizer.eos_token_id:
                made.pop()
                break
        assert "".join(sample.tokens) == model.tokenizer.decode(made)


def test_prompts_of_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load(checkpoint).tokenizer
    (tmp_path / "lines.txt").write_text("the cat\n\n a dog \n")
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress((tmp_path / "lines.txt").read_bytes()))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / "lines.txt", tmp_path / "packed.txt.gz", "~/lines.txt"):
        assert Prompts(path).texts(tokenizer) == ["the cat", " a dog "]
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\nb"}\n{"text": "c"}\n')
    assert Prompts(tmp_path / "rows.jsonl").texts(tokenizer) == ["a\nb", "c"]
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="chat template"):
        Prompts(tmp_path / "chats.jsonl").texts(tokenizer)
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if add_generation_prompt %}|{% endif %}"
    )
    assert Prompts(tmp_path / "chats.jsonl").texts(tokenizer) == ["hello|"]


@pytest.mark.parametrize(
    "name, content, line, message",
    [
        ("none.txt", None, "", "missing"),
        ("empty.txt", "\n \n", "", "no text"),
        ("odd.csv", "x", "", "no known kind of text"),
        ("long.txt", "cat " * 100, "", "300 tokens, and the model only 64 positions"),
        ("many.txt", "a\n" * 1001, "", "more than 1000"),
        ("fine.txt", "cat", "--eval ppl", "is for --eval samples"),
        ("fine.txt", "cat", "--sample-tokens 0", "sample-tokens"),
    ],
)
def test_prompts_that_cannot_be_used_are_one_line(
    name: str,
    content: str | None,
    line: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    source = tiny.save(tmp_path / "hf", tiny.config(max_position_embeddings=64))
    if content is not None:
        (tmp_path / name).write_text(content)
    argv = [str(source), "--prompts", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert main([*argv, *(line.split() or ["--eval", "samples"])]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_report_shows_them_side_by_side(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = pruned(checkpoint, tmp_path / "pruned", "0.5")
    (tmp_path / "mine.txt").write_text("the <b>cat</b>\nan old dog\n")
    line = (
        f"{other} --against {checkpoint} --eval samples --sample-tokens 5 --prompts "
        f"{tmp_path / 'mine.txt'}"
    )
    assert main([*line.split(), "--out", str(tmp_path / "out")]) == 0
    record = records.load(tmp_path / "out")
    found = {name: measured.quality.samples for name, measured in record.checkpoints.items()}
    assert [len(ones) for ones in found.values()] == [2, 2]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the &lt;b&gt;cat&lt;/b&gt;" in page and "<b>cat" not in page
    assert page.count('class="card sample"') == 2
    dense, sparse = (["".join(sample.tokens) for sample in ones] for ones in found.values())
    assert ("<mark>" in page) == (dense != sparse)
    assert '"the <b>cat</b>"' in capsys.readouterr().out
