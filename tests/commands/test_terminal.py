"""What every command line does to its process."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import xla

FAULTS = """
import resource, statistics, sys
from jaxprune.commands.terminal import keep_memory
from jaxprune.run import main  # all that a command line imports before it
if sys.argv[1] == "kept":
    keep_memory(large=True)
import jax, jax.numpy as jnp

@jax.jit
def program(x):
    return x + x  # 36 MB, more than glibc keeps of its own accord

x, faults = jnp.ones((3000, 3000)), []
for _ in range(14):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[4:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told anything")
def test_freed_memory_is_not_cleared_again() -> None:
    found = {}
    for which in ("left", "kept"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, which], capture_output=True, text=True, check=True
        )
        found[which] = int(done.stdout)
    assert found["kept"] == 0
    assert found["left"] > 0


HELD = """
import sys
from pathlib import Path
from jaxprune.commands.terminal import keep_memory
keep_memory(large=sys.argv[1] == "large")
import numpy as np

def resident():
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024

before = resident()
arrays = [np.ones(int(sys.argv[2]) * 2**17) for _ in range(200 // int(sys.argv[2]))]  # 200 MB
del arrays
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told anything")
@pytest.mark.parametrize(
    ("which", "size", "held"), [("small", 20, True), ("small", 100, False), ("large", 100, True)]
)
def test_large_arrays_are_kept_where_asked_for(which: str, size: int, held: bool) -> None:
    command = [sys.executable, "-c", HELD, which, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (float(done.stdout) > 150) == held


CHOOSE = """
import sys
from jaxprune.commands.terminal import choose_devices, command
sys.exit(command(lambda argv: choose_devices(argv[0]) and None)(sys.argv[1:]))
"""


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_a_device_that_is_not_there_is_one_line(device: str) -> None:
    settings = os.environ | {"JAX_PLATFORMS": ""}
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, device], capture_output=True, text=True, env=settings
    )
    if done.returncode == 0:
        pytest.skip(f"there is a {device}")
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: JAX finds no {device} \(.+\): pass --device cpu\n", done.stderr
    ), done.stderr


CACHED = """
import sys, jax
from jaxprune.commands.terminal import command
sys.exit(command(lambda argv: print(jax.jit(lambda x: x + 1)(1)))([]))
"""


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "good").mkdir()
    for name in ("file", "file/folder", "good"):
        settings = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / name)}
        done = subprocess.run(
            [sys.executable, "-c", CACHED], capture_output=True, text=True, env=settings
        )
        assert (done.returncode, done.stdout) == (0, "2\n")
        said = done.stderr.splitlines()
        assert len(said) == (name != "good")
        assert all(
            line.startswith("warning: continuing without a cache: the cache folder")
            for line in said
        )
    assert list((tmp_path / "good").iterdir())
    assert (tmp_path / "file").read_text() == ""


HOMELESS = """
import pwd, sys

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
from jaxprune.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
"""A command of a user whom the system does not know, as in a container that runs under an arbitrary
user id."""
PLACES = ("HOME", "JAX_COMPILATION_CACHE_DIR", "JAXPRUNE_CACHE", "MPLCONFIGDIR")


def homeless(line: str, folder: Path) -> subprocess.CompletedProcess:
    settings = {
        k: v for k, v in os.environ.items() if k not in PLACES and not k.startswith(("HF_", "XDG_"))
    }
    settings |= xla.quick() | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HOMELESS, *line.split()]
    return subprocess.run(
        command, capture_output=True, text=True, env=settings, cwd=folder, timeout=300
    )


WARNING = (
    "warning: continuing without a cache: no home folder is known: set HOME, or JAXPRUNE_CACHE and "
    "HF_HOME\n"
)


def test_without_a_home_folder_there_is_no_cache(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    options = f"--calib {text} --nsamples 1 --seqlen 16 --eval none --out pruned"
    done = homeless(f"prune --ckpt {checkpoint} {options}", tmp_path)
    assert (done.returncode, done.stderr) == (0, WARNING)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("verify llama-7b", "huggyllama/llama-7b"),
        ("evaluate {checkpoint} --eval zero-shot --tasks boolq", "the rows of task boolq"),
    ],
)
def test_what_needs_the_hubs_cache_says_what_to_set(
    line: str, wanted: str, checkpoint: Path, tmp_path: Path
) -> None:
    done = homeless(line.format(checkpoint=checkpoint), tmp_path)
    problem = (
        "it cannot be downloaded: no home folder is known: set HOME, or JAXPRUNE_CACHE and HF_HOME"
    )
    assert (done.returncode, done.stderr) == (2, f"{WARNING}error: {wanted}: {problem}\n")
    assert list(tmp_path.iterdir()) == []


TRACED = """
import sys, jax
from jaxprune.commands.terminal import command
from jaxprune.errors import UserError

@jax.jit
def traced(x):
    raise UserError("it cannot be used")

sys.exit(command(lambda argv: traced(1))([]))
"""


def test_an_error_while_jax_traces_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: it cannot be used\n")
