"""What a run needs against what it had, and what is said where it does not fit."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxprune.commands.prune import main
from jaxprune.costs.flops import Flops
from jaxprune.errors import Change
from jaxprune.hardware import Hardware, writing_for
from jaxprune.phases import PHASES
from jaxprune.planning import estimate, fit_check
from jaxprune.planning.estimate import GIB, Need, PhaseNeed
from jaxprune.sharding import AXIS, Devices
from tests.helpers import tiny
from tests.helpers.command import jaxprune
from tests.helpers.plans import need_of, sizes_of

LLAMA2_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def test_a_70b_model_needs_no_weights_to_be_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_70B))
    options = [
        "--ckpt",
        tmp_path,
        *"--dry-run --dtype bfloat16 --out".split(),
        tmp_path / "out",
        "--eval",
        "none",
    ]
    options += ["--method", "wanda"]  # whose solve compiles in no time
    start = time.monotonic()
    run = sizes_of(*options, "--device-memory", 16)
    need = estimate.need(run)
    assert time.monotonic() - start < 120
    assert need.disk["the checkpoint"] == 2 * 68_976_648_192
    assert not [one for one in fit_check.shortages(need, run) if "on a device" in str(one)]
    short = list(fit_check.shortages(need, dataclasses.replace(run, device_bytes=12 * GIB)))
    told = re.compile(r"gram needs 13\.\d GiB on a device, of which 11.0 can be had")
    assert any(told.match(str(one)) and one.options == {"seqlen": Change.LOWER} for one in short)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_is_needed_grows_as_it_must(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "peak_bytes", lambda: {"host": 0})
    shared = ["--seqlen", 64, "--eval", "none", "--pattern", "2:4"]
    few, many = (need_of("--ckpt", checkpoint, "--nsamples", count, *shared) for count in (8, 16))
    state = 8 * 64 * 32 * 4
    assert many.phases["gram"].host - few.phases["gram"].host == state
    assert many.disk["hidden states"] == 2 * few.disk["hidden states"] == 4 * state
    assert many.phases["gram"].flops.total() == 2 * few.phases["gram"].flops.total()
    assert many.phases["solve"].flops == few.phases["solve"].flops
    best = need_of("--ckpt", checkpoint, "--nsamples", 8, *shared, "--preset", "best")
    assert best.phases.keys() == {"sensitivity", "gram", "solve", "forward", "tune"}
    assert best.phases["solve"].flops.total() == few.phases["solve"].flops.total()
    assert sum(best.disk.values()) > sum(few.disk.values())
    runs = [
        sizes_of(
            "--ckpt",
            checkpoint,
            "--nsamples",
            8,
            *shared,
            "--preset",
            "thorough",
            "--tune-tokens",
            tokens,
        )
        for tokens in ("128k", "256k")  # each with 16 measures
    ]
    short, long = map(estimate.need, runs)
    # the best so far
    assert short.disk["tuning"] - best.disk["tuning"] == 2 * runs[0].pruned_bytes
    assert long.disk == short.disk and [row.device for row in long.phases.values()] == [
        row.device for row in short.phases.values()
    ]
    assert long.phases["tune"].flops["float32"] == pytest.approx(
        2 * short.phases["tune"].flops["float32"], rel=0.1
    )


def test_the_time_is_by_the_rate_of_each_kind_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        estimate.this_machine, "matrix_rate", {"float32": 1e11, "bfloat16": 4e11}.__getitem__
    )
    flops = {
        "solve": Flops({"float32": 15 * 10**10}),
        "tune": Flops({"bfloat16": 18 * 10**11, "float32": 7 * 10**10}),
    }
    need = Need({phase: PhaseNeed(flops=one) for phase, one in flops.items()})
    assert estimate.seconds(need) == pytest.approx({"solve": 2, "tune": 11})
    several = Devices(Mesh(np.array(8 * jax.devices()[:1]), (AXIS,)))
    assert estimate.seconds(need, several) == estimate.seconds(need)  # eight parts of one CPU
    with writing_for(Hardware("gpu")):
        assert estimate.seconds(need, several) == pytest.approx({"solve": 0.25, "tune": 11 / 8})


def test_the_bound_is_above_the_compilers_count(checkpoint: Path) -> None:
    run = sizes_of("--ckpt", checkpoint, "--nsamples", 8, "--seqlen", 64, "--preset", "best")
    for phase in PHASES:
        if phase.wanted(run.recipe):
            for program in phase.costs(run).programs:
                assert program.peak_bytes() <= program.most_bytes(), program.name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "available_memory",
            2**20,
            "GiB of host memory, of which 0.0 are free: lower --nsamples, or lower --seqlen",
        ),
        ("free_disk", 2**10, "GiB of disk are needed, 0.0 are free there: choose another --out"),
    ],
)
def test_what_does_not_fit_is_said_before_the_work(
    name: str,
    value: int,
    message: str,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(fit_check, name, lambda *_: value)
    options = [
        "--ckpt",
        checkpoint,
        "--calib",
        text,
        *"--nsamples 4 --seqlen 32 --eval none".split(),
    ]
    argv = [*map(str, options), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*argv, "--unchecked"]) == 0
    assert (tmp_path / "out").exists()


def test_where_a_tuning_needs_too_much_only_what_would_be_enough_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sizes_of("--ckpt", checkpoint, "--nsamples", 8, "--seqlen", 64, "--tune-tokens", 16 * 64)
    need = Need({"tune": PhaseNeed(host=10 * GIB, states=2 * GIB)})
    monkeypatch.setattr(fit_check, "free_disk", lambda _: GIB)
    monkeypatch.setattr(fit_check, "best_step_bytes", lambda _: 4 * GIB)
    for free, options in (
        (9, ["tune_epochs", "hidden", "tune_tokens"]),
        (7, ["tune_epochs", "tune_tokens"]),
    ):
        monkeypatch.setattr(fit_check, "available_memory", lambda free=free: free * GIB)
        (short,) = fit_check.shortages(need, run)
        assert [*short.options] == options
        assert "10.0 GiB of host memory, of which" in str(
            short
        ) and "4.0 of them to keep the weights" in str(short)
    monkeypatch.setattr(fit_check, "available_memory", lambda: 5 * GIB)
    (short,) = fit_check.shortages(need, run)
    assert short.options == {"tune_tokens": 0} and "weights" not in str(short)


@pytest.mark.slow
def test_the_memory_of_a_run_is_foreseen(tmp_path: Path) -> None:
    """Host memory of a run that is more than the libraries' own, within a fifth."""
    size = {
        "hidden_size": 512,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
    }
    tiny.save(tmp_path / "dense", tiny.config(**size, max_position_embeddings=4096))
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 300, (192, 512), np.int32))
    options = "--ckpt dense --calib ids.npy --nsamples 192 --seqlen 512 --eval none".split()
    options += ["--method", "magnitude", "--out", "out"]
    foreseen = jaxprune(*options, "--dry-run", cwd=tmp_path)
    assert foreseen.returncode == 0, foreseen.stderr
    (row,) = [line for line in foreseen.stdout.splitlines() if "│ all" in line]
    command = [sys.executable, "-m", "jaxprune.run", *map(str, options)]
    subprocess.run(
        command,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    record = json.loads((tmp_path / "out/jaxprune.json").read_text())
    gib = record["peak_bytes"]["host"] / 2**30
    assert 0.8 * gib < float(row.split("│")[3]) < 1.25 * gib
