"""Command lines in processes of their own, whose imports are done, under the eyes of a
supervisor."""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

from jaxprune.run_store import store
from tests.crash.operations import Answer, install, supervise

PRELOADED = [
    "jaxprune.run",
    "convert.__main__",
    "orbax.checkpoint.experimental.v1",
    "datasets",
    "torch",
    "lm_eval",
]
PRELOADED += [
    "transformers.models.llama.configuration_llama",
    "transformers.models.auto.tokenization_auto",
]
PRELOADED += ["tests.crash.processes", "matplotlib.pyplot"]


# multiprocessing looks after all children in whatever thread it is called
_FORKING = threading.Lock()


class Command:
    """A command line that runs.

    Args:
        module: whose `main` it is.
        argv: its arguments.
        folder: whose operations are watched.
        answer: see `operations.supervise`.
        log: a new file for what it prints, outside of the folder.
        current: the current folder.
        clock: seconds by which its time of day is wrong, now and whenever that changes; see
            `clock`.
    """

    def __init__(
        self,
        module: str,
        argv: list[str],
        folder: Path,
        answer: Answer,
        log: Path,
        *,
        current: Path,
        clock: Any = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        self._log, self._error = log, []
        self._process = context.Process(
            target=_run, args=(theirs, os.getpid(), module, argv, log, current, clock)
        )
        with _FORKING:
            self._process.start()
        theirs.close()  # a process that ends early is an error here
        listener = recv_handle(ours)
        self._thread = threading.Thread(target=self._supervise, args=(listener, folder, answer))
        self._thread.start()
        ours.send(None)

    def _supervise(self, listener: int, folder: Path, answer: Answer) -> None:
        try:
            supervise(self._process.pid, listener, folder, answer)
        except Exception as error:
            self._error.append(error)
            self._process.kill()
        finally:
            os.close(listener)

    def wait(self, seconds: float = 300) -> int:
        """Exit status; the negative number of a signal.

        Raises:
            TimeoutError: it takes longer.
        """
        if not wait([self._process.sentinel], seconds):
            self._process.kill()
            self._error.append(TimeoutError(f"it did not end within {seconds} s: {self.printed()}"))
        with _FORKING:
            self._process.join()
            status = self._process.exitcode
        self._thread.join()
        for error in self._error:
            raise error
        return status

    def printed(self) -> str:
        """What it printed, errors included."""
        return self._log.read_text(errors="replace")


def _run(
    connection: Connection,
    parent: int,
    module: str,
    argv: list[str],
    log: Path,
    current: Path,
    clock: Any,
) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(current)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    if clock:
        real = time.time
        time.time, time.time_ns = (
            lambda: real() + clock.value,
            lambda: int((real() + clock.value) * 1e9),
        )
    main = importlib.import_module(module).main
    listener = install()
    send_handle(connection, listener, parent)
    os.close(listener)
    connection.recv()
    store.PATIENCE = 0  # states are saved at every opportunity, whatever the machine's speed
    status = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def clock() -> Any:
    """A number, `value`, that this process sets and commands read."""
    return multiprocessing.get_context("forkserver").Value("d", 0.0, lock=False)
