"""Control groups that limit memory, as a process sees them, in a folder."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from jaxprune import hardware

FILES = {1: "memory.limit_in_bytes", 2: "memory.max"}


def fake(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    limits: Mapping[str, object],
    path: str,
    root: str = "/",
) -> None:
    """Has this process see control groups.

    Args:
        folder: an empty folder for them.
        monkeypatch: changes where they are looked for.
        version: theirs.
        limits: group, below the mount -> its limit in bytes, or "max".
        path: the process's group.
        root: the group that is mounted.
    """
    mounted = folder / "sys" / ("memory" if version == 1 else "unified")
    for group, limit in limits.items():
        (mounted / group).mkdir(parents=True, exist_ok=True)
        (mounted / group / FILES[version]).write_text(f"{limit}\n")
    proc = folder / "proc"
    proc.mkdir()
    memory = (
        f"4:hugetlb,memory:{path}\n3:cpu,cpuacct:/other\n0::/" if version == 1 else f"0::{path}"
    )
    (proc / "cgroup").write_text(f"{memory}\n")
    kind = "cgroup cgroup rw,hugetlb,memory" if version == 1 else "cgroup2 cgroup2 rw"
    (proc / "mountinfo").write_text(
        "23 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        f"32 31 0:29 / {folder}/sys/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
        f"35 31 0:32 {root} {mounted} rw,relatime shared:5 master:2 - {kind}\n"
    )
    monkeypatch.setattr(hardware, "PROC", proc)


def limit(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Has a container limit this process's memory to so many bytes."""
    fake(folder, monkeypatch, 2, {"": size}, "/")
