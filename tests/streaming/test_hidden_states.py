"""Hidden states in memory and in files."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from convert.errors import NoRoomError
from jaxprune.commands.prune import main
from jaxprune.errors import Change
from jaxprune.planning import estimate
from jaxprune.streaming.hidden_states import HiddenStates
from tests.helpers.command import free_port
from tests.helpers.plans import need_of


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_states_are_updated_in_place(place: str, tmp_path: Path) -> None:
    folder = tmp_path if place == "disk" else None
    states = HiddenStates((6, 3, 2), np.dtype(ml_dtypes.bfloat16), batch=2, folder=folder)
    values = np.arange(36.0).reshape(6, 3, 2).astype(ml_dtypes.bfloat16)
    states.write(slice(0, 6), values)
    before = states.copy()
    states.update(lambda x, rows: x + jax.numpy.asarray(rows.start, x.dtype))
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(before.array, values)
    expected = values + np.repeat([0, 2, 4], 2)[:, None, None].astype(values.dtype)
    np.testing.assert_array_equal(states.array, expected)
    np.testing.assert_array_equal(states.read(np.array([5, 1])), expected[[5, 1]])
    np.testing.assert_array_equal(np.concatenate(list(states.batches())), expected)
    np.testing.assert_array_equal(
        states.pick(np.array([5, 1]), np.array([0, 2])), expected[[5, 1], [0, 2]]
    )


OF_SEVERAL = """
import sys
from pathlib import Path
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from jaxprune.run_store.store import RunStore, Stage
from jaxprune.sharding import Devices, fetch
from jaxprune.streaming.hidden_states import HiddenStates

devices, processes, number = Devices.first(), int(sys.argv[2]), int(sys.argv[3])
states = HiddenStates((11, 3, 2), np.dtype(np.float32), 1, devices)
values = np.arange(66, dtype=np.float32).reshape(11, 3, 2)
left = 11 % devices.count  # in the last batch, which every process keeps
assert len(states.array) == (11 - left) // processes + left, states.array.shape
states.write(slice(0, 11), values)
states.update(lambda x, rows: x + jax.numpy.float32(rows.start))
starts, ends = zip(*((rows.start, rows.stop) for rows in states.slices()))
expected = values + np.repeat(starts, np.subtract(ends, starts))[:, None, None]
twin = states.copy()
for found in (states, twin):
    for rows, batch in zip(found.slices(), found.batches(), strict=True):
        np.testing.assert_array_equal(fetch(batch), expected[rows])
        np.testing.assert_array_equal(found.read(rows), expected[rows])
some = np.array([10, 0, 7])
np.testing.assert_array_equal(states.read(some), expected[some])
np.testing.assert_array_equal(states.pick(some, np.array([0, 2, 1])), expected[some, [0, 2, 1]])
store = RunStore(Path(sys.argv[4]))
store._last_saved = -1e9  # long ago
stage = Stage(store, "pruned", None, None)
stage.put_states({"x": states}, 5)
store.put("pruned/4", {"a": values}, {"of": 4})
saved, other = store.get("pruned/4"), HiddenStates((11, 3, 2), np.dtype(np.float32), 1, devices)
np.testing.assert_array_equal(saved.arrays["a"], values)
assert saved.figures == {"of": 4} and store.names("pruned") == ["4", "states"]
assert stage.states(lambda position: position == 5, lambda: {"x": other}) == (5, {"x": other})
np.testing.assert_array_equal(other.read(some), expected[some])
if number == 0:
    store.path("pruned/4").write_bytes(b"damaged")
assert store.get("pruned/4") is None and store.get("pruned/5") is None
"""


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_of_several_processes_each_keeps_its_windows(processes: int, tmp_path: Path) -> None:
    address = f"localhost:{free_port()}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    lines = [
        [sys.executable, "-c", OF_SEVERAL, address, str(processes), str(number), str(tmp_path)]
        for number in range(processes)
    ]
    every = [
        subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) for line in lines
    ]
    for process in every:
        _, printed = process.communicate(timeout=200)
        assert process.returncode == 0, printed[-3000:]


SLOW_DEVICE = """
from functools import partial
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxprune.sharding import AXIS, Devices
from jaxprune.streaming.hidden_states import HiddenStates

devices = Devices.first()
spec = PartitionSpec()

@jax.jit
@partial(jax.shard_map, mesh=devices.mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False)
def late(x):
    turns = jnp.where(jax.lax.axis_index(AXIS) == 0, 0, 30_000_000)
    waited = jax.lax.fori_loop(0, turns, lambda i, a: a * jnp.float32(1.5) % 7, jnp.float32(1))
    return x + waited * 0 + 1, x + waited * 0

states = HiddenStates((3, 4, 8), np.dtype(np.float32), 1, devices)
room = np.empty(states.array.nbytes + 64, np.uint8)
start = -room.ctypes.data % 64  # JAX reads an array in place where it begins like this
states.array = room[start : start + states.array.nbytes].view(np.float32).reshape(3, 4, 8)
states.array[:] = 5
seen = []

def step(x, rows):
    after, before = late(x)
    seen.append(before)
    return after

states.update(step)
assert (states.array == 6).all(), states.array
for batch in seen:
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(shard.data, 5)
"""


def test_states_stay_until_every_device_has_read_them() -> None:
    """Three windows on two devices: both are given the last one, and the second is late."""
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SLOW_DEVICE],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def mapped() -> int:
    """Bytes of files in this process's memory."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(lines[name].split()[0]) for name in ("RssFile", "RssShmem"))


def test_what_is_not_worked_on_takes_no_memory(tmp_path: Path) -> None:
    start = mapped()
    states = HiddenStates((64, 1024, 512), np.dtype(np.float32), batch=4, folder=tmp_path)
    most = 0

    def step(x: jax.Array, rows: slice) -> jax.Array:
        nonlocal most
        most = max(most, mapped() - start)
        return x + 1

    for _ in range(2):
        states.update(step)
    twin = states.copy()
    most = max(most, mapped() - start)
    assert most < states.array.nbytes / 4
    assert twin.array.min() == twin.array.max() == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_too_small_a_disk_is_an_error(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        with pytest.raises(NoRoomError, match="cannot keep 0.12 GiB") as error:
            HiddenStates((64, 1024, 512), np.dtype(np.float32), batch=4, folder=tmp_path)
        assert error.value.file == tmp_path and error.value.options["scratch"] is Change.OTHER
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def line(checkpoint: Path, text: Path, tmp_path: Path) -> list[str]:
    sizes = ["--nsamples", "4", "--seqlen", "32", "--eval-windows", "3", "--eval-text", str(text)]
    return ["--ckpt", str(checkpoint), "--calib", str(text), *sizes]


def test_a_run_on_disk_ends_with_the_same_bytes(line: list[str], tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    line += ["--preset", "best", "--sparsity", "0.6", "--asymmetry", "0.25"]
    assert main([*line, "--out", str(tmp_path / "a")]) == 0
    assert (
        main([*line, "--out", str(tmp_path / "b"), "--hidden", "disk", "--scratch", str(scratch)])
        == 0
    )
    assert not list(scratch.iterdir())
    first, second = (
        hashlib.sha256((tmp_path / o / "model.safetensors").read_bytes()).digest() for o in "ab"
    )
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scratch", "."], "--scratch is for --hidden disk"),
        (
            ["--hidden", "disk", "--scratch", "nowhere"],
            "nowhere: it is not a folder that can be written into",
        ),
    ],
)
def test_scratch_must_be_of_use(
    options: list[str], message: str, line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*line, *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_goes_to_the_disk_needs_no_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "peak_bytes", lambda: {"host": 0})
    sizes = [*"--nsamples 8 --seqlen 64 --eval none --preset fast --out".split(), tmp_path / "out"]
    memory, disk = (
        need_of("--ckpt", checkpoint, *sizes),
        need_of("--ckpt", checkpoint, *sizes, "--hidden", "disk"),
    )
    state = 8 * 64 * 32 * 4
    assert memory.phases["gram"].host - disk.phases["gram"].host == state
    assert disk.phases["gram"].states == state
    more = memory.phases["sensitivity"].host - disk.phases["sensitivity"].host
    assert disk.phases["sensitivity"].states == more == 6 * state
