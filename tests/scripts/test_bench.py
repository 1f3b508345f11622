"""The benchmark measures what it says, and the other ways that it compares with prune alike."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.methods.admm import ADMM
from jaxprune.sparsity.patterns import Unstructured
from tests.helpers import oracles
from tests.helpers.optional import needs_torch, torch

SCRIPTS = Path(__file__).parents[2] / "scripts/benchmarks"
sys.path.append(str(SCRIPTS))


def bench(*flags: object, cwd: Path) -> dict:
    command = [sys.executable, str(SCRIPTS), "programs", *map(str, flags), "--json", "figures.json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads((cwd / "figures.json").read_text()) | {"printed": done.stdout}


@needs_torch
@pytest.mark.parametrize(
    "name", sorted(file.stem for file in SCRIPTS.glob("*.py") if file.stem != "__main__")
)
def test_what_a_benchmark_imports_is_there(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.slow
def test_a_kernel_is_measured(tmp_path: Path) -> None:
    found = bench("--kernel", "64x32", "--repeat", 1, cwd=tmp_path)
    prepare, solve, mask = found["programs"]
    assert sum(solve["flops"].values()) == 20 * 2 * 64 * 64 * 32
    assert solve["seconds"] > solve["floor"] > 0
    assert mask["phase"] == "part" and mask["calls"] == 15
    total = next(one for one in found["totals"] if one["phase"] == "all")
    assert total["seconds"] == pytest.approx(prepare["seconds"] + solve["seconds"])


@pytest.mark.slow
def test_a_70b_layer_is_counted_without_running(tmp_path: Path) -> None:
    size = "--size llama2-70b --dtype bfloat16 --windows 8 --length 2048 --layers 1".split()
    found = bench(*size, "--count-only", cwd=tmp_path)
    peaks = {one["phase"]: one["peak"] for one in found["totals"]}
    assert peaks.keys() == {"gram", "solve", "forward", "part", "all"}
    assert 8 * 2**30 < peaks["all"] < 16 * 2**30
    assert "seconds" not in found["programs"][0]


@needs_torch
def test_the_pytorch_way_is_the_papers() -> None:
    from pytorch_way import admm

    generator = np.random.default_rng(0)
    x, weight = oracles.correlated(generator, 100, 24), generator.normal(size=(24, 10))
    gram = x.T @ x
    expected, _ = oracles.admm(
        gram,
        weight,
        "unstructured",
        0.6,
        schedule="constant",
        iterations=20,
        selections=15,
        damping=0.1,
        rho=1.0,
    )
    found = admm(torch.tensor(gram), torch.tensor(weight), 0.6)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    ours = ADMM(schedule="constant")
    solution = ours.solve(ours.prepare(jnp.asarray(gram)), jnp.asarray(weight), Unstructured(0.6))
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-9, atol=1e-12)


@needs_torch
@pytest.mark.slow
def test_other_ways_prune_alike(tmp_path: Path) -> None:
    size = "--size smollm2-135m --stored float32 --layers 1 --windows 1 --length 128".split()
    found = bench(*size, "--against", "torch", "op-by-op", "--repeat", 1, cwd=tmp_path)
    assert found["seconds"].keys() == {"jaxprune", "torch", "op-by-op"}
    rows = [
        line.split("|")
        for line in found["printed"].splitlines()
        if line.startswith(("| torch", "| op-by-op"))
    ]
    assert len(rows) == 2
    for row in rows:
        assert float(row[-3].strip(" %")) > 99
