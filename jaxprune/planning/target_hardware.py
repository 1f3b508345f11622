"""Hardware that is not here, and its compilers: what a run would need and take there.

The compilers come with `jaxprune[plan-gpu]` and `jaxprune[plan-tpu]`, and need no driver and no
device. Numbers are those of the data sheets: NVIDIA's H100 (SXM), A100 (80 GB, SXM) and GeForce RTX
4090, Google Cloud's TPU v5e, v5p and v6e. Rates are of dense products, whose sums are float32.
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from jaxprune.costs.flops import BF16X6
from jaxprune.errors import Change, InputError
from jaxprune.hardware import Hardware
from jaxprune.sharding import AXIS, Devices

GB, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        display_name: its name.
        hardware: what programs are written for.
        memory: bytes.
        bandwidth: bytes a second between its memory and its compute units.
        link: bytes a second between it and its host, each way.
        network: bytes a second from it to other devices of its host or slice.
        rates: kind of products, see `flops.Flops` -> FLOP/s.
        describe: a number of devices -> devices to compile for.
        extra: the extra that brings its compiler, and the module that this is in.
        options: of the compiler.
    """

    display_name: str
    hardware: Hardware
    memory: float
    bandwidth: float
    link: float
    network: float
    rates: Mapping[str, float]
    describe: Callable[[int], list[Any]]
    extra: tuple[str, str]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def usable(self) -> float:
        """The bytes of its memory that JAX takes: three quarters of a GPU's, unless its environment
        says otherwise."""
        share = (
            os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
            if self.hardware.platform == "gpu"
            else 1
        )
        try:
            return self.memory * float(share)
        except ValueError as error:
            raise InputError(
                f"XLA_PYTHON_CLIENT_MEM_FRACTION is {share!r}, not a number"
            ) from error

    @property
    def install(self) -> str:
        """The command that installs its compiler."""
        return f"pip install 'jaxprune[{self.extra[0]}]'"

    @property
    def has_compiler(self) -> bool:
        """Whether its compiler is installed."""
        return _is_installed(self.extra[1])

    def devices(self, count: int) -> Devices:
        """Returns so many of them as a run uses them, to compile for.

        Raises:
            InputError: there is no host with so many.
        """
        with _environment(self):
            found = self.describe(count)
        if count == 1:
            return Devices(device=found[0])
        return Devices(Mesh(np.array(found), (AXIS,), axis_types=(AxisType.Auto,)))

    def seconds(self, flops: Mapping[str, float], traffic: float, exchanged: float = 0.0) -> float:
        """Returns the time of a program at full rates: that of its products, of what it moves, or
        of what it sends to other devices, whichever is longest."""
        products = sum(
            count / self.rates.get(dtype, self.rates["float32"]) for dtype, count in flops.items()
        )
        return max(products, traffic / self.bandwidth, exchanged / self.network)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Compiles without JAX's cache of compiled programs: programs for devices that are not here
    cannot be read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _environment(target: Target) -> Iterator[None]:
    """Tells libtpu not to look for a machine with TPUs."""
    if target.hardware.platform != "tpu":
        yield
        return
    names = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    names |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # no device is touched
    names["TPU_ACCELERATOR_TYPE"] = "v5litepod-8"  # whichever: it is the topology that counts
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _gpu_description(display_name: str, card: Mapping[str, Any]) -> str:
    """Returns what XLA's compiler for CUDA wants to know of a card."""
    major, minor = card["capability"].split(".")
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          threads_per_core_limit: {card["threads"]}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {(card["shared"] - 1) * 1024}
          shared_memory_per_core: {card["shared"] * 1024}
          registers_per_block_limit: 65536
          registers_per_core_limit: 65536
          core_count: {card["cores"]}
          fpus_per_core: {card["fpus"]}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {int(card["bandwidth"])}
          device_memory_size: {int(card["memory"])}
          l2_cache_size: {card["cache"] * 2**20}
          clock_rate_ghz: {card["clock"]}
          cuda_compute_capability {{ major: {major} minor: {minor} {card.get("feature", "")} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        runtime_version {{ major: 12 minor: 9 patch: 0 }}
        device_description_str: "{display_name}"
    """


def _gpu(name: str, display_name: str, **card: Any) -> Target:
    """Describes one of NVIDIA's GPUs: `card` has the rest of `Target`, and what the compiler wants
    to know."""
    compiler, description = "jax_cuda12_plugin", _gpu_description(display_name, card)

    def describe(count: int) -> list[Any]:
        return list(
            topologies.get_topology_desc(
                platform="cuda",
                topology_name=name,
                target_config=description,
                topology=f"1x1x{count}",
            ).devices
        )

    return Target(
        display_name,
        Hardware(
            "gpu",
            float(card["capability"]),
            cudnn=_is_installed(compiler) and _is_installed("nvidia.cudnn"),
        ),
        card["memory"],
        card["bandwidth"],
        card["link"],
        card["network"],
        card["rates"],
        describe,
        ("plan-gpu", compiler),
        {"xla_gpu_autotune_level": "0"},
    )


def _tpu(generation: str, display_name: str, shapes: Mapping[int, str], **chip: float) -> Target:
    """Describes one of Google's TPUs; float32 products take six of bfloat16."""

    def describe(count: int) -> list[Any]:
        if count not in shapes:
            known = ", ".join(map(str, shapes))
            raise InputError(
                f"{display_name} is described in {known}, not {count}",
                options={"devices": Change.OTHER},
            )
        one = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
        name = f"{generation}:{shapes[count]}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **one).devices)

    rates = {"bfloat16": chip["rate"], "float16": chip["rate"], "float32": chip["rate"] / 6}
    return Target(
        display_name,
        Hardware("tpu"),
        chip["memory"],
        chip["bandwidth"],
        chip["link"],
        chip["network"],
        rates,
        describe,
        ("plan-tpu", "libtpu"),
    )


def _rates(half: float, single: float) -> dict[str, float]:
    return {
        "bfloat16": half * TERA,
        "float16": half * TERA,
        "float32": single * TERA,
        BF16X6: half * TERA / 6,
    }


FLAT, CUBE = {1: "1x1", 4: "2x2", 8: "2x4"}, {1: "1x1x1", 4: "2x2x1", 8: "2x2x2"}
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "h100": _gpu(
            "h100",
            "NVIDIA H100 80GB HBM3",
            memory=80 * GB,
            bandwidth=3.35 * TERA,
            link=64 * GB,
            network=450 * GB,
            rates=_rates(989.4, 66.9),
            threads=2048,
            shared=228,
            cores=132,
            fpus=128,
            cache=50,
            clock=1.98,
            capability="9.0",
            feature="feature_extension: ACCELERATED_FEATURES",
        ),
        "a100": _gpu(
            "a100",
            "NVIDIA A100-SXM4-80GB",
            memory=80 * GB,
            bandwidth=2.039 * TERA,
            link=32 * GB,
            network=300 * GB,
            rates=_rates(312, 19.5),
            threads=2048,
            shared=164,
            cores=108,
            fpus=64,
            cache=40,
            clock=1.41,
            capability="8.0",
        ),
        "rtx4090": _gpu(
            "rtx4090",
            "NVIDIA GeForce RTX 4090",
            memory=24 * GB,
            bandwidth=1.008 * TERA,
            link=32 * GB,
            network=32 * GB,
            rates=_rates(165.2, 82.6),
            threads=1536,
            shared=100,
            cores=128,
            fpus=128,
            cache=72,
            clock=2.52,
            capability="8.9",
        ),
        "v5e": _tpu(
            "v5e",
            "TPU v5e",
            FLAT,
            memory=16 * GB,
            bandwidth=0.819 * TERA,
            link=32 * GB,
            network=200 * GB,
            rate=197 * TERA,
        ),
        "v5p": _tpu(
            "v5p",
            "TPU v5p",
            CUBE,
            memory=95 * GB,
            bandwidth=2.765 * TERA,
            link=32 * GB,
            network=600 * GB,
            rate=459 * TERA,
        ),
        "v6e": _tpu(
            "v6e",
            "TPU v6e",
            FLAT,
            memory=32 * GB,
            bandwidth=1.64 * TERA,
            link=32 * GB,
            network=448 * GB,
            rate=918 * TERA,
        ),
    }
)
"""Name -> hardware that can be planned for. Of TPUs' hosts the link is assumed: no data sheet names
it."""


def target_of(name: str) -> Target:
    """Returns a target.

    Raises:
        InputError: there is none of this name.
    """
    if name not in TARGETS:
        raise InputError(f"no hardware is called {name!r}: {', '.join(TARGETS)} are known")
    return TARGETS[name]
