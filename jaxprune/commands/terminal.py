"""What all command lines share: output, progress bars, exit status."""

import ctypes
import logging
import platform
import signal
from collections.abc import Callable, Iterable, Sequence

import jax
import platformdirs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from convert.command import run, terminate
from convert.errors import CheckpointError
from convert.wheels import require_cache
from jaxprune.errors import InputError
from jaxprune.sharding import Devices, is_first_process, join

CACHE_BYTES = 2**30
"""Of compiled programs; the longest unused go first."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # of glibc's malloc.h
console = Console(highlight=False, soft_wrap=True, markup=False)


def run_main(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None) -> int:
    """Runs a command line; returns the exit status, see `convert.command`."""
    keep_memory()

    def prepared(argv: Sequence[str]) -> int | None:
        keep_compilations()
        return command(argv)

    return run(prepared, argv)


def keep_memory(*, large: bool = False) -> None:
    """Has glibc keep freed memory, all of it in one arena, for what is allocated next; does nothing elsewhere.

    On a CPU, XLA's programs take and free megabytes in every call. By default glibc returns much of that to the system,
    which clears every page anew, and keeps the rest in arenas that cannot use each other's. Arenas are made as threads
    allocate, so this comes before JAX's first computation.

    Args:
        large: keep blocks of 32 MB and more too, from now on: for phases that take and free logits over and over.
            Elsewhere they are returned, for large arrays of many sizes would leave holes between them.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, value)
        if large:
            libc.mallopt(M_MMAP_MAX, 0)


def keep_compilations() -> None:
    """Keeps what XLA compiles in the user's cache folder, so that another run finds it; else says that it does not.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    folder = jax.config.jax_compilation_cache_dir
    if "://" not in (folder or ""):  # such as gs://bucket/folder
        try:
            kept = require_cache(folder or platformdirs.user_cache_dir("jaxprune"))
        except CheckpointError as error:
            logging.getLogger(__name__).warning("compiled programs are not kept: %s", error)
            jax.config.update("jax_enable_compilation_cache", False)
            return
    if folder is None:
        jax.config.update("jax_compilation_cache_dir", str(kept))
        # Not of a folder of the user's: a limit needs records that programs without one don't keep.
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    # By default only what takes a second to compile is kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


Join = tuple[str, int | None, int | None]
"""Arguments of `sharding.join`."""


def choose_devices(device: str, count: int | None = None, together: Join | None = None) -> Devices:
    """Makes JAX use one kind of device, and returns the devices.

    Args:
        device: the kind: auto, cpu, gpu or tpu.
        count: the number of devices; None: all there are.
        together: how to become one of several processes; None: this is the only one.

    Raises:
        InputError: there is none, or there are fewer.
    """
    if count:
        jax.config.update("jax_num_cpu_devices", count)
        count = None if together else count
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    if together:
        join(*together)
        signal.signal(signal.SIGTERM, terminate)  # JAX has put a handler of its own there, which only takes note
        console.quiet = not is_first_process()
    try:
        jax.devices()
    # Of a plugin that finds no hardware, JAX says so; of one that is not installed, only an assertion fails.
    except (RuntimeError, AssertionError) as error:
        kind = "device" if device == "auto" else device
        reason = next(iter(str(error).splitlines()), "it needs jaxprune[cuda] or jaxprune[tpu], and the hardware")
        raise InputError(f"JAX finds no {kind} ({reason})", options={"device": "cpu"}) from error
    return Devices.first(count)


def progress_bar() -> Progress:
    """Returns a progress bar, each of whose tasks has a `unit` that it counts. What is left is by the pace of the
    last ten minutes: a layer may take some of them."""
    unit = TextColumn("{task.fields[unit]}", markup=False)
    counts = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), unit
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
