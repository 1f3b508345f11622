"""`jaxprune generate`: texts that a model writes itself."""

import json
import shutil
from pathlib import Path

import pytest

from jaxprune import OwnText, calibration_windows, generate, load
from jaxprune.commands.generate import main
from jaxprune.commands.progress import Progress
from jaxprune.run_store import publishing
from jaxprune.run_store.opening import store_folder
from jaxprune.streaming import generation
from tests.helpers.command import failing
from tests.helpers.tiny import write_text

LENGTH = 24


def texts_of(file: Path) -> list[str]:
    return [json.loads(row)["text"] for row in file.read_text("utf-8").splitlines()]


def test_what_a_model_writes_is_text_to_prune_it_on(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    assert (
        main([str(checkpoint), "--out", str(file), "--tokens", "200", "--length", str(LENGTH)]) == 0
    )
    assert len(texts_of(file)) == 9 and len(set(texts_of(file))) == 9
    model = load(checkpoint)
    assert not store_folder(file).exists()
    assert generate(model, OwnText(tokens=200, length=LENGTH)) == texts_of(file)
    assert generate(model, OwnText(tokens=3 * LENGTH, length=LENGTH)) == texts_of(file)[:3]
    assert generate(model, OwnText(tokens=200, length=LENGTH, seed=1)) != texts_of(file)
    windows = calibration_windows(str(file), model.tokenizer, count=4, length=16, pack=True)
    assert windows.shape == (4, 16)


def test_texts_begin_with_prompts(checkpoint: Path, tmp_path: Path) -> None:
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    write_text(prompts, documents=3)
    argv = [
        str(checkpoint),
        "--out",
        str(file),
        "--tokens",
        "120",
        "--length",
        str(LENGTH),
        "--prompts",
        str(prompts),
    ]
    assert main([*argv, "--prompt-tokens", "6"]) == 0
    tokenizer = load(checkpoint).tokenizer
    beginnings = {tokenizer.decode(tokenizer(text)["input_ids"][:6]) for text in texts_of(prompts)}
    assert len(texts_of(file)) == 5
    assert {
        text[: len(one)] for text in texts_of(file) for one in beginnings if text.startswith(one)
    } == beginnings


def test_what_is_written_is_kept_until_all_is(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generation, "MOST_TOKENS", 4 * generation.BLOCK)  # four texts at a time
    file, visits = tmp_path / "own.jsonl", 0

    def stop(self: Progress, index: int) -> None:
        nonlocal visits
        visits += 1
        if visits == 30:  # in the second batch
            raise KeyboardInterrupt

    argv = [str(checkpoint), "--out", str(file), "--tokens", "200", "--length", str(LENGTH)]
    with monkeypatch.context() as stopping:
        stopping.setattr(Progress, "layer_visited", stop)
        assert main(argv) == 130
    told = capsys.readouterr().err
    assert (
        not file.exists()
        and "the same command continues from it" in told
        and "going on" not in told
    )
    assert main([*argv, "--seed", "1"]) == 2
    told = capsys.readouterr().err
    assert "seed: 0 then, 1 now" in told and "choose another --out" in told
    taken: list[int] = []
    monkeypatch.setattr(Progress, "layer_visited", lambda self, index: taken.append(index))
    assert main(argv) == 0
    assert len(taken) == 2 * (LENGTH - 1)  # of nine texts, four were written
    assert f"resuming from the results saved in {store_folder(file)}" in capsys.readouterr().err
    assert generate(load(checkpoint), OwnText(tokens=200, length=LENGTH)) == texts_of(file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_that_is_there_when_its_run_is_stopped_is_the_result(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "own.jsonl"
    argv = [str(checkpoint), "--out", str(file), "--tokens", "100", "--length", str(LENGTH)]
    with monkeypatch.context() as stopping:
        stopping.setattr(publishing, "remove", failing(publishing.remove, 1))
        assert main(argv) == 2
    written = file.read_bytes()
    file.write_bytes(written[:-1])
    assert main(argv) == 2 and "it already exists" in capsys.readouterr().err
    assert file.read_bytes() == written[:-1]
    file.write_bytes(written)
    assert main(argv) == 0
    assert file.read_bytes() == written and [path.name for path in tmp_path.iterdir()] == [
        file.name
    ]


def test_beginnings_that_have_changed_are_noticed(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Here by another tokenizer, of the same prompts."""
    model, prompts, file = tmp_path / "model", tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    shutil.copytree(checkpoint, model)
    write_text(prompts, documents=3)
    argv = [
        str(model),
        "--out",
        str(file),
        "--tokens",
        "100",
        "--length",
        str(LENGTH),
        "--prompts",
        str(prompts),
    ]
    with monkeypatch.context() as stopping:
        stopping.setattr(publishing, "remove", failing(publishing.remove, 1))
        assert main(argv) == 2
    file.unlink()
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(
        json.dumps(tokenizer | {"normalizer": {"type": "Prepend", "prepend": "z"}})
    )
    capsys.readouterr()
    assert main(argv) == 2
    assert "texts.begun: " in capsys.readouterr().err
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(argv) == 0


def test_prompts_of_two_texts_take_turns(checkpoint: Path, tmp_path: Path) -> None:
    for name in "ab":
        row = json.dumps({"text": f"{name} {name} {name} {name} {name}"})
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n")
    prompts = f"{tmp_path}/a.jsonl:2,{tmp_path}/b.jsonl:1"
    texts = generate(
        load(checkpoint),
        OwnText(tokens=6 * LENGTH, length=LENGTH, prompts=prompts, prompt_tokens=3),
    )
    assert sorted(text.strip()[0] for text in texts) == ["a"] * 4 + ["b"] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("own.jsonl --tokens 0", "--tokens must be at least 1"),
        ("own.jsonl --length 16 --prompts mine.jsonl", "texts of 16 tokens cannot begin with 16"),
        ("own.jsonl --length 1", "texts of 1 tokens cannot begin with 1: raise --length"),
        (
            "own.jsonl --prompt-tokens 4",
            "--prompt-tokens does nothing by itself: pass --prompts with it",
        ),
        ("own.jsonl --prompts ids.npy", "it has token ids"),
        ("own.jsonl --prompt-tokens 0", "--prompt-tokens must be at least 1"),
        ("own.txt", "must end in .jsonl, wanted FILE.jsonl"),
        ("mine.jsonl", "it already exists"),
        ("link.jsonl", "symbolic link"),
        ("folder.jsonl", "it is a folder"),
        ("no/way.jsonl/own.jsonl", "nothing can be made there"),
        ("own.jsonl --prompts nowhere.jsonl", "no text 'nowhere.jsonl'"),
        ("own.jsonl --prompts empty.jsonl", "empty.jsonl"),
        ("own.jsonl --seed -1", "--seed"),
        ("mine.jsonl --prompts mine.jsonl", "it already exists"),
        ("folder/own.jsonl --prompts mine.jsonl:2,folder", "prompts"),
        ("own.jsonl --tokens 1k --length 1M", "positions"),
    ],
)
def test_what_cannot_be_written_is_refused_before_work(
    line: str,
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text('{"text": "mine"}\n')
    Path("link.jsonl").symlink_to("mine.jsonl")
    Path("folder.jsonl").mkdir()
    Path("folder").mkdir()
    Path("folder/theirs.jsonl").write_text('{"text": "theirs"}\n')
    Path("empty.jsonl").touch()
    Path("ids.npy").touch()
    Path("no").mkdir()
    Path("no/way.jsonl").touch()
    before = sorted(Path().rglob("*"))
    assert main([str(checkpoint), "--out", *line.split()]) == 2
    told = capsys.readouterr().err
    assert message in " ".join(told.split()) and "--overwrite" not in told and "--file" not in told
    assert sorted(Path().rglob("*")) == before and texts_of(Path("mine.jsonl")) == ["mine"]
