"""Several devices against one: eight CPU devices in a process of their own, and two processes of
four."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import families, tiny, xla
from tests.helpers.command import free_port
from tests.helpers.optional import needs_torch


def command(line: list[object], **environment: str) -> subprocess.Popen:
    argv = [sys.executable, "-m", "jaxprune.run", *map(str, line)]
    settings = os.environ | xla.quick() | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.Popen(
        argv, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        printed, _ = process.communicate(timeout=500)
        assert process.returncode == 0, printed[-3000:]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Eleven windows on eight devices, and 6 key-value heads' outputs, 40 features and 72 inner
    ones, of which not all can be split."""
    folder = tmp_path_factory.mktemp("wide")
    size = {
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    tiny.save(folder, tiny.config(**size))
    ids = np.random.default_rng(0).integers(0, 300, (11, 64), np.int32)
    np.save(folder / "ids.npy", ids)
    options = ["--ckpt", folder, "--calib", folder / "ids.npy", "--nsamples", 11, "--seqlen", 64]
    return [*options, "--eval-text", folder / "ids.npy", "--eval-windows", 5, "--device", "cpu"]


RECIPES = {
    "best": [
        *"--preset best --sparsity 0.6 --asymmetry 0.25 --token-power 0.5 --tune-epochs 0.4".split()
    ],
    "Wanda": ["--method", "wanda", "--pattern", "2:4", "--finish-steps", 2],
    "removal": "--drop-layers 1 --drop-heads 0.5 --drop-channels 0.34 --channel-multiple 8".split(),
    "mix": "--drop-parameters 0.3 --channel-multiple 8".split(),
}
TOGETHER = """
import json, sys
from jaxprune.run import main
sys.exit(max(main(argv) for argv in json.loads(sys.argv[1])))
"""


def run_code(code: str, *args: object, **environment: str) -> None:
    """Runs Python code in a process of its own."""
    argv = [sys.executable, "-c", code, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    finish(subprocess.Popen(argv, env=os.environ | xla.quick() | environment, text=True, **pipes))


def run_all(*lines: list[object]) -> None:
    """Runs command lines one after another in one process."""
    run_code(TOGETHER, json.dumps([[*map(str, line)] for line in lines]))


def single(name: str, line: list[object], folder: Path) -> Path:
    """What one device makes by a recipe."""
    run_all([*line, *RECIPES[name], "--out", folder / "single"])
    return folder / "single"


def pairs(out: Path, single: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields name and both tensors of two checkpoints."""
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, single))
    assert found.keys() == expected.keys()
    yield from ((name, found[name], expected[name]) for name in expected)


def assert_close(out: Path, single: Path, far: float = 2e-4) -> None:
    """Same masks; weights equal to float32 rounding, by `far` of the largest of a kernel."""
    for name, found, expected in pairs(out, single):
        assert ((found == 0) == (expected == 0)).all(), name
        np.testing.assert_allclose(
            found, expected, rtol=2e-3, atol=far * np.abs(expected).max(), err_msg=name
        )


@pytest.mark.slow
def test_eight_devices_do_as_one(line: list[object], tmp_path: Path) -> None:
    run_all([*line, *RECIPES["best"], "--devices", 8, "--out", tmp_path / "out"])
    # Devices add in an order that depends on the machine's load. Of two weights that matter alike,
    # the other one may become zero.
    for name, found, expected in pairs(tmp_path / "out", single("best", line, tmp_path)):
        assert ((found == 0) == (expected == 0)).mean() > 0.999, name
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected), name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["removal", "mix"])
def test_eight_devices_remove_as_one(recipe: str, line: list[object], tmp_path: Path) -> None:
    run_all([*line, *RECIPES[recipe], "--devices", 8, "--out", tmp_path / "out"])
    assert_close(tmp_path / "out", single(recipe, line, tmp_path))


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "--method wanda",
        "--preset best --sparsity 0.6 --tune-epochs 0.4",
        "--method wanda --skip *.experts.0.* --skip *.experts.1.*",
        "--method wanda --skip *.experts.7.*",
    ],
)
def test_experts_on_four_devices_do_as_on_one(recipe: str, tmp_path: Path) -> None:
    """Eight experts are spread over four devices; of the eleven windows three are left over."""
    sizes = {
        "num_experts": 8,
        "num_local_experts": 8,
        "num_hidden_layers": 2,
        "mlp_only_layers": [],
    }
    families.save(tmp_path / "dense", families.config("qwen3_moe", "mixed", **sizes))
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 300, (11, 64), np.int32))
    line = [
        "--ckpt",
        tmp_path / "dense",
        "--calib",
        tmp_path / "ids.npy",
        *"--nsamples 11 --seqlen 64".split(),
    ]
    line += ["--eval", "none", "--device", "cpu", *recipe.split()]
    run_all([*line, "--out", tmp_path / "one"])
    run_all([*line, "--devices", 4, "--out", tmp_path / "four"])
    assert_close(tmp_path / "four", tmp_path / "one", far=2e-3)
    lost = [errors(tmp_path / out) for out in ("one", "four")]
    for path, error in lost[0].items():
        assert lost[1][path] == pytest.approx(error, rel=1e-3), path


GRADIENTS = """
import sys
import numpy as np
from jaxprune import load
from jaxprune.methods.magnitude import Magnitude
from jaxprune.distill import adafactor
from jaxprune.distill.gradual_pruning import GradualPruning
from jaxprune.loop import prune_layers
from jaxprune.distill.placement import Placement
from jaxprune.distill.student import Student
from jaxprune.sharding import Devices, fetch
from jaxprune.sparsity.patterns import Unstructured, partly

folder, out = sys.argv[1:]
tokens = np.load(f"{folder}/ids.npy")[:8]
pattern, step = Unstructured(0.6), adafactor.step

for count in (1, 8):
    model, found = load(folder, devices=Devices.first(count)), {}

    def keep(kernels, gradients, *args):
        for name, gradient in gradients.items():
            found[f"{len(found)} {name}"] = np.array(fetch(gradient))
        return step(kernels, gradients, *args)

    adafactor.step = keep
    layers = prune_layers(model, tokens, Magnitude(), partly(pattern, 0.15))
    student = Student(model, layers, Placement(True, True), GradualPruning(lambda *_: pattern, [1]))
    (dense,) = model.final_states(tokens)
    found["loss"] = np.float64(student.step(tokens, dense.read(slice(None)), 1, lambda _: 0.001))
    for index, kernels in enumerate(student.state):
        for name, mask in kernels.masks.items():
            found[f"mask {index} {name}"] = np.unpackbits(fetch(mask))
    np.savez(f"{out}/{count}.npz", **found)
"""


def test_a_steps_gradients_are_those_of_one_device(line: list[object], tmp_path: Path) -> None:
    """Eight windows, one a device; the zeros that come after it are the same, but for ties by
    rounding."""
    flags = f"{xla.quick()['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    run_code(GRADIENTS, line[1], tmp_path, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    one, eight = (np.load(tmp_path / f"{count}.npz") for count in (1, 8))
    assert len(one.files) == 2 * 3 * 7 + 1 and one.files == eight.files
    for name in one.files:
        if name.startswith("mask"):
            assert (
                one[name].sum() == eight[name].sum() > 0
                and (one[name] != eight[name]).mean() < 0.002
            ), name
            continue
        assert np.abs(one[name]).max() > 0
        np.testing.assert_allclose(
            eight[name], one[name], rtol=0, atol=1e-5 * np.abs(one[name]).max(), err_msg=name
        )


def errors(out: Path) -> dict[str, float]:
    """The errors of all linear layers, as the record has them."""
    layers = json.loads((out / "jaxprune.json").read_text())["layers"]
    return {
        f"{layer['index']}.{path}": one["error"]
        for layer in layers
        for path, one in layer["kernels"].items()
    }


def pair(line: list[object]) -> list[subprocess.Popen]:
    """Two processes of four devices each."""
    shared = [*line, "--devices", 4, "--coordinator", f"localhost:{free_port()}", "--processes", 2]
    return [command([*shared, "--process-id", number]) for number in range(2)]


@pytest.mark.slow
def test_two_processes_tune_on_a_text_as_one(line: list[object], tmp_path: Path) -> None:
    """Eight windows a step, four of each process."""
    np.save(tmp_path / "text.npy", np.random.default_rng(1).integers(0, 300, (40, 64), np.int32))
    own = [
        *line,
        *"--preset best --sparsity 0.6 --tune-tokens".split(),
        3 * 8 * 64,
        "--tune-windows",
        8,
    ]
    own += ["--tune-gradual", 0.75]
    own[own.index("--calib") + 1] = tmp_path / "text.npy"
    finish(*pair([*own, "--out", tmp_path / "out"]))
    run_all([*own, "--out", tmp_path / "single"])
    assert_close(tmp_path / "out", tmp_path / "single", far=2e-3)
    curves = [
        json.loads((tmp_path / name / "jaxprune.json").read_text())["divergences"]
        for name in ("out", "single")
    ]
    np.testing.assert_allclose(*curves, rtol=1e-3)
    assert len(curves[0]) == 3


@pytest.mark.slow
def test_two_processes_choose_the_same_mix(line: list[object], tmp_path: Path) -> None:
    finish(*pair([*line, *RECIPES["mix"], "--out", tmp_path / "out"]))
    assert_close(tmp_path / "out", single("mix", line, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["", "killed"])
def test_two_processes_do_as_one(killed: bool, line: list[object], tmp_path: Path) -> None:
    argv = [*line, *RECIPES["Wanda"], "--out", tmp_path / "out"]
    if killed:
        processes = pair(argv)
        deadline = time.monotonic() + 300
        while not (tmp_path / "out.unfinished/pruned/0.safetensors").exists():
            assert time.monotonic() < deadline and all(
                process.poll() is None for process in processes
            )
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.communicate()
    finish(*pair(argv))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_close(tmp_path / "out", single("Wanda", line, tmp_path))
    assert (
        json.loads((tmp_path / "out/jaxprune.json").read_text())["resumed_layers"] >= 1
    ) == killed
