"""Commands that are killed, stopped, hindered or overtaken at their file operations lose nothing,
and go on."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from jaxprune.commands.prune import main as prune
from tests.crash import cases, places
from tests.crash.operations import available
from tests.crash.world import LINES, Worlds, contents, timeless
from tests.helpers import xla

pytestmark = pytest.mark.skipif(bool(available()), reason=available())


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in xla.quick().items():
            patch.setenv(name, value)
        yield Worlds(tmp_path_factory.mktemp("crash") / "worlds")


def middle(worlds: Worlds, name: str, phase: str, wanted: cases.Wanted = cases.changes) -> str:
    """The operation in the middle of a phase, of those that every run has: tensorstore splits its
    data by the clock."""
    found = [str(one) for one in cases.points(worlds.reference(name), wanted)[phase]]
    found = [one for one in found if "/d/*" not in one] or found
    return found[len(found) // 2]


KILLS = [("overwrite", "export")]
KILLS += [("convert-over", "tidying")]
MORE = [
    ("overwrite", phase) for phase in ("reading", "states", "layer", "masks", "store", "record")
]
MORE += [("best", "sensitivity"), ("best", "tuning"), ("best", "tuned layer")]


@pytest.mark.parametrize(
    ("name", "phase"), [*KILLS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)]
)
def test_a_killed_command_goes_on_to_the_same_bytes(worlds: Worlds, name: str, phase: str) -> None:
    assert cases.killed(worlds, name, middle(worlds, name, phase)) == []


@pytest.mark.parametrize("name", ["overwrite", "convert-over"])
def test_a_kill_while_publishing_leaves_the_earlier_result_or_the_new_one(
    worlds: Worlds, name: str
) -> None:
    for operation in cases.points(worlds.reference(name), cases.changes)["publish"]:
        assert cases.killed(worlds, name, str(operation)) == []


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_layer_is_saved_before_the_digests_of_its_weights(
    worlds: Worlds, index: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A layer of the checkpoint changes after a kill, at whatever moment: either the same command
    says so, or it makes what the changed checkpoint gives."""
    world = worlds.new("quick")
    changed = shutil.copytree(world.checkpoint, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors[f"model.layers.{index}.mlp.up_proj.weight"] *= 2
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})

    def run(folder: Path) -> int:
        paths = {"ckpt": changed, "out": folder / "out", "masks": folder / "masks"}
        return prune(world.argv(LINES["quick"], **paths))

    assert run(tmp_path / "whole") == 0
    expected = timeless(contents(tmp_path / "whole/out"))
    outcomes = []
    for state in cases.unfinished_states(worlds, "quick", tmp_path / "states"):
        capsys.readouterr()
        outcomes.append(run(state))
        if outcomes[-1]:
            said = capsys.readouterr().err
            assert f"layers.{index}.mlp.up_proj" in said and "pruned already" in said
        else:
            assert timeless(contents(state / "out")) == expected, state
    assert outcomes.count(2) >= 2 and outcomes[0] == 0


def test_kills_in_a_chain(worlds: Worlds) -> None:
    assert cases.killed(worlds, "quick", middle(worlds, "quick", "tidying"), times=4) == []


@pytest.mark.parametrize("phase", ["layer", pytest.param("record", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_after_which_a_command_goes_on(worlds: Worlds, phase: str) -> None:
    assert cases.full(worlds, "quick", middle(worlds, "quick", phase, cases.grows)) == []


@pytest.mark.parametrize(
    ("number", "phase"),
    [(signal.SIGTERM, "record"), pytest.param(signal.SIGINT, "layer", marks=pytest.mark.slow)],
)
def test_a_signal_is_one_line_after_which_a_command_goes_on(
    worlds: Worlds, number: int, phase: str
) -> None:
    assert cases.stopped(worlds, "quick", middle(worlds, "quick", phase), number) == []


def test_one_of_two_runs_makes_the_result(worlds: Worlds) -> None:
    assert cases.raced(worlds, ["quick", "quick"], "^mkdir work/out") == []


@pytest.mark.parametrize("what", [pytest.param("file", marks=pytest.mark.slow), "empty folder"])
def test_what_appears_at_the_place_of_a_result_stays(worlds: Worlds, what: str) -> None:
    assert cases.appeared(worlds, "quick", what, "^rename.* -> work/out ") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a folder")
def test_a_folder_that_cannot_be_written_is_one_line(worlds: Worlds) -> None:
    world = worlds.new("quick")
    if subprocess.run(["mount", "--bind", world.work, world.work]).returncode:
        pytest.skip("no mounts are allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", world.work], check=True)
        command = world.start(LINES["quick"])
        assert cases.said(command, command.wait(), 2, "error: ") == []
    finally:
        subprocess.run(["umount", world.work], check=True)
    assert cases.goes_on(world, "quick", worlds.reference("quick")) == []


@pytest.mark.parametrize("name", ["quick", pytest.param("overwrite", marks=pytest.mark.slow)])
def test_a_disk_without_such_renames_holds_a_result(worlds: Worlds, name: str) -> None:
    assert cases.elsewhere(worlds, name) == []


# of run.json and of saved results
@pytest.mark.parametrize(
    "number", [5, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 2, 3, 4))]
)
def test_a_killed_command_goes_on_there(worlds: Worlds, number: int) -> None:
    assert cases.killed_elsewhere(worlds, "quick", number) == []


@pytest.mark.parametrize("years", [-30, pytest.param(3, marks=pytest.mark.slow)])
def test_clocks_may_leap(worlds: Worlds, years: float) -> None:
    assert cases.leapt(worlds, "quick", middle(worlds, "quick", "export"), years) == []


@pytest.mark.slow  # tests/test_publishing.py has most of them, in process
@pytest.mark.parametrize("what", places.PLACES)
def test_what_is_not_ours_is_left_alone(worlds: Worlds, what: str) -> None:
    assert places.refused(worlds, what) == []
