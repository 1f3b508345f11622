"""What machine this is: its devices, its memory, and how fast it multiplies matrices."""

import functools
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.lax import DotAlgorithmPreset

from jaxprune import hardware
from jaxprune.costs.flops import BF16X6
from jaxprune.models.common.matmul import product


def describe_hardware() -> str:
    """Describes the devices in words."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} {'core' if cores == 1 else 'cores'} of "
        f"{models[0] if models else platform.machine()}"
    )


def peak_bytes() -> dict[str, int]:
    """Returns the peak memory of this process, and of each kind of device that keeps count."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for device in jax.local_devices():
        if used := (device.memory_stats() or {}).get("peak_bytes_in_use"):
            peaks[device.platform] = max(used, peaks.get(device.platform, 0))
    return peaks


def available_memory() -> int:
    """Returns the bytes of the host's memory that this process may have now, with what it has."""
    most, info = hardware.host_memory(), Path("/proc/meminfo")
    if not info.exists():
        return most
    found = dict(line.split(":") for line in info.read_text().splitlines())
    return min(most, int(found["MemAvailable"].split()[0]) * 1024 + peak_bytes()["host"])


def square_product(kind: str) -> tuple[Callable[[jax.Array, jax.Array], jax.Array], jax.Array]:
    """Returns a compiled product of a kind, see `flops.Flops`, and an operand large enough for
    this device's rate."""
    size = 2048 if hardware.current().on_cpu else 8192
    precision = DotAlgorithmPreset.BF16_BF16_F32_X6.name if kind == BF16X6 else "highest"

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(precision):
            return product("an,nm->am", a, b)  # as models multiply

    return jax.jit(multiply), jnp.ones((size, size), jnp.float32 if kind == BF16X6 else kind)


@functools.cache
def matrix_rate(kind: str) -> float:
    """Measures the FLOP/s of this device in square products of a kind, once; see
    `flops.Flops`."""
    product, x = square_product(kind)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * len(x) ** 3 / min(seconds)
