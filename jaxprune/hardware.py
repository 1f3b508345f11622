"""The hardware that programs are written for: this process's, or another while a run is planned for
it."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax

HEADROOM = 0.92
"""Share of a device's memory that a program may use: the rest is fragmentation."""
CPU_BYTES = 4e9
"""The most memory on a CPU for data that can also be computed in parts."""
CPU_FRACTION = 1 / 3
"""The most of the host's memory for it. It is less than `CPU_BYTES` below 12 GB: machines with 16
GB, of which the system reserves some, get all of `CPU_BYTES`."""
PROC = Path("/proc/self")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A kind of device, as far as programs are written differently for it.

    Attributes:
        platform: cpu, gpu, tpu, or what else JAX calls it.
        capability: the compute capability of an NVIDIA GPU, such as 9.0; 0: it is none.
        cudnn: whether cuDNN is there to be called.
        stands_in: whether it is a CPU whose compiler stands in for that of a device that is
            elsewhere.
    """

    platform: str
    capability: float = 0.0
    cudnn: bool = False
    stands_in: bool = False

    @classmethod
    def of(cls, device: Any) -> "Hardware":
        """Returns that of one of JAX's devices; NVIDIA's come with cuDNN."""
        text = getattr(device, "compute_capability", None) or ""  # AMD's say gfx942 and the like
        capability = float(text) if text.replace(".", "").isdigit() else 0.0
        return cls(device.platform, capability, capability > 0)

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the host, in its memory."""
        return self.platform == "cpu"

    @property
    def float32_results(self) -> bool:
        """Whether products of 16-bit arrays have float32 results, rounded afterwards: XLA's CPU
        backend multiplies no others in 16 bits, which AMX and AVX-512 do several times as fast."""
        return self.on_cpu and not self.stands_in

    @property
    def tokens_per_batch(self) -> int:
        """Tokens on a device at a time. On a CPU, what fits its cache: four times as many take 1.2
        times as long a token."""
        return 1024 if self.on_cpu else 16384

    @property
    def cudnn_attention(self) -> bool:
        """Whether cuDNN's flash attention runs on it: from Ampere on."""
        return self.cudnn and self.capability >= 8

    @property
    def float32_products(self) -> jax.lax.Precision | jax.lax.DotAlgorithmPreset:
        """How float32 matrices are multiplied with float32's accuracy.

        By six products of bfloat16 parts on NVIDIA's data-centre GPUs (8.0, 9.0, 10.x), whose
        tensor cores are more than six times as fast as their float32 units; those of other cards
        are not. A TPU's highest precision is that.
        """
        by_parts = self.capability in (8.0, 9.0) or 10 <= self.capability < 11
        return (
            jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6 if by_parts else jax.lax.Precision.HIGHEST
        )


writing_for = jax.make_user_context()
"""`with writing_for(hardware):` programs are written for it; JAX traces them anew, whatever it has
traced before."""


def current() -> Hardware:
    """Returns the hardware that programs are written for; this process's first device where nothing
    else is said."""
    return writing_for.value or Hardware.of(jax.local_devices()[0])


def device_memory() -> int | None:
    """Returns the bytes of a device that JAX may use, whatever is in use: what is decided by it is
    decided alike when a run goes on. None where the device does not say, as of a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def host_memory() -> int:
    """Returns the bytes of the host's memory that this process may use: all of it, or less by its
    control groups.

    It does not depend on what is free, so that a resumed run decides alike.
    """
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])


def cpu_budget() -> float:
    """Returns the most bytes on a CPU for data that can also be computed in parts."""
    return min(CPU_BYTES, CPU_FRACTION * host_memory())


def _cgroup_limits() -> Iterator[int]:
    """Yields the limits in bytes of this process's control groups, of version 1 or 2, and of the
    groups above them."""
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
        # A container may see its own group as the root of the mount, and read the path outside of
        # it.
        inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
        for group in (inside, *inside.parents):
            limit = Path(folder) / group / file
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                yield int(text)
