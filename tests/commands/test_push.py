"""A checkpoint goes to a hub on this machine: what is sent, and what is not."""

import dataclasses
import html
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from jaxprune.commands.prune import main as prune
from jaxprune.commands.push import main
from jaxprune.reporting import record as records
from jaxprune.reporting.model_card import model_card
from tests.helpers.hub_server import Hub, serving

# huggingface_hub's own
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def pruned(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "pruned"
    line = (
        f"--ckpt {checkpoint} --method magnitude --calib {text} --nsamples 2 --seqlen 16 --eval "
        f"ppl --eval-text {text}"
    )
    assert (
        prune([*line.split(), "--eval-seqlen", "16", "--eval-windows", "2", "--out", str(out)]) == 0
    )
    return out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(monkeypatch) as served:
        yield served


def metadata(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---")[1])


def test_a_folder_is_sent_with_its_card(
    pruned: Path, text: Path, hub: Hub, capsys: pytest.CaptureFixture
) -> None:
    hub.licences["owner/base"] = "apache-2.0"
    assert main([str(pruned), "me/tiny", "--base-model", "owner/base"]) == 0
    private, files = hub.repositories["me/tiny"]
    assert private
    assert files.keys() == {path.name for path in pruned.iterdir() if not path.name.startswith(".")}
    assert files["model.safetensors"] == (pruned / "model.safetensors").read_bytes()
    found = metadata(files["README.md"])
    assert (found["base_model"], found["license"], found["library_name"]) == (
        "owner/base",
        "apache-2.0",
        "transformers",
    )
    assert {"pruned", "sparse", "jaxprune"} <= set(found["tags"])
    (result,) = found["model-index"][0]["results"]
    assert (
        result["metrics"][0]["type"] == "perplexity"
        and result["metrics"][1]["type"] == "kl_divergence"
    )
    recorded = json.loads((pruned / "jaxprune.json").read_text())["evaluation"]["pruned"]["texts"]
    assert result["metrics"][0]["value"] == next(iter(recorded.values()))["perplexity"]
    said = capsys.readouterr().out
    assert f"{hub.address}/me/tiny/commit/" in said and "private" in said
    for name in ("README.md", "jaxprune.json", "report.html"):  # no path of this machine
        assert [
            line for line in files[name].splitlines() if str(text.parent).encode() in line
        ] == [], name
    assert str(text) in (pruned / "jaxprune.json").read_text()


def test_no_path_of_this_machine_is_sent(pruned: Path, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "copy")
    record = json.loads((pruned / "jaxprune.json").read_text())
    named = {
        "ckpt": "~/secret/dense",
        "calib": "c4:3,secret/café & [b].jsonl:1",
        "prompts": "../secret/prompts.txt",
        "out": "/pre",
    }
    record["config"] |= named
    record["recipe"]["pattern"] = {"mask": "from-checkpoint:/secret/me/mask"}
    text = json.dumps(record)
    tasks = {
        "configs": {
            "rte": {"dataset_kwargs": {"data_files": {"rows": "/secret/jaxprune-tasks-1/0.jsonl"}}}
        }
    }
    (tmp_path / "copy/jaxprune.json").write_text(text)
    (tmp_path / "copy/report.html").write_text(f"<pre>{html.escape(text)}</pre>")
    run = records.read(text, "")
    assert isinstance(run, records.Run)
    card = model_card(dataclasses.replace(run, evaluation={}))
    (tmp_path / "copy/README.md").write_text(card + os.path.expanduser("~/secret/dense"))
    (tmp_path / "copy/lm-eval-pruned.json").write_text(json.dumps(tasks))
    assert main([str(tmp_path / "copy"), "me/tiny"]) == 0
    files = hub.repositories["me/tiny"][1]
    for name in ("README.md", "jaxprune.json", "report.html", "lm-eval-pruned.json"):
        assert b"secret" not in files[name], name
    assert files["report.html"].endswith(b"</pre>")
    sent = json.loads(files["jaxprune.json"])
    assert (
        sent["recipe"]["pattern"]["mask"] == "from-checkpoint:mask"
        and sent["config"]["calib"] == "c4:3,café & [b].jsonl:1"
    )
    assert json.loads(files["lm-eval-pruned.json"])["configs"]["rte"]["dataset_kwargs"][
        "data_files"
    ] == {"rows": "0.jsonl"}


@pytest.mark.parametrize(
    ("ckpt", "base"),
    [
        ("llama-7b", "huggyllama/llama-7b"),
        ("owner/model", "owner/model"),
        ("~/x", None),
        ("a/b/c", None),
        ("x", None),
    ],
)
def test_the_card_names_the_repository_of_the_dense_model(
    ckpt: str, base: str | None, pruned: Path
) -> None:
    run = records.run_of(pruned)
    assert run
    config = run.config.model_copy(update={"ckpt": ckpt})
    card = model_card(dataclasses.replace(run, config=config, evaluation={}))
    assert metadata(card.encode()).get("base_model") == base


def test_a_dry_run_sends_nothing(pruned: Path, hub: Hub, capsys: pytest.CaptureFixture) -> None:
    assert main([str(pruned), "me/tiny", "--dry-run", "--public"]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors" in said and "perplexity" in said and "me/tiny, public" in said
    assert not hub.repositories


def test_a_repository_with_files_gets_a_commit_only_if_told(
    pruned: Path, hub: Hub, capsys: pytest.CaptureFixture
) -> None:
    hub.repositories["me/tiny"] = (True, {".gitattributes": b"", "precious": b"x"})
    assert main([str(pruned), "me/tiny"]) == 2
    assert "1 files already: pass --overwrite" in capsys.readouterr().err
    assert set(hub.repositories["me/tiny"][1]) == {".gitattributes", "precious"}
    assert main([str(pruned), "me/tiny", "--overwrite"]) == 0
    assert {"precious", "config.json"} <= hub.repositories["me/tiny"][1].keys()
    assert "(me/tiny, private)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("private", "flags", "message"),
    [
        (False, [], "the repository is public already: pass --public"),
        (True, ["--public"], "the repository is private already: leave --public out"),
    ],
)
def test_a_repository_that_others_see_otherwise_than_asked_gets_nothing(
    private: bool,
    flags: list[str],
    message: str,
    pruned: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture,
) -> None:
    hub.repositories["me/tiny"] = (private, {"precious": b"x"})
    assert main([str(pruned), "me/tiny", "--overwrite", *flags]) == 2
    assert message in capsys.readouterr().err
    assert set(hub.repositories["me/tiny"][1]) == {"precious"}


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses_is_one_line(
    status: int,
    pruned: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.refuses = status
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main([str(pruned), "me/tiny", "--public"]) == 2
    *_, said = capsys.readouterr().err.splitlines()  # after the bar of the upload
    assert said.startswith("error: me/tiny: the hub refused it")
    assert ("hf auth login" in said) == (status < 500)


def test_a_hub_that_is_not_there_is_one_line(
    pruned: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main([str(pruned), "me/tiny", "--license", "mit"]) == 2
    assert "the hub cannot be reached" in capsys.readouterr().err


def test_a_checkpoint_without_record_or_card_is_sent(checkpoint: Path, hub: Hub) -> None:
    assert main([str(checkpoint), "me/tuned", "--public", "--license", "mit"]) == 0
    private, files = hub.repositories["me/tuned"]
    assert not private and metadata(files["README.md"])["license"] == "mit"


@pytest.mark.parametrize(
    "folder, repository, message",
    [
        ("pruned", "tiny", "wanted owner/name"),
        ("pruned", "me/ti ny", "wanted owner/name"),
        ("nothing", "me/tiny", "it is no folder"),
        ("empty", "me/tiny", "is no checkpoint"),
        ("linked", "me/tiny", "leads outside"),
        ("odd", "me/tiny", "its metadata cannot be read"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    folder: str,
    repository: str,
    message: str,
    pruned: Path,
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(pruned, tmp_path / "pruned")
    shutil.copytree(pruned, tmp_path / "linked")
    shutil.copytree(pruned, tmp_path / "odd")
    (tmp_path / "odd" / "README.md").write_text("---\ntags: [\n---\n")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "linked" / "secret").symlink_to(tmp_path / "secret")
    assert main([str(tmp_path / folder), repository]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not hub.repositories
