"""What it costs to keep hidden states on a disk, and that a run then fits a fraction of their size.

The same command line runs with --hidden memory, and with --hidden disk where its memory is limited
to a quarter of what the hidden states take: by a cgroup (which takes root), page cache included.
Both checkpoints must be equal.

    python scripts/benchmarks hidden_states --allowance 1.5
    python scripts/benchmarks hidden_states --allowance 0.5 --processes 1 2 4

With --processes runs of several processes instead, of one device each: what the largest takes
beyond a run of as many processes on a handful of windows, whose hidden states take nothing.
"""

import argparse
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sizes import Size, write_checkpoint

SIZE = Size(256, 64, 2, 4, 1, vocabulary=1000)
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--allowance",
        type=float,
        default=1.5,
        help="GiB of memory; the states take four times as many",
    )
    parser.add_argument(
        "--scratch", help="a folder on the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--options", default="", help="more options of the runs, as one string")
    parser.add_argument(
        "--processes", type=int, nargs="+", help="so many processes, which share the hidden states"
    )
    args = parser.parse_args()
    windows = int(4 * args.allowance * 2**30 / (LENGTH * SIZE.width * 4))
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        write_checkpoint(folder / "dense", SIZE)
        np.save(
            folder / "ids.npy",
            np.random.default_rng(0).integers(0, 1000, (windows, LENGTH), np.int32),
        )
        line = [
            "--ckpt",
            "dense",
            "--calib",
            "ids.npy",
            "--nsamples",
            windows,
            "--seqlen",
            LENGTH,
            "--eval",
            "none",
        ]
        line += args.options.split()
        print(
            f"{windows} windows of {LENGTH} tokens, width {SIZE.width}: states of "
            f"{4 * args.allowance:.2f} GiB"
        )
        if args.processes:
            print("| processes | peak resident of the largest, GiB | beyond that of few windows |")
            print("|---|---|---|")
            few = [
                few if option == windows else option
                for option in line
                for few in (4 * max(args.processes),)
            ]
            for count in args.processes:
                all_of_them, least = (processes(folder, options, count) for options in (line, few))
                print(f"| {count} | {all_of_them:.2f} | {all_of_them - least:.2f} |", flush=True)
            return
        print("| hidden | allowed, GiB | seconds | peak resident, GiB | peak of the cgroup, GiB |")
        print("|---|---|---|---|---|")
        found = set()
        for hidden, allowed in (("memory", None), ("disk", args.allowance)):
            seconds, peak, charged = run(folder, [*line, "--hidden", hidden], allowed)
            print(
                f"| {hidden} | {allowed or 'all'} | {seconds:.1f} | {peak:.2f} | {charged} |",
                flush=True,
            )
            found.add(hashlib.sha256((folder / "out/model.safetensors").read_bytes()).digest())
        assert len(found) == 1, "the checkpoints differ"


def run(folder: Path, line: list[object], allowed: float | None) -> tuple[float, float, str]:
    """Seconds, peak resident memory in GiB, and what the cgroup counted."""
    with limited(allowed) as group:
        command = [
            sys.executable,
            "-m",
            "jaxprune.run",
            *map(str, line),
            "--out",
            "out",
            "--overwrite",
        ]
        start = time.perf_counter()
        subprocess.run(
            command,
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            preexec_fn=group and group.join,
        )
        seconds = time.perf_counter() - start
        record = json.loads((folder / "out/jaxprune.json").read_text())
        return seconds, record["peak_bytes"]["host"] / 2**30, group.peak() if group else ""


def processes(folder: Path, line: list[object], count: int) -> float:
    """Runs so many processes; returns the peak resident memory of the largest, in GiB."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jaxprune.run",
        *map(str, line),
        "--out",
        "out",
        "--overwrite",
        "--device",
        "cpu",
    ]
    if count > 1:
        command += ["--coordinator", f"localhost:{port}", "--processes", str(count)]
    numbers = [["--process-id", str(number)] if count > 1 else [] for number in range(count)]
    every = [
        subprocess.Popen([*command, *own], cwd=folder, stdout=subprocess.DEVNULL) for own in numbers
    ]
    ended = [os.wait4(process.pid, 0) for process in every]
    if any(status for _, status, _ in ended):
        raise RuntimeError("a process failed")
    return max(usage.ru_maxrss for _, _, usage in ended) / 2**20


class Group:
    """A cgroup, of version 1 or 2."""

    def __init__(self, folder: Path, limit: str, peak: str) -> None:
        self.folder, self._limit, self._peak = folder, limit, peak

    def allow(self, size: int) -> None:
        (self.folder / self._limit).write_text(str(size))

    def join(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> str:
        return f"{int((self.folder / self._peak).read_text()) / 2**30:.2f}"


@contextlib.contextmanager
def limited(allowed: float | None) -> Iterator[Group | None]:
    if allowed is None:
        yield None
        return
    root, name = Path("/sys/fs/cgroup"), f"jaxprune-{os.getpid()}"
    if (root / "memory").exists():
        group = Group(root / "memory" / name, "memory.limit_in_bytes", "memory.max_usage_in_bytes")
    else:
        group = Group(root / name, "memory.max", "memory.peak")
    group.folder.mkdir()
    try:
        group.allow(int(allowed * 2**30))
        yield group
    finally:
        group.folder.rmdir()
