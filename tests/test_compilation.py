"""What runs compile: each program once, and nothing where an earlier run's programs are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxprune import load
from jaxprune.commands import recipe_options
from jaxprune.commands.progress import timing_table
from jaxprune.commands.terminal import keep_compilations
from jaxprune.planning.jit_versus_eager import jit_versus_eager
from tests.helpers import xla
from tests.helpers.shapes import windows

COUNTED = """
import json, sys
import jax
from jaxprune.run import main

counts = {"cache_hits": 0, "cache_misses": 0}

def count(name, **_):
    which = name.rpartition("/")[2]
    if which in counts:
        counts[which] += 1

jax.monitoring.register_event_listener(count)
status = main(sys.argv[1:])
print(json.dumps(counts))
sys.exit(status)
"""


@pytest.mark.slow
def test_a_second_run_compiles_nothing(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    flags = [
        "--ckpt",
        checkpoint,
        "--calib",
        text,
        *"--nsamples 2 --seqlen 32 --eval none --out out".split(),
    ]
    environment = {
        name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name
    }
    environment |= xla.quick() | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", COUNTED, *map(str, flags), "--overwrite"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = found
    assert cold["cache_misses"] > 10
    assert warm == {"cache_hits": cold["cache_misses"] + cold["cache_hits"], "cache_misses": 0}
    assert any((tmp_path / "cache" / "jaxprune").iterdir())


def test_the_users_own_folder_is_kept(tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        keep_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--method wanda --pattern 2:4 --asymmetry 0.5",
        "--method magnitude --pattern 16:32 --skip *.down_proj",
    ],
)
def test_compiled_and_eager_prune_alike(flags: str, checkpoint: Path) -> None:
    timing = jit_versus_eager(load(checkpoint), windows(2, 16), recipe_options.parse(flags.split()))
    assert timing.equal == 1.0
    assert set(timing.jit) == {"gram", "solve", "forward", "all"}
    assert timing.first["all"] > timing.jit["all"] > 0
    header, rows = timing_table(timing)
    assert [row[0] for row in rows] == list(timing.jit)
    assert all(len(row) == len(header) for row in rows)
    assert float(rows[-1][-1]) == pytest.approx(timing.eager["all"] / timing.jit["all"], abs=0.01)
