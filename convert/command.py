"""What all command lines share: one line and exit status 2 for an error of the user's, a traceback
for one of ours."""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeGuard

from convert.errors import Change, DamagedError, NoRoomError, UserError

USER_ERROR, DEFECT, STOPPED, UNREAD = 2, 70, 130, 141
"""Exit statuses beside 0 and 1; 1 says "not verified" or "does not fit". `UNREAD`: the output was
closed, as the shell says of a program that SIGPIPE ends."""
MOST = 2000
"""Characters of an error's line."""


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> tuple[int, str]:
    """Runs a command line; returns its exit status, and the error's line, "" where there is none.

    Args:
        command: takes the arguments; returns the exit status, None for 0.
        argv: the arguments.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _quiet_libraries()
    before = signal.signal(signal.SIGTERM, terminate)
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stopped_for_sure(), shown_warnings(), flushed():
            return command(argv) or 0, ""
    except UserError as error:
        _print_notes(error)
        text = worded(error)
        print(f"error: {text}", file=sys.stderr)
        return USER_ERROR, text
    except KeyboardInterrupt as error:
        _print_notes(error)
        print("stopped", file=sys.stderr)
        return STOPPED, "it was stopped"
    except Exception as error:
        if is_of_output(error):
            return end_output(error)
        traceback.print_exc()
        print(
            "this is a defect of jaxprune, and nothing that you did: please report it, with the "
            "lines above and the command",
            file=sys.stderr,
        )
        return DEFECT, f"a defect of jaxprune ({one_line(repr(error))}), see its output"
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Writes in the end what was printed; raises OSError where that is not possible."""
    try:
        yield
    finally:
        sys.stdout.flush()


def is_of_output(error: BaseException) -> TypeGuard[OSError]:
    """Returns whether an error says that what was printed cannot be written; the system's errors
    of files are worded where they occur."""
    lost = errno.EPIPE, errno.ENOSPC, errno.EIO
    return isinstance(error, OSError) and error.filename is None and error.errno in lost


def end_output(error: OSError) -> tuple[int, str]:
    """Lets nothing more be printed on stdout; returns the exit status, and the error's line."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    if error.errno == errno.EPIPE:
        return UNREAD, "nobody reads its output"
    text = f"the output cannot be written ({error.strerror})"
    print(f"error: {text}", file=sys.stderr)
    return USER_ERROR, text


def _print_notes(error: BaseException) -> None:
    """Prints what was added to an error on its way, such as where finished work is kept."""
    for note in getattr(error, "__notes__", ()):
        print(one_line(note), file=sys.stderr)


def terminate(*_: object) -> NoReturn:
    """Stops a command as Ctrl-C does; a signal's handler."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def stopped_for_sure() -> Iterator[None]:
    """Stops a command again where Python ignores that it is to stop: a signal may arrive while a
    finalizer or the garbage collector's callback runs."""
    before = sys.unraisablehook

    def again(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, signal.raise_signal, [signal.SIGTERM]).start()
        else:
            before(ignored)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


def worded(error: UserError) -> str:
    """Returns the error and what to do about it, on one line, without characters that could move a
    terminal's cursor."""
    text = str(error)
    remedies = [_remedy(name, value) for name, value in error.options.items()]
    if isinstance(error, DamagedError):
        remedies.append("fetch or make it again")
    if isinstance(error, NoRoomError):
        remedies.append("free some space, then run the same command again")
    if remedies:
        text += ": " + ", or ".join(remedies)
    return one_line(text)


def one_line(text: str) -> str:
    """Returns text of any content on one line, without characters that could move a terminal's
    cursor."""
    text = re.sub(r":\s*\n\s*", ": ", text)
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    line = line if len(line) <= MOST else f"{line[: MOST - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class _Handler(logging.Handler):
    """Prints the library's warnings as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"warning: {one_line(record.getMessage())}", file=sys.stderr)


@contextlib.contextmanager
def shown_warnings() -> Iterator[None]:
    """Shows what the loggers `convert` and `jaxprune` warn of, once: libraries give the root logger
    handlers too."""
    handler = _Handler(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("convert", "jaxprune")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True


def _quiet_libraries() -> None:
    """Keeps the advice, progress bars and logs of other libraries out of our own output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    # Of a damaged pytree Orbax leaves work undone beside the error.
    warnings.filterwarnings(
        "ignore", r"coroutine '\w*TypeHandler\.\w+' was never awaited", RuntimeWarning
    )
    # What goes wrong in them ends in an error of ours; asyncio tells of Orbax's tasks beside the
    # one that failed first.
    for name in ("absl", "asyncio", "huggingface_hub", "lm_eval", "matplotlib"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


class _Unraisable:
    """A hook that passes over what tensorstore's threads say when Orbax's event loop is closed
    after a failed read.

    Args:
        before: the hook for everything else.
    """

    def __init__(self, before: Callable[[Any], object]) -> None:
        self._before = before

    def __call__(self, found: Any) -> None:
        if not (
            isinstance(found.exc_value, RuntimeError)
            and str(found.exc_value) == "Event loop is closed"
        ):
            self._before(found)


def _remedy(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is Change.OMIT:
        return f"leave {flag} out"
    if isinstance(value, Change):
        return f"{value.value} {flag}"
    return f"pass {flag}" + (f" {value}" if value is not True else "")
