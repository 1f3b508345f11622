"""Command lines in processes of their own, and functions that fail or die when they are told to."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxprune import InputError
from tests.helpers import xla

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "ctypes.dlsym"}
"""Audit events of file operations."""


def jaxprune(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a command line of `python -m jaxprune.run`."""
    command = [sys.executable, "-m", "jaxprune.run", *map(str, args)]
    environment = os.environ | xla.quick() | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def failing(function: Callable, number: int) -> Callable:
    """The function, whose call of that number fails."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise InputError("stopped here")
        return function(*args, **options)

    return call


def killed(action: Callable[[], None], number: int) -> bool:
    """Runs an action in a child process, which dies right before its file operation of that number;
    whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, _: object) -> None:
            nonlocal count
            if event not in EVENTS:
                return
            count += 1
            if count > number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def free_port() -> int:
    """A port that nothing listens at, and neither at the one after it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("localhost", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                other.bind(("localhost", port + 1))
                return port


def changed(argv: Sequence[Any], *options: Any) -> list[Any]:
    """A command line with other values of flags that it has, or has not."""
    found = [*argv]
    for flag, value in zip(options[::2], options[1::2], strict=True):
        if flag in found:
            found[found.index(flag) + 1] = value
        else:
            found += [flag, value]
    return found
