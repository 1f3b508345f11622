"""What programs are written for."""

import os
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import DotAlgorithmPreset, Precision

from jaxprune import hardware, load
from jaxprune.hardware import Hardware, current, writing_for
from jaxprune.methods import linalg
from jaxprune.pruning.gram_matrices import most_bytes
from jaxprune.pruning.placement import placement_of
from jaxprune.streaming import generation


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "8.0", DotAlgorithmPreset.BF16_BF16_F32_X6),
        ("gpu", "9.0", DotAlgorithmPreset.BF16_BF16_F32_X6),
        ("gpu", "10.3", DotAlgorithmPreset.BF16_BF16_F32_X6),
        ("gpu", "8.6", Precision.HIGHEST),
        ("gpu", "8.9", Precision.HIGHEST),
        ("gpu", "12.0", Precision.HIGHEST),
        ("gpu", "gfx942", Precision.HIGHEST),
        ("tpu", None, Precision.HIGHEST),
        ("cpu", None, Precision.HIGHEST),
    ],
)
def test_float32_is_multiplied_by_parts_where_that_is_faster(
    platform: str, capability: str | None, expected: object
) -> None:
    with writing_for(Hardware.of(types.SimpleNamespace(platform=platform, compute_capability=capability))):
        assert linalg.exact_products(jnp.float32) == expected
        assert linalg.exact_products(jnp.float64) == Precision.HIGHEST


def test_programs_are_written_for_this_machine_or_another() -> None:
    seen = []

    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        seen.append(current().platform)
        return x

    here = jax.local_devices()[0].platform
    for other in (None, Hardware("tpu"), Hardware("gpu", 9.0), Hardware("tpu")):
        with writing_for(other):
            function(jnp.float32(1))
    assert seen == [here, "tpu", "gpu"]  # the last one is there already


def test_six_products_of_parts_are_as_good_as_float32() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 300, 300)).astype(np.float32)

    def parts(x: np.ndarray) -> list[jax.Array]:
        found: list[jax.Array] = []
        for _ in range(3):
            found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
            x = x - found[-1]
        assert not np.asarray(x).any()  # three parts are all of a float32
        return found

    left, right = parts(a), parts(b)
    pairs = sorted(((i, j) for i in range(3) for j in range(3 - i)), key=sum, reverse=True)
    found = sum((linalg.matmul(left[i], right[j]) for i, j in pairs), jnp.zeros((), jnp.float32))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    errors = [
        np.linalg.norm(np.asarray(value) - exact) for value in (found, linalg.matmul(jnp.asarray(a), jnp.asarray(b)))
    ]
    assert errors[0] < 1.5 * errors[1]


def limit_memory(system: Path, monkeypatch: pytest.MonkeyPatch, groups: str, limits: dict[str, object]) -> None:
    """Has a process see control groups: /proc/self/cgroup, and the files that limit memory."""
    for path, content in {"proc/self/cgroup": groups, **limits}.items():
        (system / path).parent.mkdir(parents=True, exist_ok=True)
        (system / path).write_text(f"{content}\n" if content else "")
    monkeypatch.setattr(hardware, "SYSTEM", system)


RAM = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/a/b", {"sys/fs/cgroup/a/memory.max": 2**28, "sys/fs/cgroup/a/b/memory.max": "max"}, 2**28),
        ("0::/a/b", {"sys/fs/cgroup/a/memory.max": 2**29, "sys/fs/cgroup/a/b/memory.max": 2**28}, 2**28),
        ("0::/seen/from/outside", {"sys/fs/cgroup/memory.max": 2**28}, 2**28),
        ("3:memory:/a\n2:cpu:/a", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": 2**28}, 2**28),
        ("3:memory:/a", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": 2**63 - 4096}, RAM),
        ("3:cpu:/a", {"sys/fs/cgroup/cpu/a/memory.max": 1}, RAM),
        ("0::/a", {"sys/fs/cgroup/a/memory.max": "max"}, RAM),
        ("", {}, RAM),
    ],
)
def test_host_memory_is_what_control_groups_allow(
    groups: str, limits: dict[str, object], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(tmp_path, monkeypatch, groups, limits)
    assert hardware.host_memory() == expected
    assert hardware.cpu_bytes() == min(4e9, expected / 4)


def test_what_is_sized_by_memory_follows_a_limit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint)
    window = 4, 64
    prompts, most = [[1, 2, 3]] * 8, [4] * 8
    room = [generation._Layers(model).room]
    kept = [placement_of(model.architecture, window).results]
    grams = [most_bytes()]
    expected = generation.generate(model, prompts, most, lambda *_: False)
    limit_memory(tmp_path, monkeypatch, "0::/", {"sys/fs/cgroup/memory.max": 2**16})
    room.append(generation._Layers(model).room)
    kept.append(placement_of(model.architecture, window).results)
    grams.append(most_bytes())
    assert room[1] == 2**16 * 2 // 3 < room[0] and kept == [True, False] and grams[1] == 2**14 < grams[0]
    assert [*map(len, generation.in_batches(model, prompts, most, lambda *_: False))] == [1] * 8
    assert generation.generate(model, prompts, most, lambda *_: False) == expected
