"""What programs are written for."""

import os
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import DotAlgorithmPreset, Precision

from jaxprune import hardware
from jaxprune.hardware import Hardware, cpu_budget, current, host_memory, writing_for
from jaxprune.methods import linalg
from jaxprune.planning.this_machine import available_memory
from tests.helpers import cgroups


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
    with writing_for(
        Hardware.of(types.SimpleNamespace(platform=platform, compute_capability=capability))
    ):
        assert linalg.exact_products(jnp.float32) == expected
        assert linalg.exact_products(jnp.float64) == Precision.HIGHEST


def test_programs_are_written_for_this_machine_or_another() -> None:
    seen = []

    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        seen.append(current().platform)
        return x

    here = jax.local_devices()[0].platform
    for target in (None, Hardware("tpu"), Hardware("gpu", 9.0), Hardware("tpu")):
        with writing_for(target):
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
        np.linalg.norm(np.asarray(value) - exact)
        for value in (found, linalg.matmul(jnp.asarray(a), jnp.asarray(b)))
    ]
    assert errors[0] < 1.5 * errors[1]


RAM = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
NONE = {1: 9223372036854771712, 2: "max"}
MIB = 2**20


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limits", "path", "root", "expected"),
    [
        ({"": None, "a": None}, "/a", "/", RAM),
        ({"a": 9 * MIB}, "/a", "/", 9 * MIB),
        ({"a": 9 * MIB, "a/b": 7 * MIB}, "/a/b", "/", 7 * MIB),
        ({"a": 9 * MIB, "a/b": None, "a/b/c": 11 * MIB}, "/a/b/c", "/", 9 * MIB),
        ({"a": 9 * MIB, "other": 7 * MIB, "a/b": 5 * MIB}, "/a", "/", 9 * MIB),
        # A container: it sees its own group as the root, and the path as it is outside, inside, or
        # below another root.
        ({"": 9 * MIB}, "/docker/123", "/docker/123", 9 * MIB),
        ({"": 9 * MIB}, "/", "/docker/123", 9 * MIB),
        ({"": 9 * MIB, "c": 7 * MIB}, "/pods/p/c", "/pods/p", 7 * MIB),
        ({"": 9 * MIB}, "/../../123", "/docker/123", 9 * MIB),
        ({"": RAM + MIB}, "/", "/", RAM),
    ],
)
def test_memory_is_what_control_groups_allow(
    limits: dict,
    path: str,
    root: str,
    expected: int,
    version: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {group: NONE[version] if limit is None else limit for group, limit in limits.items()}
    cgroups.fake(tmp_path, monkeypatch, version, known, path, root)
    assert host_memory() == expected
    assert available_memory() <= expected


def test_memory_is_all_there_is_where_there_are_no_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "PROC", tmp_path)  # as on macOS
    assert host_memory() == RAM


@pytest.mark.parametrize(("gigabytes", "expected"), [(24, 4e9), (16, 4e9), (12.5, 4e9), (6, 2e9)])
def test_a_cpu_with_little_memory_has_a_smaller_budget(
    gigabytes: float, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sysconf(name: str) -> Any:
        return {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": int(gigabytes * 1e6)}[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(hardware, "PROC", tmp_path)
    assert cpu_budget() == expected
