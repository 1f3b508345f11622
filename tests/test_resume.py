"""Runs that are killed, in processes of their own, and go on."""

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

LINES = {
    "plain": "--method admm --asymmetry 0.25",
    "best": "--preset best --sparsity 0.6 --tune-windows 2 --rounds 2",
}
MOMENTS = {
    "reading": ("convert.hf", "Reader.read"),
    "Gram": ("jaxprune.pipeline", "accumulate"),
    "Gram, asymmetric": ("jaxprune.pipeline", "_accumulate_both"),
    "solve": ("jaxprune.pipeline", "solve_linear"),
    "forward": ("jaxprune.pipeline", "forward"),
    "commit": ("jaxprune.resume", "save_tree"),
    "states": ("jaxprune.resume", "_write_array"),
    "sensitivity": ("jaxprune.sensitivity", "backward"),
    "tuning": ("jaxprune.tuning", "update"),
    "export": ("convert.hf", "Writer.write"),
    "record": ("jaxprune.record", "Record.save"),
    "rename": ("jaxprune.resume", "replace"),
    "tidying": ("jaxprune.resume", "shutil.rmtree"),
}
"""Name -> module and function that is interrupted."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def work(argv: list[str], log: Path, where: tuple[str, str, int, bool] | None, after: float | None) -> None:
    """A child process: a command line that dies at a call of a function, before or after it, or after some seconds."""
    import importlib

    from jaxprune.run import main

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
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., multiprocessing.process.BaseProcess]:
    """Starts a command line in a process whose imports are done and whose programs are compiled."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume", "jaxprune.run", "orbax.checkpoint.v1", "transformers"])
    cache, log = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("log") / "log"
    settings = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(cache)}

    def started(argv: list[str], where: Any = None, after: float | None = None) -> multiprocessing.process.BaseProcess:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            process = context.Process(target=work, args=(argv, log, where, after))
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return process

    return started


@pytest.fixture(scope="module")
def line(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("deep")
    tiny.save(folder, tiny.config(num_hidden_layers=5))
    return ["--ckpt", str(folder), "--calib", str(text), "--nsamples", "6", "--seqlen", "64", "--eval", "none"]


def digests(folder: Path) -> dict[str, str]:
    """Of all files but those that tell the time."""
    told = {"jaxprune.json", "report.html", "README.md"}
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name not in told}


def finish(start: Callable, argv: list[str]) -> None:
    process = start(argv)
    process.join(200)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def whole(start: Callable, line: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, float]]:
    """Digests and seconds of uninterrupted runs, with the programs already compiled."""
    found = {}
    for name, options in LINES.items():
        for _ in range(2):
            out = tmp_path_factory.mktemp(name) / "out"
            begin = time.monotonic()
            finish(start, [*line, *options.split(), "--out", str(out)])
        found[name] = digests(out), time.monotonic() - begin
    return found


KILLS = [("plain", "reading", 4), ("plain", "Gram, asymmetric", 3), ("plain", "solve", 17), ("plain", "forward", 2)]
KILLS += [("plain", "commit", 3), ("plain", "states", 5), ("plain", "export", 3), ("plain", "record", 1)]
KILLS += [("plain", "rename", 1), ("plain", "tidying", 9), ("best", "sensitivity", 4), ("best", "commit", 4)]
KILLS += [("best", "Gram", 8), ("best", "tuning", 12), ("best", "tuning", 31), ("best", "rename", 1)]
KILLS += [(name, "random", number) for name in LINES for number in range(2)]


@pytest.mark.parametrize(("name", "moment", "number"), KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(
    name: str, moment: str, number: int, start: Callable, whole: dict, line: list[str], tmp_path: Path
) -> None:
    argv = [*line, *LINES[name].split(), "--out", str(tmp_path / "out")]
    expected, seconds = whole[name]
    generator = random.Random(f"{name} {moment} {number}")
    if moment == "random":
        process = start(argv, after=generator.uniform(0.2, 0.9) * seconds)
    else:
        process = start(argv, where=(*MOMENTS[moment], number, generator.random() < 0.5))
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    finish(start, argv)
    assert digests(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
