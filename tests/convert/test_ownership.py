"""What may be replaced and removed: nothing but what jaxprune wrote, at whatever moment somebody
interferes."""

import ast
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from convert import ownership, renaming, writing
from convert.__main__ import main
from convert.destination import Destination, destination, staged
from convert.errors import CheckpointError, NoRoomError, OccupiedError
from convert.ownership import EMPTY_CHECKSUM, MARKER, has_checksum, mark
from convert.writing import write_text
from tests.helpers.checkpoints import content
from tests.helpers.command import killed

ROOT = Path(__file__).parents[2]


def make(place: Destination | Path, text: str = "new") -> None:
    """A result of two files."""
    with staged(destination(place)) as folder:
        with writing.failing(folder):
            (folder / "inner").mkdir()
        write_text(folder / "model", text)
        write_text(folder / "inner/part", text)
        mark(folder, "test", ["model", "inner/part"])


def make_file(place: Destination | Path, text: str = "new") -> None:
    with staged(destination(place, folder=False)) as path:
        write_text(path, f"{EMPTY_CHECKSUM}\n{text}")
        ownership.add_checksum(path)


def again(path: Path, *, folder: bool = True) -> Destination:
    return destination(path, "out", overwrite=True, folder=folder)


def spoil_by_file(out: Path) -> None:
    (out / "mine").write_text("x")


def spoil_by_folder(out: Path) -> None:
    (out / "empty").mkdir()


def spoil_by_change(out: Path) -> None:
    found = (out / "inner/part").stat()
    (out / "inner/part").write_text("NEW")
    os.utime(out / "inner/part", ns=(found.st_atime_ns, found.st_mtime_ns))


def spoil_by_length(out: Path) -> None:
    (out / "model").write_text("longer")


def spoil_by_link(out: Path) -> None:
    (out / "model").rename(out.parent / "elsewhere")
    (out / "model").symlink_to(out.parent / "elsewhere")


def spoil_by_linked_folder(out: Path) -> None:
    (out / "inner").rename(out.parent / "elsewhere")
    (out / "inner").symlink_to(out.parent / "elsewhere")


def spoil_the_marker(out: Path) -> None:
    (out / MARKER).write_text(
        '{"version": 1, "kind": "x", "files": {"../precious": {"size": 4, "sha256": "0"}}}'
    )


def remove_the_marker(out: Path) -> None:
    (out / MARKER).unlink()


SPOILERS = [
    spoil_by_file,
    spoil_by_folder,
    spoil_by_change,
    spoil_by_length,
    spoil_by_link,
    spoil_by_linked_folder,
]
SPOILERS += [spoil_the_marker, remove_the_marker]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_only_what_we_wrote_is_replaced(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "precious").write_text("kept")
    make(out, "old")
    make(again(out), "newer")
    assert (out / "model").read_text() == "newer"
    make(out.with_name("other"), "new")
    spoil(out)
    before = content(tmp_path)
    with pytest.raises(OccupiedError):
        again(out).check()
    with pytest.raises(OccupiedError):
        make(again(out))
    assert content(tmp_path) == before


def test_files_that_a_user_removed_do_not_matter(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    shutil.rmtree(tmp_path / "out/inner")
    make(again(tmp_path / "out"))
    assert (tmp_path / "out/inner/part").read_text() == "new"


@pytest.mark.parametrize("spoil", SPOILERS)
def test_what_changes_while_we_work_is_not_replaced(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(out, "old")
    place = again(out)
    with (
        pytest.raises(OccupiedError, match="the finished result is saved in") as error,
        staged(place) as folder,
    ):
        write_text(folder / "model", "new")
        mark(folder, "test", ["model"])
        spoil(out)
        before = content(out)
    assert content(out) == before
    kept = next(
        Path(word.rstrip(",")) for word in str(error.value).split() if word.endswith("partial/out,")
    )
    assert (kept / "model").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder", "full", "link", "dangling link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_we_work_is_not_replaced(
    kind: str, overwrite: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    place = destination(out, "out", overwrite=overwrite)
    with (
        pytest.raises(OccupiedError, match="the finished result is saved in"),
        staged(place) as folder,
    ):
        mark(folder, "test", [])
        if kind == "file":
            out.write_text("theirs")
        elif "link" in kind:
            out.symlink_to(tmp_path / "nowhere" if kind == "dangling link" else tmp_path)
        else:
            out.mkdir()
            if kind == "full":
                (out / "theirs").write_text("theirs")
        before = out.lstat(), content(out) if kind in ("folder", "full") else None
    assert (out.lstat(), content(out) if kind in ("folder", "full") else None) == before


def test_a_place_that_cannot_be_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    make(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("file", "dangling", "link", "file/below", "x" * 300, "dangling/below", "nul\0"):
        with pytest.raises(CheckpointError):
            again(tmp_path / name).check()
    for name in ("real", "dangling", "link"):
        with pytest.raises(CheckpointError):
            again(tmp_path / name, folder=False).check()


def test_inputs_and_where_one_stands_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make(out)
    for path in (out, out / "model"):
        place = again(out)
        place.inputs = (path,)
        with pytest.raises(OccupiedError, match="is or holds an input"):
            place.check()
    monkeypatch.chdir(out / "inner")
    with pytest.raises(OccupiedError, match="is or holds the current folder"):
        again(out).check()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(out / "inner"))
    with pytest.raises(OccupiedError, match="is or holds the home folder"):
        again(out).check()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with pytest.raises(OccupiedError, match="mount point"):
        again(out).check()
    with pytest.raises(CheckpointError, match="the root"):
        again(Path("/"))


def test_a_file_carries_its_own_proof(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_file(out, "old")
    assert has_checksum(out)
    make_file(again(out, folder=False))
    assert out.read_text().endswith("new") and [p.name for p in tmp_path.iterdir()] == ["out"]
    out.write_text(out.read_text() + "mine")
    before = content(tmp_path)
    with pytest.raises(OccupiedError, match="or it has changed since, so it is not replaced"):
        make_file(again(out, folder=False))
    assert content(tmp_path) == before
    for text in ("", EMPTY_CHECKSUM, "x" * 10000):
        out.write_text(text)
        assert not has_checksum(out)


@pytest.fixture(params=["the system's calls", "without them"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without them":
        monkeypatch.setattr(renaming, "_rename", lambda *_: False)
    return request.param


def test_renames_replace_nothing(calls: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(FileExistsError):
        renaming.rename_new(tmp_path / "one", tmp_path / "other")
    with pytest.raises(FileExistsError):
        renaming.rename_new(tmp_path / "one/file", tmp_path / "other/file")
    for name in ("", "file"):  # folders, files in them
        one, other = tmp_path / "one" / name, tmp_path / "other" / name
        before = content(tmp_path)
        moved = renaming.exchange(one, other)
        assert content(tmp_path) != before
        renaming.exchange_back(one, other, moved)
        assert content(tmp_path) == before
    moved = renaming.exchange(tmp_path / "one", tmp_path / "other")
    renaming.rename_new(moved / "file", tmp_path / "new")
    renaming.rename_new(tmp_path / "other", moved / "other")
    assert content(tmp_path) == {
        "new": b"other",
        moved.name: "folder",
        f"{moved.name}/other": "folder",
        f"{moved.name}/other/file": b"one",
    }


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("folder", [True, False])
def test_a_kill_leaves_the_old_result_or_the_new_one(
    folder: bool, calls: str, tmp_path: Path
) -> None:
    made, file = (make, "model") if folder else (make_file, "")
    number, died = 0, True
    seen = set()
    while died:
        place = tmp_path / str(number)
        place.mkdir()
        (place / "bystander").write_text("kept")
        made(destination(place / "out", folder=folder), "old")
        died = killed(
            lambda place=place: made(again(place / "out", folder=folder), "newer"), number
        )  # type: ignore[misc]
        if calls == "without them" and not (place / "out").exists():  # both are beside it
            kept = [text for text in content(place).values() if isinstance(text, bytes)]
            assert {b"old", b"newer"} <= {text.split(b"\n")[-1] for text in kept}
        else:
            seen.add((place / "out" / file).read_text().split("\n")[-1])
        assert (place / "bystander").read_text() == "kept"
        made(again(place / "out", folder=folder), "newest")
        assert (place / "out" / file).read_text().endswith("newest")
        number += 1
    assert seen == {"old", "newer"} and number > 15


@pytest.mark.parametrize("name", ["fsync", "mkdir"])
def test_a_full_disk_is_one_error_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(os, name), 0

    def full(*args: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == wanted:
            raise OSError(28, "No space left on device")
        real(*args, **options)

    wanted = 1
    while True:
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            try:
                make(tmp_path / "out" / str(wanted))
                break
            except NoRoomError:
                kept = {p.name for p in (tmp_path / "out").glob("*")}
                assert kept <= {str(wanted)}  # it stands, or nothing does
        wanted += 1
    assert wanted > 2


def test_the_command_line_replaces_its_own_result_only(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = content(tmp_path)
    for target in ("source", ".", "..", "folder", "source/inside", "link", "/", "~"):
        assert main(["source", target, "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: "), said
        assert content(tmp_path) == before
    assert main(["source", "copy"]) == 0
    for name in ("jaxprune.json", "copy/inner/hub"):
        assert main(["copy", name, "--overwrite"]) == (0 if name == "jaxprune.json" else 2)
    assert main(["source", "copy"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["source", "copy", "--overwrite"]) == 0
    assert (source / "model.safetensors").read_bytes() == before["source/model.safetensors"]


FORBIDDEN = {
    "rmtree",
    "unlink",
    "rename",
    "renames",
    "rmdir",
    "remove",
    "removedirs",
    "replace",
    "move",
    "truncate",
}
ALLOWED = {
    "convert/ownership.py": FORBIDDEN,
    "convert/renaming.py": FORBIDDEN,
    "convert/gguf/reading.py": {"rmtree"},  # of a temporary folder
    "convert/cache.py": {"rmtree"},  # of a temporary folder
    "jaxprune/evaluation/tasks.py": {"rmtree"},  # of a temporary folder
}


def test_one_module_owns_every_replacement_and_deletion() -> None:
    """Attributes of these names are of files, unless what they are called on shows otherwise."""
    found: dict[str, set[str]] = {}
    for path in [*ROOT.glob("convert/**/*.py"), *ROOT.glob("jaxprune/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN:
                on = ast.unparse(node.value)
                if (
                    node.attr in ("replace", "remove")
                    and on not in ("os", "shutil")
                    and on.split(".")[-1] != "path"
                ):
                    continue  # of strings, lists, dataclasses and hidden states
                if node.attr == "truncate" and on == "file":
                    continue
                found.setdefault(str(path.relative_to(ROOT)), set()).add(node.attr)
    for name, attributes in found.items():
        assert attributes <= ALLOWED.get(name, set()), (name, attributes)
