"""Worker processes under a watchdog that ends those that take too long or too much memory, C code
included.

A worker handles one case after another; the watchdog looks at its clock and at its resident memory
every few milliseconds. A worker that is ended, or ends by itself, fails the case it was at, and
another takes its place.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 120.0
"""Seconds that a worker may take to begin."""
WAITING = 4
"""How much longer a case may take by the clock than by its processor time."""
TIRED = 1.3e9
"""Bytes that a worker may have between two cases: beyond, another one takes its place."""


LOG = "stderr"
"""A file in a worker's folder: its stderr, of which a fatal error's last words are taken."""


class Outcome(NamedTuple):
    """What became of a case.

    Attributes:
        status: succeeded, refused or failed.
        detail: the error's line, or what went wrong and where.
    """

    status: str
    detail: str = ""


class Result(NamedTuple):
    """A case's outcome and what it took: seconds, and bytes of resident memory at the peak."""

    case: str
    outcome: Outcome
    seconds: float
    peak: int


Work = Callable[[str], Outcome]


class Limits(NamedTuple):
    """What one case may take.

    Attributes:
        seconds: of processor time; of the clock, `WAITING` times as many, for the machine may be
            busy with other work.
        first: the same, for a worker's first case of a target, which imports and compiles.
        memory: bytes, resident, of the worker with all that it has imported.
    """

    seconds: float
    first: float
    memory: float = 2e9


class _Worker:
    """A process, and the case that it is at; a case begins with its target's name.

    Args:
        make: gives the function that handles cases, in the process; called with an empty folder of
            the worker's own.
        root: where that folder is made.
    """

    def __init__(self, make: Callable[[Path], Work], root: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=root))
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(
            target=_serve, args=(theirs, make, self.folder), daemon=True
        )
        self._process.start()
        theirs.close()
        self.case: str | None = None
        self.ready, self.since, self.spent, self.peak = False, time.monotonic(), 0.0, 0
        self.used: Counter[str] = Counter()

    def give(self, case: str) -> None:
        self.case, self.since, self.peak = case, time.monotonic(), 0
        self.spent = processor_seconds(self._process.pid)
        self.used[case.partition(" ")[0]] += 1
        with contextlib.suppress(OSError):  # it has died; the next look at the pipe says so
            self.pipe.send(case)

    def excess(self, limits: Limits) -> str:
        """What the worker exceeds; "" if nothing."""
        self.peak = max(self.peak, resident(self._process.pid))
        if self.peak > limits.memory:
            return f"memory: more than {limits.memory / 1e9:g} GB"
        allowed = PATIENCE
        if self.case is not None:
            allowed = (
                limits.first if self.used[self.case.partition(" ")[0]] == 1 else limits.seconds
            )
        late = time.monotonic() - self.since > WAITING * allowed
        late |= processor_seconds(self._process.pid) - self.spent > allowed
        return f"hang: more than {allowed:g} s" if late else ""

    def end(self) -> str:
        """Ends the process and what it started; returns how it ended."""
        assert self._process.pid
        self.pipe.close()
        if self.case is None:
            # it goes when nobody is at the other end, and leaves no processes
            self._process.join(2)
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
        self._process.join()
        said = (
            (self.folder / LOG).read_text(errors="replace")[:5000]
            if (self.folder / LOG).exists()
            else ""
        )
        shutil.rmtree(self.folder, ignore_errors=True)
        return f"it died with exit code {self._process.exitcode}\n{said}"


def resident(pid: int | None) -> int:
    """Bytes of a process's resident memory; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def processor_seconds(pid: int | None) -> float:
    """What a process has used of processors; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def prepare(preload: Sequence[str], environment: Mapping[str, str]) -> None:
    """Starts the process that workers are forked from, with modules imported; once a process."""
    multiprocessing.set_forkserver_preload(list(preload))
    before = dict(os.environ)
    os.environ |= dict(environment) | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *_python_path()])
    }
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def watch(
    cases: Iterable[str],
    make: Callable[[Path], Work],
    limits: Limits,
    *,
    workers: int = 2,
    alone: Callable[[str], bool] = lambda case: False,
) -> Iterator[Result]:
    """The results of cases, in the order in which they end.

    Args:
        cases: each is handled once.
        make: see `_Worker`; pickled.
        limits: of each case.
        workers: processes at a time.
        alone: whether a case needs a new worker, and leaves it unfit for others.
    """
    waiting, pool = deque(cases), list[_Worker]()
    with tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True) as name:
        root = Path(name)
        try:
            while waiting or any(worker.case is not None for worker in pool):
                while len(pool) < min(
                    workers, len(waiting) + sum(worker.case is not None for worker in pool)
                ):
                    pool.append(_Worker(make, root))
                connection.wait([worker.pipe for worker in pool], timeout=0.02)
                for worker in list(pool):
                    result, fit = _look(worker, limits, waiting, alone)
                    if result:
                        yield result
                    if not fit:
                        worker.end()
                        pool.remove(worker)
        finally:
            for worker in pool:
                worker.end()


def confirmed(
    results: Iterable[Result], alone: Callable[[list[str]], Iterable[Result]]
) -> Iterator[Result]:
    """The same results, but cases that exceeded a limit of time or memory are tried again at the
    end, for other work on the machine can be the reason.

    Args:
        results: of all cases.
        alone: tries cases again, with nothing beside them.
    """
    again = []
    for result in results:
        if result.outcome.detail.startswith(("hang:", "memory:")):
            again.append(result.case)
        else:
            yield result
    for result in alone(again):
        print(f"tried again: {result.case[:300]}: {result.outcome.status}", flush=True)
        yield result


def _look(
    worker: _Worker, limits: Limits, waiting: deque[str], alone: Callable[[str], bool]
) -> tuple[Result | None, bool]:
    """What a worker has to say, and whether it may go on; gives it its next case."""
    result, spent = None, False
    if worker.pipe.poll():
        try:
            said = worker.pipe.recv()
        except (EOFError, ConnectionError):
            return _ended(worker, worker.end()), False
        if isinstance(said, str):
            raise RuntimeError(f"a worker could not begin:\n{said}")
        if said is not None:
            assert worker.case is not None
            outcome, peak = said
            peak = max(peak, worker.peak)
            if peak > limits.memory:
                outcome = Outcome("failed", f"memory: {peak / 1e9:.1f} GB")
            result = Result(worker.case, outcome, time.monotonic() - worker.since, peak)
            spent = alone(worker.case) or resident(worker._process.pid) > TIRED
            worker.case = None
        worker.ready = True
    elif (worker.case is not None or not worker.ready) and (excess := worker.excess(limits)):
        return _ended(worker, excess), False
    if worker.ready and worker.case is None and waiting and not spent:
        if alone(waiting[0]) and worker.used:
            return result, False
        worker.give(waiting.popleft())
    return result, not spent


def _ended(worker: _Worker, why: str) -> Result:
    if worker.case is None:
        raise RuntimeError(f"a worker could not begin: {why}")
    return Result(worker.case, Outcome("failed", why), time.monotonic() - worker.since, worker.peak)


def _serve(pipe: Any, make: Callable[[Path], Work], folder: Path) -> None:
    """A worker's life."""
    os.setsid()
    log = os.open(folder / LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    faulthandler.enable()
    try:
        work = make(folder)
    except BaseException:
        pipe.send(traceback.format_exc())
        return
    pipe.send(None)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        _reset_peak()
        try:
            outcome = work(case)
        except BaseException:  # a panic of Rust's is no Exception
            outcome = Outcome("failed", traceback.format_exc())
        pipe.send((outcome, _peak()))


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes of this process's resident memory at the peak since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
