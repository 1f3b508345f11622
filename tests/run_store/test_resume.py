"""Runs that are killed, in processes of their own, and go on."""

import fcntl
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert.ownership import MARKER
from jaxprune import InputError, Observer, Recipe, load, methods, prune
from jaxprune.commands.prune import main
from jaxprune.reporting import record as records
from jaxprune.run_store import store as store_module
from jaxprune.run_store.store import RunStore
from jaxprune.solve import layer
from tests.helpers import tiny
from tests.helpers.command import changed, failing
from tests.helpers.damage import damage
from tests.helpers.plugins import install_method
from tests.helpers.shapes import windows

LINES = {
    "plain": "--method admm --asymmetry 0.25",
    "best": "--preset best --sparsity 0.6 --tune-windows 2",
    "quantized": "--method wanda --tune-epochs 1 --quantize q4_0",
    "stream": "--preset best --sparsity 0.6 --tune-tokens 2k --tune-windows 2",
}
MOMENTS = {
    "reading": ("convert.hf", "Reader.read"),
    "Gram": ("jaxprune.solve.gram_matrices", "accumulate"),
    "Gram, asymmetric": ("jaxprune.solve.gram_matrices", "accumulate_shift"),
    "solve": ("jaxprune.solve.layer", "prune_and_round"),
    "forward": ("jaxprune.streaming.model", "StreamedModel.forward"),
    "commit": ("jaxprune.run_store.store", "RunStore._move"),
    "states": ("convert.shards", "TensorFile.write_rows"),
    "sensitivity": ("jaxprune.solve.sensitivity", "backward"),
    "tuning": ("jaxprune.distill.student", "pull_back"),
    "export": ("convert.hf", "Writer.write"),
    "record": ("jaxprune.api.prune", "write_record"),
    "rename": ("convert.destination", "Destination._put"),
    "tidying": ("convert.ownership", "remove_empty"),
}
"""Name -> module and function that is interrupted."""
TIMEOUT = 900
"""Seconds that one run may take on a loaded machine of 2 cores; alone it takes less than 60."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def work(
    argv: list[str], log: Path, where: tuple[str, str, int, bool] | None, after: float | None
) -> None:
    """A child process: a command line that dies at a call of a function, before or after it, or
    after some seconds."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if where:
        module, path, number, before = where
        owner: Any = importlib.import_module(module)
        *way, name = path.split(".")
        for part in way:
            owner = getattr(owner, part)
        function, calls = getattr(owner, name), 0

        def dying(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and before:
                die()
            result = function(*args, **options)
            if calls == number:
                die()
            return result

        setattr(owner, name, dying)
    if after is not None:
        threading.Timer(after, die).start()
    os._exit(main(argv))


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., multiprocessing.process.BaseProcess]:
    """Starts a command line in a process whose imports are done and whose programs are compiled."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.run_store.test_resume", "jaxprune.run", "orbax.checkpoint.v1", "transformers"]
    )
    log = tmp_path_factory.mktemp("log") / "log"

    def started(
        argv: list[str], where: Any = None, after: float | None = None
    ) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work, args=(argv, log, where, after))
        process.start()
        return process

    return started


@pytest.fixture(scope="module")
def line(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("deep")
    tiny.save(folder, tiny.config(num_hidden_layers=5))
    return [
        "--ckpt",
        str(folder),
        "--calib",
        str(text),
        *"--nsamples 6 --seqlen 64 --eval none".split(),
    ]


def digests(folder: Path) -> dict[str, str]:
    """Of all files but those that tell the time."""
    told = {"jaxprune.json", "report.html", "README.md", MARKER}
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name not in told
    }


def finish(start: Callable, argv: list[str]) -> None:
    process = start(argv)
    process.join(TIMEOUT)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def whole(
    start: Callable, line: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict, float]]:
    """Digests and seconds of an uninterrupted run, which compiles."""

    @functools.cache
    def run(name: str) -> tuple[dict, float]:
        out = tmp_path_factory.mktemp(name) / "out"
        begin = time.monotonic()
        finish(start, [*line, *LINES[name].split(), "--out", str(out)])
        return digests(out), time.monotonic() - begin

    return run


KILLS = [("best", "tuning", 12)]  # tests/crash kills at file operations
KILLS += [
    ("plain", "reading", 4),
    ("plain", "commit", 3),
    ("plain", "rename", 1),
    ("plain", "tidying", 2),
]
KILLS += [("plain", "solve", 17), ("best", "sensitivity", 4)]
KILLS += [
    ("plain", "Gram, asymmetric", 3),
    ("plain", "export", 3),
    ("plain", "forward", 2),
    ("plain", "states", 2),
]
KILLS += [
    ("plain", "record", 1),
    ("plain", "random", 0),
    ("plain", "random", 1),
    ("best", "commit", 4),
]
KILLS += [
    ("best", "Gram", 3),
    ("best", "tuning", 22),
    ("best", "rename", 1),
    ("stream", "tuning", 52),
]
KILLS += [("quantized", "solve", 50), ("quantized", "commit", 13), ("quantized", "random", 0)]
KILLS += [("best", "random", number) for number in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "moment", "number"), KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(
    name: str,
    moment: str,
    number: int,
    start: Callable,
    whole: Callable,
    line: list[str],
    tmp_path: Path,
) -> None:
    argv = [*line, *LINES[name].split(), "--out", str(tmp_path / "out")]
    expected, seconds = whole(name)
    generator = random.Random(f"{name} {moment} {number}")
    if moment == "random":
        process = start(argv, after=generator.uniform(0.1, 0.3) * seconds)
    else:
        process = start(argv, where=(*MOMENTS[moment], number, generator.random() < 0.5))
    process.join(TIMEOUT)
    if moment != "random":  # a random moment may come too late
        assert process.exitcode == -signal.SIGKILL
    if process.exitcode:
        finish(start, argv)
    assert digests(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def stopped_once(
    line: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """A command line without --out, and a folder with the result of a whole run and the store of
    a stopped one."""
    argv, folder = (
        [*line, "--sparsity", "0.7", "--weigh-outputs"],
        tmp_path_factory.mktemp("stopped"),
    )
    assert main([*argv, "--out", str(folder / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        # hidden states are kept, however slow the disk is
        patch.setattr(store_module, "PATIENCE", 0)
        patch.setattr(layer, "prune_and_round", failing(layer.prune_and_round, 30))
        assert main([*argv, "--out", str(folder / "out")]) == 2
    assert not (folder / "out").exists()
    return argv, folder


@pytest.fixture
def stopped(
    stopped_once: tuple[list[str], Path], tmp_path: Path
) -> tuple[list[str], Path, dict[str, str]]:
    """The command line of a run that stopped in its last layer, its store, and the digests it
    should end with."""
    argv, folder = stopped_once
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return (
        [*argv, "--out", str(tmp_path / "out")],
        tmp_path / "out.unfinished",
        digests(folder / "whole"),
    )


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("pruned/1", "truncated"),
        ("pruned/states", "bit-flipped"),
        ("sensitivity/0-*/2", "truncated"),
        ("weights/0", "bit-flipped"),
        pytest.param("pruned/1", "bit-flipped", marks=pytest.mark.slow),
        pytest.param("pruned/states", "truncated", marks=pytest.mark.slow),
        pytest.param("sensitivity/0-*/2", "bit-flipped", marks=pytest.mark.slow),
    ],
)
def test_what_is_damaged_is_done_again(
    what: str,
    how: str,
    stopped: tuple[list[str], Path, dict[str, str]],
    capsys: pytest.CaptureFixture,
) -> None:
    argv, store, expected = stopped
    (file,) = store.glob(f"{what}.safetensors")
    damage(file, how)
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 0
    printed, warned = capsys.readouterr()
    assert "is damaged" in warned and file.name in warned
    redone = [text for text in printed.splitlines() if text.startswith("layer ")]
    assert len(redone) == 5
    assert digests(store.with_name("out")) == expected
    record = json.loads((store.with_name("out") / "jaxprune.json").read_text())
    # without the digests of weights nobody knows what the results were made of
    assert record["resumed_layers"] == {"pruned/1": 3, "weights/0": 0}.get(what, 4)


def test_another_run_is_refused(
    stopped: tuple[list[str], Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv, store, expected = stopped
    tiny.save(tmp_path / "other", tiny.config(num_hidden_layers=5, rms_norm_eps=1e-5))
    stored = load_file(tmp_path / "other/model.safetensors")
    stored["model.layers.4.mlp.up_proj.weight"][3, 3] += 1
    save_file(stored, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    changes = {
        "pattern.sparsity: 0.7 then, 0.6 now": ["--sparsity", "0.6"],
        "seed: 0 then, 1 now": ["--seed", "1"],
        "calibration.sha256: ": ["--seed", "1"],
        "layers.4.mlp.up_proj.kernel: the tensor has changed since this run was stopped": [
            "--ckpt",
            str(tmp_path / "other"),
        ],
        "method.options.damping: 0.1 then, 0.2 now": ["--damping", "0.2"],
    }
    for difference, change in changes.items():
        capsys.readouterr()
        assert main(changed(argv, *change)) == 2
        assert difference in capsys.readouterr().err
        assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before
    assert main(argv) == 0
    assert digests(store.with_name("out")) == expected


def test_there_must_be_something_to_resume(
    stopped: tuple[list[str], Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv, store, _ = stopped
    assert main([*argv[:-1], str(tmp_path / "elsewhere"), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere.unfinished").exists()
    with (store / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(argv) == 2
    assert "another process is working on" in capsys.readouterr().err
    (store / "run.json").write_text("{")
    assert main(argv) == 2
    assert "run.json: it is not valid JSON" in capsys.readouterr().err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler for SIGINT, which a shell's background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_a_run_cleanly(
    signal_name: str,
    line: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    argv = [*line, "--out", str(tmp_path / "out"), "--save-masks", str(tmp_path / "masks")]
    real, calls = layer.prune_and_round, []

    def signalled(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:
            os.kill(os.getpid(), getattr(signal, signal_name))
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "prune_and_round", signalled)
        assert main(argv) == 130
    said = capsys.readouterr().err
    assert "the same command continues from it" in said and said.endswith("stopped\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.unfinished"]
    kept = ["lock", "pruned", "run.json", "weights"]
    assert sorted(p.name for p in (tmp_path / "out.unfinished").iterdir()) == kept
    assert main(argv) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks", "out"]


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_damaged_checkpoint_is_pruned_further_once_it_is_replaced(
    line: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    edited(damaged, lambda tensors: tensors["model.norm.weight"].__setitem__(3, np.nan))
    argv = changed(line, "--ckpt", str(damaged), "--out", str(tmp_path / "out"))
    assert main(argv) == 2
    note, error = capsys.readouterr().err.splitlines()[-2:]
    assert note == (
        f"finished work is saved in {tmp_path}/out.unfinished: once the file is replaced, the same "
        "command continues "
        "from it"
    )
    assert error.startswith(f"error: {damaged}: norm.scale[3]: ")
    shutil.copyfile(checkpoint / "model.safetensors", damaged / "model.safetensors")
    assert main(argv) == 0
    assert "resuming from the results saved" in capsys.readouterr().err


def test_an_error_that_another_try_meets_again_suggests_none(
    line: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    large = shutil.copytree(checkpoint, tmp_path / "large")
    edited(
        large,
        lambda tensors: tensors["model.layers.2.input_layernorm.weight"].__imul__(np.float32(1e30)),
    )
    argv = changed(line, "--ckpt", str(large), "--out", str(tmp_path / "out"))
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "error: layer 2: activations are NaN or infinite" in said
    assert (tmp_path / "out.unfinished").exists() and "the same command" not in said


def test_an_error_of_the_evaluation_says_how_to_use_what_is_pruned(
    line: list[str],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    argv = [*line, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("jaxprune.evaluation.quality.text_quality", failing(lambda *a, **k: None, 1))
        measured = ("--eval", "ppl", "--eval-text", str(text), "--eval-windows", "2")
        assert main(changed(argv, *measured)) == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"finished work is saved in {tmp_path}/out.unfinished: with other options of the "
        "evaluation, or without it, "
        "the same command continues from it",
        "error: stopped here",
    ]
    assert main(argv) == 0
    assert "resuming from the results saved" in capsys.readouterr().err


def test_a_run_store_goes_when_nothing_is_written_into_it(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunStore._move

    def slow(*args: Any) -> None:
        time.sleep(0.5)  # longer than all that comes after the last layer
        real(*args)

    monkeypatch.setattr(RunStore, "_move", slow)
    assert main([*line, "--sparsity", "0.7", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_an_error_after_which_a_run_goes_on(
    stopped: tuple[list[str], Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv, _, expected = stopped
    size = (tmp_path / "whole/model.safetensors").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", disk], check=True)
    try:
        argv = [*argv[:-1], str(disk / "out")]
        assert main(argv) == 2
        assert "GiB of disk are needed" in capsys.readouterr().err
        assert list(disk.iterdir()) == []
        # whether a layer, states or the checkpoint finds no room depends on the time
        for factor in (0.5, 1.6):
            subprocess.run(["mount", "-o", f"remount,size={int(factor * size)}", disk], check=True)
            assert main([*argv, "--unchecked"]) == 2
            fault = capsys.readouterr().err
            assert (
                "no room for" in fault or "cannot be written" in fault or "cannot write" in fault
            ), (factor, fault)
            assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert main(argv) == 0
        assert digests(disk / "out") == expected
        assert [path.name for path in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", disk], check=True)


UNMEASURED = '''
import dataclasses

import jax.numpy as jnp

from jaxprune.methods.magnitude import Magnitude


@dataclasses.dataclass(frozen=True)
class Unmeasured(Magnitude):
    """Magnitude pruning, with metrics that are not finite."""

    def solve(self, prepared, weight, pattern):
        metrics = {"undefined": jnp.array(jnp.nan), "endless": jnp.array(jnp.inf)}
        return super().solve(prepared, weight, pattern)._replace(metrics=metrics)
'''


class Stopping(Observer):
    """Remembers the layers, and stops the run after one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.last = last
        self.layers: list[Any] = []

    def layer_done(self, result: Any) -> None:
        self.layers.append(result)
        if result.index == self.last:
            raise InputError("stopped here")


@pytest.mark.parametrize("quantize", [None, "q4_0"])
def test_metrics_that_are_not_finite_are_none_after_a_stop_too(
    quantize: str | None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method is another package's, for all of ours have finite metrics."""
    install_method(tmp_path, "unmeasured", UNMEASURED)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = Recipe(methods.load("unmeasured")(), quantize=quantize)
    out, seen = tmp_path / "out", Stopping()
    with pytest.raises(InputError, match="stopped here"):
        prune(load(checkpoint), windows(), recipe, out, observer=Stopping(last=1))
    saved = list((tmp_path / "out.unfinished").rglob("*.safetensors"))
    assert {file.name for file in saved} >= {"0.safetensors", "1.safetensors"}
    for file in saved:
        with safe_open(file, framework="numpy") as opened:
            json.loads(opened.metadata()["figures"], parse_constant=pytest.fail)
    prune(load(checkpoint), windows(), recipe, out, observer=seen)
    assert [result.resumed for result in seen.layers[:3]] == [True, True, False]
    for result in seen.layers:
        for kernel in result.kernels.values():
            # all that is no number is one null
            undefined, endless = (kernel.stats[name] for name in ("undefined", "endless"))
            assert math.isnan(undefined) and not math.isfinite(endless)
            assert math.isnan(endless) or not result.resumed
    record = json.loads((out / "jaxprune.json").read_text(), parse_constant=pytest.fail)
    assert len(record["layers"]) == 3
    for one in record["layers"]:
        for linear in one["kernels"].values():
            assert linear["stats"].items() >= {"undefined": None, "endless": None}.items()
    run = records.load(out)
    assert isinstance(run, records.Run) and run.resumed_layers == 2
