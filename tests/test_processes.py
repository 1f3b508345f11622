"""Several processes of one run end together: the connection between them, and whole runs of which
one ends early."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from jaxprune import InputError
from jaxprune.commands.run_options import group_of
from jaxprune.processes import control
from jaxprune.processes.collective import differences, on_first_process, require_same
from jaxprune.processes.control import LOST, Control, Failure, Group
from tests.helpers import tiny, xla
from tests.helpers.command import changed, free_port

WITHIN = 30
"""Seconds in which every process has to end once one has failed."""


class Met(threading.Thread):
    """A process's meeting, in a thread: its connections or its error."""

    def __init__(self, group: Group, hello: dict[str, Any], seconds: float) -> None:
        super().__init__(daemon=True)
        self.group, self.hello, self.seconds = group, hello, seconds
        self.connections: dict[int, Connection] = {}
        self.error = ""
        self.start()

    def run(self) -> None:
        meet = control._connect if self.group.number else control._wait_for_others
        try:
            self.connections = meet(self.group, self.hello, self.seconds)
        except InputError as error:
            self.error = str(error)

    def joined(self) -> "Met":
        self.join(WITHIN)
        assert not self.is_alive()
        return self


def meet(*hellos: dict[str, Any], processes: int | None = None, seconds: float = 20) -> list[Met]:
    """Has processes meet, the first of them number 0."""
    port = free_port()
    count = processes or len(hellos)
    threads = [
        Met(Group("localhost", port, count, number), hello, seconds)
        for number, hello in enumerate(hellos)
    ]
    return [thread.joined() for thread in threads]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_were_asked_the_same_meet(count: int) -> None:
    met = meet(*[{"asked": {"seed": 0}}] * count)
    assert [sorted(one.connections) for one in met] == [[*range(1, count)], *[[0]] * (count - 1)]


def test_a_difference_is_named_to_all() -> None:
    same = {"asked": {"seed": 0, "versions": {"jax": "1"}}}
    met = meet(same, {"asked": {"seed": 3, "versions": {"jax": "2"}}}, same)
    expected = "the processes were asked different things: seed: 0 in process 0, 3 in process 1; "
    assert {one.error for one in met} == {expected + "versions.jax: 1 in process 0, 2 in process 1"}


@pytest.mark.parametrize("who", [0, 2])
def test_a_process_that_fails_before_the_meeting_is_named_to_all(who: int) -> None:
    hellos: list[dict[str, Any]] = [{"asked": {}} for _ in range(4)]
    hellos[who] = {"failure": Failure(who, 2, "no such option")._asdict()}
    assert {one.error for one in meet(*hellos)} == {f"process {who} of this run: no such option"}


def test_a_process_that_never_comes_is_named() -> None:
    met = meet({"asked": {}}, {"asked": {}}, processes=3, seconds=1)
    assert {one.error for one in met} == {"process 2 of this run: it did not come within 1 s"}


def test_a_first_process_that_never_comes_is_named() -> None:
    alone = Met(Group("localhost", free_port(), 2, 1), {"asked": {}}, 1).joined()
    assert alone.error.startswith("the first process did not answer at localhost:")


def test_two_processes_of_one_number_are_refused() -> None:
    port = free_port()
    groups = [Group("localhost", port, 3, number) for number in (0, 1, 1)]
    met = [Met(group, {"asked": {}}, 5) for group in groups]
    assert "two processes have this number" in met[0].joined().error


def test_something_else_that_connects_is_passed_over() -> None:
    group = Group("localhost", free_port(), 2, 0)
    first = Met(group, {"asked": {}}, 20)
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b'\0\0\0\x0d{"number": 7}'):
        while True:
            try:
                stranger = socket.create_connection(("localhost", group.port + 1), timeout=5)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        stranger.sendall(content)
        stranger.close()
    second = Met(group._replace(number=1), {"asked": {}}, 20)
    assert first.joined().connections.keys() == {1} and second.joined().connections.keys() == {0}


class Processes:
    """Processes that have met, as threads; what ends them is noted."""

    def __init__(self, count: int) -> None:
        self.met = meet(*[{"asked": {}}] * count)
        self.ends: list[list[Failure]] = [[] for _ in self.met]
        self.controls = [
            Control(one.group, one.connections, self._noting(number))
            for number, one in enumerate(self.met)
        ]
        for own in self.controls:
            own.listen()

    def _noting(self, number: int) -> Callable[[Failure], NoReturn]:
        def end(failure: Failure) -> NoReturn:
            self.ends[number].append(failure)
            self.close(number)
            while True:  # nothing more happens in a process that has ended
                time.sleep(WITHIN)

        return end

    def close(self, number: int) -> None:
        """Closes a process's connections, as the system does when it ends."""
        for connection in self.met[number].connections.values():
            with (
                socket.socket(fileno=os.dup(connection.fileno())) as own,
                contextlib.suppress(OSError),
            ):
                own.shutdown(socket.SHUT_RDWR)  # the other side may have closed it

    def kill(self, number: int) -> None:
        """Closes a process's connections, and keeps its threads, which would be gone, from passing
        on what happens then."""
        self.controls[number]._leaving = True
        self.close(number)

    def wait(self, *numbers: int) -> None:
        deadline = time.monotonic() + WITHIN
        while not all(self.ends[number] for number in numbers):
            assert time.monotonic() < deadline, self.ends
            time.sleep(0.01)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("first", [True, False])
def test_a_failure_ends_all(count: int, first: bool) -> None:
    processes, who = Processes(count), 0 if first else count - 1
    failure = Failure(who, 70, "a defect")
    processes.controls[who].leave(failure.status, failure.text)
    processes.close(who)
    others = [number for number in range(count) if number != who]
    processes.wait(*others)
    assert all(processes.ends[number] == [failure] for number in others) and not processes.ends[who]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("first", [True, False])
def test_a_process_that_is_killed_ends_all(count: int, first: bool) -> None:
    processes, who = Processes(count), 0 if first else count - 1
    processes.kill(who)
    others = [number for number in range(count) if number != who]
    processes.wait(*others)
    assert all(processes.ends[number] == [Failure(who, None, LOST)] for number in others)


def test_processes_that_succeed_wait_for_each_other() -> None:
    processes = Processes(3)
    leaving = [threading.Thread(target=own.leave, args=(0, "")) for own in processes.controls]
    for thread in leaving[:2]:
        thread.start()
    leaving[0].join(0.3)
    assert leaving[0].is_alive()  # the third is still at work
    leaving[2].start()
    for thread in leaving:
        thread.join(WITHIN)
        assert not thread.is_alive()
    for number in (1, 2, 0):
        processes.close(number)
    time.sleep(0.2)
    assert processes.ends == [[], [], []]


def test_a_failure_still_ends_a_process_that_has_succeeded() -> None:
    processes = Processes(2)
    threading.Thread(target=processes.controls[0].leave, args=(0, ""), daemon=True).start()
    processes.controls[1].leave(2, "no room")
    processes.wait(0)
    assert processes.ends[0] == [Failure(1, 2, "no room")]


def test_differences_are_named_by_dotted_names() -> None:
    first = {"recipe": {"method": "admm", "rules": []}, "seed": 0}
    second = {"recipe": {"method": "wanda", "rules": []}}
    expected = [
        "recipe.method: admm in process 0, wanda in process 1",
        "seed: 0 in process 0, nothing in process 1",
    ]
    assert differences([first, second]) == expected and differences([first, first]) == []


def test_one_process_compares_nothing() -> None:
    def never() -> dict[str, Any]:
        raise AssertionError

    require_same(never)
    assert on_first_process(lambda: 3) == 3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--ckpt x --sparsity 7 --coordinator h:5 --processes 2 --process-id 1",
            Group("h", 5, 2, 1),
        ),
        (
            "--ckpt x --coordinator [::1]:5 --processes 2 --process-id 0 --no-such-flag",
            Group("::1", 5, 2, 0),
        ),
        ("--ckpt x --sparsity 7", None),
        ("--ckpt x --coordinator h:5 --processes 2", None),
        ("--ckpt x --coordinator h:5 --processes 2 --process-id 2", None),
        ("--ckpt x --coordinator h:5 --processes x --process-id 0", None),
        ("--config nowhere.yaml --coordinator h:5 --processes 2 --process-id 0", None),
    ],
)
def test_the_group_of_a_command_line_that_cannot_be_used(line: str, expected: Group | None) -> None:
    assert group_of(line.split()) == expected


def test_slurm_says_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {
        "JOB_ID": "17",
        "STEP_NODELIST": "here",
        "NTASKS": "4",
        "PROCID": "3",
        "LOCALID": "0",
        "STEP_NUM_NODES": "2",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = Group.of("auto", None, None)
    assert (found.host, found.processes, found.number) == (
        "here",
        4,
        3,
    ) and 1024 < found.port < 2**16 - 1


def test_auto_outside_a_cluster_is_an_error() -> None:
    with pytest.raises(InputError, match="neither SLURM, Open MPI nor a TPU pod"):
        Group.of("auto", None, None)


# Whole runs. A process of which `CODE` runs the command line ends where `where` is called.
CODE = """
import importlib, os, signal, sys
where, how = sys.argv[1:3]
def end(*args, **options):
    if how == "change":
        found = before(*args, **options)
        if isinstance(found, dict):
            return {path: 2 * array for path, array in found.items()}
        return found[::-1]
    if how == "error":
        from jaxprune.errors import InputError
        raise InputError("stopped here")
    if how == "defect":
        raise RuntimeError("broken here")
    ends = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "abort": signal.SIGABRT}
    os.kill(os.getpid(), ends[how])
if where:
    module, *path, name = where.split("/")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    before = getattr(owner, name)
    setattr(owner, name, end)
from jaxprune.run import main
sys.exit(main(sys.argv[3:]))
"""
PHASES = {
    "opening": "jaxprune.api.load/load",
    "text": "jaxprune.calibration/calibration_windows",
    "store": "jaxprune.run_store.opening/_prepare",
    "reverse pass": "jaxprune.phases/measure_sensitivity",
    "pruning": "jaxprune.solve.layer/solve_kernels",
    "tuning": "jaxprune.distill.student/Student/step",
    "writing": "jaxprune.sparsity.masks/MaskWriter/write",
    "evaluation": "jaxprune.evaluation.quality/Evaluator/measure",
    "publishing": "jaxprune.run_store.publishing/_publish",
}
"""Phase -> module and name of a function that belongs to it."""
OF_THE_FIRST = ("store", "writing", "publishing")
"""Phases of the first process alone."""


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("processes")
    tiny.save(folder, tiny.config(num_hidden_layers=2))
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 300, (8, 32), np.int32))
    options = [
        "--ckpt",
        folder,
        "--calib",
        folder / "ids.npy",
        *"--nsamples 8 --seqlen 32 --device cpu".split(),
    ]
    options += ["--preset", "best", "--sparsity", 0.6, "--tune-epochs", 0.5, "--devices", 1]
    return [*options, "--eval-text", folder / "ids.npy", "--eval-windows", 2]


def run_processes(
    line: list[object],
    out: Path,
    who: int,
    where: str,
    how: str,
    count: int = 2,
    own: tuple[object, ...] = (),
) -> tuple[list[int], list[str], float]:
    """Runs processes of one run, of which one ends early, or has options of its own.

    Returns:
        Exit statuses, what was printed on stderr, and the seconds from the first end to the last
        one.
    """
    shared = [
        *line,
        "--out",
        out,
        "--save-masks",
        f"{out}-masks",
        "--coordinator",
        f"localhost:{free_port()}",
    ]
    running, ends = [], {}
    for number in range(count):
        hooks = (where, how) if number == who else ("", "")
        options = [
            *shared,
            "--processes",
            count,
            "--process-id",
            number,
        ]
        options = changed(options, *own) if number == who else options
        argv = [sys.executable, "-c", CODE, *hooks, *map(str, options)]
        environment = os.environ | xla.quick() | {"HF_HUB_OFFLINE": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(argv, env=environment, text=True, **pipes))
    printed = [""] * count

    def read(number: int) -> None:
        printed[number] = running[number].communicate(timeout=600)[1]
        ends[number] = time.monotonic()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one.returncode for one in running], printed, max(ends.values()) - ends[who]


REASONS = {
    "error": (2, "stopped here"),
    "defect": (70, "a defect of jaxprune"),
    "kill": (2, LOST),
    "terminate": (130, "it was stopped"),
}
"""How a process ends -> the exit status of the others, and what they say of it."""
QUICK = [("pruning", "error", 1, 2), ("store", "defect", 0, 2), ("opening", "kill", 0, 2)]
ENDS = [
    (phase, how, who, 2)
    for phase, how in zip(
        PHASES, itertools.cycle(("kill", "error", "terminate", "defect")), strict=False
    )
    for who in range(1 if phase in OF_THE_FIRST else 2)
]
ENDS += [("pruning", how, who, 4) for how in REASONS for who in (0, 2)]
ENDS += [end for end in QUICK if end not in ENDS]


@pytest.mark.parametrize(
    ("phase", "how", "who", "count"),
    [pytest.param(*end, marks=() if end in QUICK else pytest.mark.slow) for end in ENDS],
)
def test_all_processes_end_with_one(
    phase: str, how: str, who: int, count: int, line: list[object], tmp_path: Path
) -> None:
    statuses, printed, seconds = run_processes(
        line, tmp_path / "out", who, PHASES[phase], how, count
    )
    status, reason = REASONS[how]
    assert seconds < WITHIN
    assert statuses[who] == (-9 if how == "kill" else status), printed[who]
    for number in set(range(count)) - {who}:
        assert statuses[number] == status, printed[number]
        errors = [text for text in printed[number].splitlines() if text.startswith("error: ")]
        # An error of the user's on the first process alone is raised on all.
        alone = phase in OF_THE_FIRST and errors == ["error: stopped here"]
        assert alone or errors == [
            error for error in errors if f"process {who} of this run: {reason}" in error
        ], errors
        assert len(errors) == 1 and "Traceback" not in printed[number], printed[number]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        pytest.param(
            ("--seed", 1), "asked different things: seed: 0 in process 0, 1 in process 1", id="seed"
        ),
        pytest.param(
            ("--ckpt", "nowhere"),
            "in process 0, nowhere in process 1",
            id="ckpt",
            marks=pytest.mark.slow,
        ),
        pytest.param(("--sparsity", 7), "process 1 of this run: ", id="impossible"),
    ],
)
def test_options_that_differ_are_refused_on_all(
    own: tuple[object, ...], message: str, line: list[object], tmp_path: Path
) -> None:
    statuses, printed, seconds = run_processes(line, tmp_path / "out", 1, "", "", own=own)
    assert statuses == [2, 2], printed
    assert seconds < WITHIN and message in printed[0]
    assert [len(text.splitlines()) for text in printed] == [1, 1], printed
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("jaxprune.calibration/calibration_windows", "calibration"),
        ("convert.checked/CheckedReader/read", "weights.norm"),
    ],
)
def test_other_text_or_weights_are_refused_on_all(
    where: str, named: str, line: list[object], tmp_path: Path
) -> None:
    """As on two hosts without a common disk."""
    statuses, printed, _ = run_processes(line, tmp_path / "out", 1, where, "change")
    assert statuses == [2, 2], printed
    for text in printed:
        assert f"do not have the same inputs: {named}" in text, text
    assert not [*tmp_path.iterdir()]
