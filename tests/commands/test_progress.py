"""What a terminal shows while something is measured."""

import re
from pathlib import Path

import pytest

from jaxprune.commands import terminal
from jaxprune.commands.evaluate import main as evaluate
from jaxprune.commands.prune import main as prune
from tests.helpers import rows


def bars(said: str) -> dict[str, str]:
    """Returns what each progress bar is for -> what it has counted."""
    return dict(
        re.findall(r"^(.*\S) +━+ (\d+/\d+ \w+) \d+:\d\d:\d\d left 0:00:00$", said, re.MULTILINE)
    )


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.console, "width", 200)


@pytest.mark.usefixtures("wide")
def test_bars_say_what_is_measured(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    data, name = rows.write(tmp_path / "rows"), checkpoint.name
    line = (
        f"{name} --eval ppl,zero-shot,samples --eval-text {text} --eval-seqlen 32 --eval-windows 3"
    )
    line += f" --tasks boolq --tasks-data {data} --limit 2 --sample-tokens 4"
    assert evaluate(line.split()) == 0
    on = f"on {text.parent.name}/text, 96 tokens"
    (scored,) = (found := bars(capsys.readouterr().out)).keys() & {
        key for key in found if "tasks" in key
    }
    assert re.fullmatch(
        rf"log-likelihoods of the tasks' answers by {name}, [1-9]\d* tokens", scored
    )
    assert found == {
        f"perplexity of {name} {on}": "3/3 layers",
        f"log-likelihoods by {name} {on}": "1/1 batches",
        f"generating 12 texts of at most 4 tokens with {name}": "4/4 steps",
        scored: "3/3 layers",
    }


def test_bars_tell_pruned_from_dense_and_fit_a_terminal(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tiny-model-of-some-name").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    line = (
        f"--ckpt tiny-model-of-some-name --calib {text} --nsamples 2 --seqlen 32 --out out --eval "
        "ppl"
    )
    line += f" --eval-text {text} --eval-seqlen 32 --eval-windows 3"
    monkeypatch.setattr(terminal.console, "width", 80)
    assert prune(line.split()) == 0
    shown = re.findall(r"^.*━.* (?:layers|batches) .*$", capsys.readouterr().out, re.MULTILINE)
    assert len(shown) == 4 and all(
        re.search(r"\d/\d \w+ 0:00:\d\d left 0:00:00$", bar) for bar in shown
    ), shown
    assert [re.split(" +━", bar)[0] for bar in shown] == [
        "pruning",
        "perplexity of tiny-model-of-some-name",
        "perplexity of pruned",
        "KL divergence from",
    ]
