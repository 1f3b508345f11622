"""Dozens of hostile inputs; and the harness catches what it is there to catch."""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from convert import CheckpointError
from tests.helpers import tiny, xla
from tests.helpers.checkpoints import write_gguf
from tests.hostile import answers, json_edits, mutations, room, targets, watchdog
from tests.hostile.mutations import Case, Edit
from tests.hostile.targets import Target
from tests.hostile.watchdog import Limits, Outcome, Result

OPENING, WHOLE = 70, 10
"""Cases in CI; scripts/hostile.py has as many as one wants."""
COMMANDS = (
    "run",
    "resume",
    "convert-hf",
    "convert-gguf",
    "verify",
    "solve",
    "run-line",
    "verify-line",
)
"""Those that take a moment once they are compiled."""


@pytest.fixture(scope="module", autouse=True)
def forked() -> None:
    watchdog.prepare(room.PRELOAD, room.ENVIRONMENT | xla.quick())


def misbehave(folder: Path) -> Callable[[str], Outcome]:
    """A worker that does all that no worker should."""

    def work(case: str) -> Outcome:
        if case == "hangs":
            # as C code that looks at no signal
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
            time.sleep(60)
        elif case == "grows":
            kept = [np.ones(2**22) for _ in range(25)]
            return Outcome("succeeded", str(len(kept)))
        elif case == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif case == "panics":
            raise BaseException("a panic")
        return Outcome("succeeded")

    return work


def test_the_watchdog_ends_what_hangs_grows_or_dies() -> None:
    names = ["fine", "hangs", "grows", "dies", "panics", "fine too"]
    (fine,) = watchdog.watch(["fine"], misbehave, Limits(seconds=20, first=20))
    # A machine that has its memory from a host may take a second for a hundred megabytes.
    limits = Limits(seconds=1.5, first=1.5, memory=fine.peak + 5e7)
    found = {result.case: result.outcome for result in watchdog.watch(names, misbehave, limits)}
    assert found.keys() == set(names)
    assert [found[name].status for name in names] == ["succeeded", *["failed"] * 4, "succeeded"]
    for name, said in {
        "hangs": "hang:",
        "grows": "memory:",
        "dies": "exit code -11",
        "panics": "a panic",
    }.items():
        assert said in found[name].detail, name


def mistaken() -> dict[str, Target]:
    """Targets that do all that is forbidden, and a few that do not."""

    def refuse(problem: str) -> None:
        raise CheckpointError(problem)

    def command(
        said: str, status: Any, make: Callable[[], object] = lambda: None
    ) -> Callable[[Any], Any]:
        def main(argv: Any) -> Any:
            make()
            print(said, file=sys.stderr)
            return status

        return main

    commands = {
        "good-command": command("warning: it is odd\nerror: no such file", 2),
        "silent": command("", 2),
        "chatty": command("Loading\nerror: no such file", 2),
        "chatty-success": command("Loading", 0),
        "two-errors": command("error: this\nerror: that", 2),
        "long": command("error: " + "x" * 3000, 2),
        "terminal": command("error: \x1b[2J", 2),
        "defect": command("Traceback (most recent call last):\nKeyError: 1", 70),
        "denies": command("", 1),
        "wrong-command": command("", 0, lambda: Path("out").mkdir()),
        "leaves": command("", 0, lambda: Path("left").mkdir()),
    }
    for name, main in commands.items():
        sys.modules[f"hostile_{name}"] = SimpleNamespace(main=main)  # type: ignore[assignment]
    calls: dict[str, Callable[[], object]] = {
        "good": lambda: None,
        "refuses": lambda: refuse("it is damaged"),
        "empty": lambda: refuse(""),
        "raises": lambda: {}["x"],
        "writes": lambda: Path("precious").write_text("mine"),
        "touches": lambda: os.utime("a.json"),
        "opens": lambda: Path("precious").chmod(0o777),
        "deletes": lambda: Path("../precious").unlink(),
        "wrong": lambda: answers.require(False, "it is wrong"),
    }

    def check(case: Case, base: Path) -> None:
        answers.require(not Path("out").exists(), "it is wrong")

    made = {name: Target(("a.json",), call) for name, call in calls.items()}
    return made | {
        name: Target(("a.json",), None, f"hostile_{name}", "", check) for name in commands
    }


def enter(base: Path, folder: Path) -> Callable[[str], Outcome]:
    room.TARGETS = mistaken()  # type: ignore[assignment]
    return room.enter(base, folder)


def test_only_a_case_that_exceeds_a_limit_is_tried_again() -> None:
    outcomes = {
        "fine": Outcome("succeeded"),
        "hangs": Outcome("failed", "hang: more than 10 s"),
        "grows": Outcome("failed", "memory: 2.1 GB"),
        "writes": Outcome("failed", "bystander: precious changed"),
    }
    again: list[str] = []

    def alone(cases: list[str]) -> Iterator[Result]:
        again.extend(cases)
        yield Result("hangs", Outcome("succeeded"), 1, 0)
        yield Result("grows", Outcome("failed", "memory: 2.2 GB"), 1, 0)

    results = [Result(case, outcome, 1, 0) for case, outcome in outcomes.items()]
    found = {one.case: one.outcome.status for one in watchdog.confirmed(results, alone)}
    assert again == ["hangs", "grows"]
    assert found == {
        "fine": "succeeded",
        "writes": "failed",
        "hangs": "succeeded",
        "grows": "failed",
    }


def test_a_room_notices_every_mistake_and_is_put_back_in_order(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("a.json", "precious"):
        (base / name).write_text('{"n": 1}')
    mutations.odd_paths(base / "odd")
    names = [name for name in mistaken()]
    cases = [str(Case(name, (Edit("a.json", "null", "/n"),))) for name in names]
    results = watchdog.watch(cases, functools.partial(enter, base), Limits(20, first=20), workers=1)
    found = {result.case.split()[0]: result.outcome for result in results}
    assert {name for name in names if found[name].status != "failed"} == {
        "good",
        "refuses",
        "good-command",
    }
    for name, said in {
        "writes": "work/precious changed",
        "deletes": "precious is gone",
        "wrong": "it is wrong",
    }.items():
        assert said in found[name].detail, found[name]
    undisturbed = watchdog.watch(["refuses"], functools.partial(enter, base), Limits(20, first=20))
    assert "nothing was changed" in next(undisturbed).outcome.detail


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file of each format with a structure of its own."""
    folder = tmp_path_factory.mktemp("contents")
    config = tiny.config(num_hidden_layers=1)
    tiny.save(folder, config)
    write_gguf(folder / "model.gguf", config, gguf.GGMLQuantizationType.F32)
    np.save(folder / "ids.npy", np.arange(128).reshape(8, 16))
    tiny.write_text(folder / "text.jsonl", 5)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}


def test_nearly_every_edit_changes_its_file_and_the_same_one_changes_it_alike(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        edits = [
            edit
            for edit in mutations.edits_of(tmp_path, name)
            if edit.kind not in ("blanks", "deep")
        ]
        assert len(set(edits)) == len(edits) > 50, name

        def applied(edit: Edit, path: Path = path, content: bytes = content) -> bytes:
            path.unlink()
            path.write_bytes(content)
            mutations.apply(tmp_path, edit)
            return path.read_bytes()

        some = [edit for edit in edits if edit.kind not in mutations.PATHS][
            :: max(1, len(edits) // 150)
        ]
        changed = [applied(edit) for edit in some]
        same = [edit for edit, now in zip(some, changed, strict=True) if now == content]
        assert len(same) < 0.1 * len(some), same
        assert [applied(edit) for edit in some[:40]] == changed[:40]


def test_a_case_is_what_it_prints() -> None:
    for place in ("", "/a:b/c d~1", "x|y", "blk.0.attn_q.weight.3@120+8", "ä\n%"):
        case = Case("hf", (Edit("hf/a b.json", "null", place), Edit("hf/x", "fifo")))
        assert mutations.parse(str(case)) == case and "\n" not in str(case)


def test_json_is_changed_where_the_pointer_says() -> None:
    text = '{"a": {"b/c": [1, 2]}}'
    assert list(json_edits.pointers(json.loads(text))) == [
        "/a",
        "/a/b~1c",
        "/a/b~1c/0",
        "/a/b~1c/1",
    ]
    assert json.loads(json_edits.change_json(text, "removed", "/a/b~1c/0")) == {"a": {"b/c": [2]}}
    assert json_edits.change_json(text, "nan", "/a/b~1c/1") == '{"a": {"b/c": [1, NaN]}}'
    assert json_edits.change_json(text, "twice", "/a/b~1c") == '{"a": {"b/c": [1, 2], "b/c": 0}}'


def hostile(base: Path, names: tuple[str, ...], count: int) -> Iterator[str]:
    """What fails of so many cases, and how to repeat it."""
    for result in room.attempt_all(base, names, count, 0, Limits(10, first=30)):
        if result.outcome.status == "failed":
            yield (
                f"{result.outcome.detail}\nrepeat it: python scripts/hostile.py --repeat "
                f"'{result.case}'"
            )


def test_hostile_input_is_refused_in_one_line_or_handled_right(tmp_path: Path) -> None:
    base = tmp_path / "base"
    failures = [*hostile(base, tuple(targets.CALLS), OPENING), *hostile(base, COMMANDS, WHOLE)]
    assert not failures, f"{len(failures)} failures, the first:\n" + "\n\n".join(failures[:5])
