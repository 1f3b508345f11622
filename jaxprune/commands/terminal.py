"""Output, progress bars and exit status, shared by all commands."""

import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from convert.cache import cache_folder, require_cache, warn_without_cache
from convert.command import USER_ERROR, one_line, run, terminate
from convert.errors import CheckpointError, UserError
from jaxprune.errors import InputError
from jaxprune.processes import control
from jaxprune.processes.collective import FirstProcessError
from jaxprune.sharding import Devices

CACHE_BYTES = 2**30
"""Maximum size of the compilation cache. The least recently used programs are evicted first."""
REASON_SECONDS = 5
"""How long a process with an unexpected error waits to learn that another process is the reason."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # in glibc's malloc.h


class _Console(Console):
    """A rich console that lets `convert.command` handle a closed output."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  rich calls this while it handles the error


console = _Console(highlight=False, soft_wrap=True, markup=False)


def command(
    run_line: Callable[[Sequence[str]], int | None],
    group_of: Callable[[Sequence[str]], control.Group | None] = lambda argv: None,
) -> Callable[..., int]:
    """Returns the `main` function of a command; see `convert.command`.

    It takes the arguments (default: those of this process) and returns the exit status. All
    processes of a run end together.

    Args:
        run_line: takes the arguments; returns the exit status, None for 0. It makes this process
            one of several by `choose_devices`.
        group_of: the arguments of a command that failed before it joined the processes of its run
            -> the processes that wait for this one.
    """

    def prepared(argv: Sequence[str]) -> int | None:
        keep_compilations()
        try:
            return run_line(argv)
        except UserError:
            raise
        except Exception as error:
            # If another process failed first, it ends this one during the wait.
            if control.is_joined():
                time.sleep(
                    4 * REASON_SECONDS if isinstance(error, FirstProcessError) else REASON_SECONDS
                )
            raise

    def main(argv: Sequence[str] | None = None) -> int:
        words = sys.argv[1:] if argv is None else argv
        keep_memory()
        # JAX's filter adds notes to errors, and users would see them.
        jax.config.update("jax_traceback_filtering", "off")
        status, text = run(prepared, words)
        if control.is_joined():
            # Status 1 without an error text is a result, such as "does not fit".
            control.leave(status if text else 0, text)
            if text:
                _exit(status)  # a normal exit would wait for the other processes
        elif text and (group := group_of(words)):
            control.refuse(group, status, text)
        return status

    return main


def end_with(failure: control.Failure) -> NoReturn:
    """Ends this process because another one of its run failed; `control.End`."""
    console.show_cursor()
    print(f"error: {one_line(str(failure))}", file=sys.stderr)
    _exit(USER_ERROR if failure.status is None else failure.status)


def _exit(status: int) -> NoReturn:
    """Ends this process at once, because its other threads cannot be stopped."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def keep_memory(*, large: bool = False) -> None:
    """Makes glibc reuse freed memory, in a single arena. Does nothing with other C libraries.

    On a CPU, XLA's programs allocate and free megabytes in every call. By default glibc returns
    much of that to the system, which clears every page again. The rest stays in arenas that cannot
    share memory. Threads create arenas when they allocate, so call this before JAX computes.

    Args:
        large: from now on, also reuse blocks of 32 MB and more, for phases that repeatedly allocate
            logits. Other phases return them, because large arrays of many sizes would fragment
            memory.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in (
            (M_ARENA_MAX, 1),
            (M_MMAP_THRESHOLD, 2**25),
            (M_TRIM_THRESHOLD, 2**31 - 1),
        ):
            libc.mallopt(parameter, value)
        if large:
            libc.mallopt(M_MMAP_MAX, 0)


def keep_compilations() -> None:
    """Caches compiled programs for later runs in the user's cache folder. Warns if it cannot.

    JAX_COMPILATION_CACHE_DIR selects another folder. JAX_ENABLE_COMPILATION_CACHE=false disables
    the cache.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    folder = jax.config.jax_compilation_cache_dir
    if "://" not in (folder or ""):  # such as gs://bucket/folder
        try:
            kept = require_cache(folder or cache_folder())
        except CheckpointError as error:
            warn_without_cache(str(error))
            jax.config.update("jax_enable_compilation_cache", False)
            return
    if folder is None:
        jax.config.update("jax_compilation_cache_dir", str(kept))
        # Only in our folder: a limit needs access records, which programs without one don't write.
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    # By default JAX caches only programs that take at least a second to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def choose_devices(
    device: str,
    count: int | None = None,
    meeting: tuple[control.Group, Mapping[str, Any]] | None = None,
) -> Devices:
    """Makes JAX use one kind of device, and returns the devices.

    Args:
        device: the kind: auto, cpu, gpu or tpu.
        count: the number of devices; None: all there are.
        meeting: the group of processes to join, and this process's request; see `control.join`.
            None: this process is the only one.

    Raises:
        InputError: there are no such devices, or too few, or the processes cannot connect.
    """
    if count:
        jax.config.update("jax_num_cpu_devices", count)
        count = None if meeting else count
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    if meeting:
        group, asked = meeting
        control.join(group, asked, end_with)
        # Replace JAX's handler, which only records the signal.
        signal.signal(signal.SIGTERM, terminate)
        console.quiet = group.number > 0
    try:
        jax.devices()
    # JAX reports a plugin that finds no hardware. For a plugin that is not installed, only an
    # assertion fails.
    except (RuntimeError, AssertionError) as error:
        kind = "device" if device == "auto" else device
        reason = next(
            iter(str(error).splitlines()),
            "install jaxprune[cuda] or jaxprune[tpu] on a machine with such a device",
        )
        raise InputError(f"JAX finds no {kind} ({reason})", options={"device": "cpu"}) from error
    return Devices.first(count)


def progress_bar() -> Progress:
    """Returns a progress bar. Each of its tasks counts a `unit`. The remaining time follows the
    pace of the last ten minutes, because a single layer can take minutes."""
    unit = TextColumn("{task.fields[unit]}", markup=False)
    # wraps on a narrow terminal
    what = TextColumn("{task.description}", markup=False, table_column=Column())
    counts = what, BarColumn(bar_width=10), MofNCompleteColumn(), unit
    times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    return Progress(*counts, *times, console=console, speed_estimate_period=600)


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Prints a table; without a header the first column names the rows."""
    table = Table(*header, show_header=bool(header))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def duration(seconds: float) -> str:
    """Writes seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
