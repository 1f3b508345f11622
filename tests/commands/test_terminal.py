"""What every command line does to its process."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        done = subprocess.run([sys.executable, "-c", FAULTS, which], capture_output=True, text=True, check=True)
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
@pytest.mark.parametrize(("which", "size", "held"), [("small", 20, True), ("small", 100, False), ("large", 100, True)])
def test_large_arrays_are_kept_where_asked_for(which: str, size: int, held: bool) -> None:
    command = [sys.executable, "-c", HELD, which, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (float(done.stdout) > 150) == held


CHOOSE = """
import sys
from jaxprune.commands.terminal import choose_devices, run_main
sys.exit(run_main(lambda argv: choose_devices(argv[0]) and None, sys.argv[1:]))
"""


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_a_device_that_is_not_there_is_one_line(device: str) -> None:
    settings = os.environ | {"JAX_PLATFORMS": ""}
    done = subprocess.run([sys.executable, "-c", CHOOSE, device], capture_output=True, text=True, env=settings)
    if done.returncode == 0:
        pytest.skip(f"there is a {device}")
    assert done.returncode == 2
    assert re.fullmatch(rf"error: JAX finds no {device} \(.+\): pass --device cpu\n", done.stderr), done.stderr


CACHED = """
import sys, jax
from jaxprune.commands.terminal import run_main
sys.exit(run_main(lambda argv: print(jax.jit(lambda x: x + 1)(1)), []))
"""


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "good").mkdir()
    for name in ("file", "file/folder", "good"):
        settings = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / name)}
        done = subprocess.run([sys.executable, "-c", CACHED], capture_output=True, text=True, env=settings)
        assert (done.returncode, done.stdout) == (0, "2\n")
        said = done.stderr.splitlines()
        assert len(said) == (name != "good")
        assert all(line.startswith("warning: compiled programs are not kept: the cache folder") for line in said)
    assert list((tmp_path / "good").iterdir())
    assert (tmp_path / "file").read_text() == ""
