"""The hardware that programs are written for: this process's, or the target of a plan."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax

HEADROOM = 0.92
"""Fraction of a device's memory that a program may use; the rest is lost to fragmentation."""
CPU_BYTES = 4e9
"""Maximum bytes on a CPU for data that can also be computed in parts."""
CPU_FRACTION = 1 / 3
"""Maximum fraction of the host's memory for such data. It is less than `CPU_BYTES` below 12 GB, so
machines with 16 GB, some of it reserved by the system, get all of `CPU_BYTES`."""
PROC = Path("/proc/self")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The properties of a device that change how programs are written.

    Attributes:
        platform: JAX's name for it: cpu, gpu, tpu or another.
        capability: the compute capability of an NVIDIA GPU, such as 9.0; 0 for other devices.
        cudnn: whether cuDNN is available.
        stands_in: whether it is a CPU whose compiler substitutes for that of an absent device.
    """

    platform: str
    capability: float = 0.0
    cudnn: bool = False
    stands_in: bool = False

    @classmethod
    def of(cls, device: Any) -> "Hardware":
        """Returns the hardware of one of JAX's devices; NVIDIA's devices have cuDNN."""
        text = getattr(device, "compute_capability", None) or ""  # AMD's say gfx942 and the like
        capability = float(text) if text.replace(".", "").isdigit() else 0.0
        return cls(device.platform, capability, capability > 0)

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the host, in the host's memory."""
        return self.platform == "cpu"

    @property
    def float32_results(self) -> bool:
        """Whether products of 16-bit arrays have float32 results that are rounded afterwards. XLA's
        CPU backend multiplies only such products in 16 bits, which AMX and AVX-512 do several times
        faster."""
        return self.on_cpu and not self.stands_in

    @property
    def tokens_per_batch(self) -> int:
        """Tokens on a device at a time. On a CPU, a batch that fits its cache: four times as many
        tokens take 1.2 times as long per token."""
        return 1024 if self.on_cpu else 16384

    @property
    def cudnn_attention(self) -> bool:
        """Whether it runs cuDNN's flash attention, which needs Ampere or later."""
        return self.cudnn and self.capability >= 8

    @property
    def float32_products(self) -> jax.lax.Precision | jax.lax.DotAlgorithmPreset:
        """The precision that multiplies float32 matrices with float32 accuracy.

        On NVIDIA's data-centre GPUs (8.0, 9.0, 10.x) it is six products of bfloat16 parts: their
        tensor cores are more than six times as fast as their float32 units, those of other cards
        are not. The highest precision of a TPU does the same.
        """
        by_parts = self.capability in (8.0, 9.0) or 10 <= self.capability < 11
        return (
            jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6 if by_parts else jax.lax.Precision.HIGHEST
        )


writing_for = jax.make_user_context()
"""`with writing_for(hardware):` writes programs for other hardware; JAX traces them again, even if
it has traced them before."""


def current() -> Hardware:
    """Returns the hardware that programs are written for, by default this process's first
    device."""
    return writing_for.value or Hardware.of(jax.local_devices()[0])


def device_memory() -> int | None:
    """Returns the bytes of a device that JAX may use, or None if the device does not report them,
    as on a CPU.

    It does not depend on the memory in use, so a resumed run makes the same decisions.
    """
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def host_memory() -> int:
    """Returns the bytes of the host's memory that this process may use: all, or the limit of its
    control groups.

    It does not depend on the memory in use, so a resumed run makes the same decisions.
    """
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])


def cpu_budget() -> float:
    """Returns the maximum bytes on a CPU for data that can also be computed in parts."""
    return min(CPU_BYTES, CPU_FRACTION * host_memory())


def _cgroup_limits() -> Iterator[int]:
    """Yields the limits in bytes of this process's control groups (version 1 or 2) and their
    parents."""
    groups, mounts = PROC / "cgroup", PROC / "mountinfo"
    if not (groups.exists() and mounts.exists()):  # macOS has none
        return
    paths = dict(line.split(":", 2)[1:] for line in groups.read_text().splitlines())
    paths |= {name: path for names, path in paths.items() for name in names.split(",")}
    for line in mounts.read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        root, folder = mount.split()[3:5]
        kind, *_, options = filesystem.split()
        if kind == "cgroup2":
            controller, file = "", "memory.max"
        elif kind == "cgroup" and "memory" in options.split(","):
            controller, file = "memory", "memory.limit_in_bytes"
        else:
            continue
        path = PurePosixPath(paths.get(controller, "/"))
        # A container may see its own group as the root of the mount, but read the path that it has
        # outside the container.
        inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        for group in (inside, *inside.parents):
            limit = Path(folder) / group / file
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                yield int(text)
