"""What a run does to the user's files: its store and its result, without the numbers; and command
lines."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import ownership, renaming
from convert.destination import Destination, destination
from convert.errors import OccupiedError
from convert.ownership import EMPTY_CHECKSUM, MARKER
from convert.writing import write_text
from jaxprune import InputError
from jaxprune.commands.evaluate import main as evaluate
from jaxprune.commands.prune import main
from jaxprune.commands.report import main as report_main
from jaxprune.run_store import opening, publishing
from jaxprune.solve import layer
from jaxprune.solve.layer_result import saved_layers
from jaxprune.streaming.hidden_states import HiddenStates
from tests.helpers.checkpoints import content
from tests.helpers.command import failing, killed

IDENTITY = {
    "schema": 3,
    "checkpoint": "c",
    "computation": "float32",
    "seed": 0,
    "calibration": {"windows": [4, 3]},
}


def work(
    out: Path, masks: Path | None = None, *, overwrite: bool = False, text: str = "new"
) -> str:
    """A run of two layers, as `run` makes it; how it ended."""
    place = destination(out, "out", overwrite=overwrite)
    masks_place = (
        destination(masks, "save_masks", overwrite=overwrite, folder=False) if masks else None
    )
    identity = IDENTITY | {"text": text}
    if opening.require_free(place, masks_place):
        if opening.remove_finished(out, identity, masks):
            return "bare"
        place.check()
    with opening.open_store(out, identity, masks) as store:
        if store.to_publish:
            publishing.publish(store, place, masks_place)
            return "finished"
        states = HiddenStates((4, 3, 2), np.dtype(np.float32), batch=2)
        for layer in range(2):
            name = f"pruned/{layer}"
            if store.get(name) is None:
                states.array[...] = layer
                store.put(name, {"w": np.full(5, layer)}, {"layer": layer})
                store.wait()
                store._last_saved = -1e9  # long ago
                saved_layers(store, "pruned").put_states({"x": states}, layer + 1)
        store.result.mkdir(parents=True)
        write_text(store.result / "model", text)
        if masks:
            write_text(store.masks, f"{EMPTY_CHECKSUM}{text}")
            ownership.add_checksum(store.masks)
        publishing.finish(store, {"model"}, masks=masks is not None)
        publishing.publish(store, place, masks_place)
    return "done"


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("renameat2", [True, False])
def test_a_run_killed_at_any_file_operation_goes_on_to_the_same_files(
    renameat2: bool, step: int, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not renameat2:
        monkeypatch.setattr(renaming, "_rename", lambda *_: False)
    number, died, ends = 0, True, set()
    while died:
        place = tmp_path / "place"
        place.mkdir()
        out, masks = place / "out", place / "masks"
        (place / "out.unfinished.txt").write_text("kept")
        if old:
            work(out, masks, text="old")
        died = killed(lambda out=out, masks=masks: work(out, masks, overwrite=old), number)  # type: ignore[misc]
        for path, file in ((out, out / "model"), (masks, masks)) if old else ():
            if renameat2 or path.exists():
                assert file.read_text()[-3:] in ("old", "new")
            else:  # both are in the store
                kept = [one for one in content(place).values() if isinstance(one, bytes)]
                assert {b"old", b"new"} <= {one[-3:] for one in kept}
        if died:
            ends.add(work(out, masks, overwrite=old))
        assert (out / "model").read_text() == "new" and masks.read_text().endswith("new")
        assert sorted(p.name for p in place.iterdir()) == ["masks", "out", "out.unfinished.txt"], (
            number
        )
        assert sorted(p.name for p in out.iterdir()) == [MARKER, "model"]
        shutil.rmtree(place)
        number += step
    assert number > 100 and "done" in ends


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT of a run that stopped when its layers were finished."""

    def stop(*_: Any, **__: Any) -> None:
        raise InputError("stopped here")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped here"):
        patch.setattr(publishing, "finish", stop)
        work(tmp_path / "out")
    assert (tmp_path / "out.unfinished/pruned/1.safetensors").exists()
    return tmp_path / "out"


@pytest.mark.parametrize(
    "name", ["notes", "pruned/notes", "pruned/1/notes", "pruned/7/notes", "result/notes"]
)
def test_somebody_elses_file_in_a_run_store_is_refused_at_the_start_and_kept(
    name: str, stopped: Path
) -> None:
    file = stopped.with_name("out.unfinished") / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    before = content(stopped.parent)
    with pytest.raises(OccupiedError, match="jaxprune did not write it"):
        work(stopped)
    assert content(stopped.parent) == before
    file.unlink()
    ownership.remove_empty(file.parent)
    assert work(stopped) == "done"
    assert sorted(p.name for p in stopped.parent.iterdir()) == ["out"]


def test_a_lock_that_is_no_file_is_refused_and_kept(stopped: Path) -> None:
    lock = stopped.with_name("out.unfinished") / "lock"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(OccupiedError, match="lock: it is no regular file"):
        work(stopped)
    assert lock.is_fifo() and not stopped.exists()


@pytest.mark.parametrize("what", ["file", "link", "folder with a file", "dangling link"])
def test_a_run_stores_name_that_is_taken_is_refused_at_the_start(what: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_text("mine")
    place = tmp_path / "out.unfinished"
    if what == "file":
        place.write_text("mine")
    elif what == "folder with a file":
        shutil.copytree(tmp_path / "theirs", place)
    else:
        place.symlink_to(tmp_path / ("theirs" if what == "link" else "nowhere"))
    before = content(tmp_path)
    with pytest.raises(OccupiedError):
        work(tmp_path / "out")
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["notes", "pruned/0/notes", "lock.txt"])
@pytest.mark.parametrize("fails", [False, True])
def test_files_that_appear_in_a_run_store_stay(
    name: str,
    fails: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = publishing.finish

    def meanwhile(*args: Any, **options: Any) -> None:
        (tmp_path / "out.unfinished" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out.unfinished" / name).write_text("mine")
        if fails:
            raise InputError("stopped here")
        real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "finish", meanwhile)
        if fails:
            with pytest.raises(InputError):
                work(tmp_path / "out")
        else:
            work(tmp_path / "out")
    assert (tmp_path / "out.unfinished" / name).read_text() == "mine"
    if not fails:
        assert f"left in {tmp_path}/out.unfinished" in caplog.text
        assert [
            str(p.relative_to(tmp_path))
            for p in tmp_path.rglob("*")
            if p.is_file() and "out/" not in str(p)
        ] == [f"out.unfinished/{name}"]


@pytest.mark.parametrize("damaged", ["pruned/0", "pruned/states"])
def test_what_has_changed_in_a_run_store_is_made_again_and_not_deleted(
    damaged: str, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = stopped.with_name("out.unfinished") / f"{damaged}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    changed = file.read_bytes()
    assert work(stopped) == "done"
    assert (stopped / "model").read_text() == "new"
    left = [path for path in stopped.with_name("out.unfinished").rglob("*") if path.is_file()]
    assert changed in [path.read_bytes() for path in left]
    assert "left in" in caplog.text


def test_a_file_that_appears_in_the_finished_result_keeps_no_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publishing.finish

    def meanwhile(store: Any, *args: Any, **options: Any) -> None:
        (store.result / ".nfs0").write_text("of the system's")
        real(store, *args, **options)

    monkeypatch.setattr(publishing, "finish", meanwhile)
    assert work(tmp_path / "out") == "done"
    assert content(tmp_path / "out").keys() == {MARKER, "model", ".nfs0"}


def test_a_result_whose_place_was_taken_is_published_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    real = Destination.publish

    def taken(place: Destination, finished: Path) -> None:
        if place.path == out:
            out.mkdir()
            (out / "theirs").write_text("kept")
        real(place, finished)

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "publish", taken)
        with pytest.raises(
            OccupiedError, match="put there by the same command once the place is free"
        ):
            work(out, masks)
    assert content(out) == {"theirs": b"kept"}
    with pytest.raises(OccupiedError, match="already exists"):
        work(out, masks)
    out.rename(tmp_path / "aside")
    assert work(out, masks) == "finished"
    assert (out / "model").read_text() == "new" and masks.read_text().endswith("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aside", "masks", "out"]


def test_of_two_runs_for_one_place_one_works(tmp_path: Path) -> None:
    with opening.open_store(tmp_path / "out", IDENTITY | {"text": "new"}):
        with pytest.raises(InputError, match="another process is working on"):
            work(tmp_path / "out")
    assert work(tmp_path / "out") == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def line(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """A short command line without --out, in a folder with the user's files, which stay as they
    are."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "ckpt")
    shutil.copy(text, "text.jsonl")
    Path("data").mkdir()
    Path("data/notes").write_text("mine")
    Path("link").symlink_to("nowhere")
    Path("hardly").symlink_to("data")
    before = content(tmp_path)
    yield (
        "--ckpt ckpt --calib text.jsonl --nsamples 4 --seqlen 32 --eval none --method magnitude"
    ).split()
    after = content(tmp_path)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--out ckpt --overwrite", "which is given as ckpt|also what is given as ckpt"),
        ("--out . --overwrite", "holds"),
        ("--out .. --overwrite", "holds"),
        ("--out / --overwrite", "the root"),
        ("--out data --overwrite", "move or remove it yourself"),
        ("--out data", "already exists"),
        ("--out link", "symbolic link"),
        ("--out link --overwrite", "symbolic link"),
        ("--out hardly --overwrite", "symbolic link"),
        ("--out text.jsonl --overwrite", "given as calib"),
        ("--out ckpt/inside", "inside"),
        ("--out new --save-masks new", "--save-masks"),
        ("--out new --save-masks new/masks", "--save-masks"),
        ("--out new --save-masks hardly/../new/masks", "--save-masks"),
        ("--out new --save-masks new.unfinished/masks", "--save-masks"),
        ("--out new --save-masks text.jsonl --overwrite", "given as calib"),
        ("--out new --save-masks ckpt/masks", "inside"),
        ("--out new --save-masks link", "symbolic link"),
        ("--out new --save-masks data --overwrite", "a folder"),
        ("--out data/../ckpt/inside", "inside"),
        ("--out new --mask from-file:new/masks", "new/masks: it is missing"),
        ("--out data/notes/out", "Not a directory"),
    ],
)
def test_paths_that_meet_or_are_taken_are_refused_at_the_start(
    flags: str, said: str, line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = content(tmp_path)
    if "--mask" in flags:
        line = line[:-2]
    assert main([*line, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and any(part in error for part in said.split("|")), error
    assert content(tmp_path) == before


def test_a_run_replaces_its_own_result_only(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*line, "--out", "out", "--save-masks", "masks"]
    assert main(argv) == 0
    assert main(argv) == 2
    assert main([*argv, "--overwrite", "--sparsity", "0.6"]) == 0
    for command in ("--eval-text text.jsonl --eval ppl --eval-seqlen 32 --eval-windows 2".split(),):
        for out in ("out", "data", ".", "link", "ckpt/evaluation"):
            capsys.readouterr()
            assert evaluate(["ckpt", *command, "--out", out, "--overwrite"]) == 2
            assert capsys.readouterr().err.count("\n") == 1
        assert evaluate(["ckpt", *command]) == 0
        assert evaluate(["ckpt", *command]) == 2
        assert evaluate(["ckpt", *command, "--overwrite"]) == 0
    assert report_main(["out", "evaluation", "--out", "page.html"]) == 0
    assert report_main(["out", "--out", "page.html", "--overwrite"]) == 0
    Path("page.html").write_text(Path("page.html").read_text() + "mine")
    assert report_main(["out", "--out", "page.html", "--overwrite"]) == 2
    # A model that somebody fine-tuned in place is theirs.
    with open("out/model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"mine")
    tuned = Path("out/model.safetensors").read_bytes()
    assert main([*argv, "--overwrite"]) == 2
    assert Path("out/model.safetensors").read_bytes() == tuned
    assert sorted(
        p.name for p in tmp_path.iterdir() if p.name.startswith((".", "out", "masks"))
    ) == ["masks", "out"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_appears_at_the_place_of_a_run_stays(
    kind: str, line: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = layer.prune_and_round

    def meanwhile(*args: Any, **options: Any) -> Any:
        if not os.path.lexists("out"):
            if kind == "file":
                Path("out").write_text("theirs")
            elif kind == "link":
                Path("out").symlink_to("data")
            else:
                Path("out").mkdir()
                Path("out/theirs").write_text("theirs")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "prune_and_round", meanwhile)
        assert main([*line, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert (
        "the finished result is saved in" in said
        and "by the same command" in said
        and "Traceback" not in said
    )
    assert Path("out").read_text() == "theirs" if kind == "file" else Path("out").exists()
    Path("out").rename("aside")
    with monkeypatch.context() as patch:
        # nothing is pruned again
        patch.setattr(layer, "prune_and_round", failing(layer.prune_and_round, 1))
        assert main([*line, "--out", "out"]) == 0
    assert Path("out/model.safetensors").exists() and not Path("out.unfinished").exists()
