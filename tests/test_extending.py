"""The example of docs/extending, installed by pip as a package of somebody else: a method, a
family, a text source."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import ArceeConfig, ArceeForCausalLM

from convert.schema import dump, to_text
from jaxprune import NM, Unstructured, gram, load
from jaxprune.__main__ import main as jaxprune
from jaxprune.commands.solve import parse as parse_solve
from jaxprune.methods.wanda import Wanda
from jaxprune.reporting.record import load as load_record
from tests.helpers import tiny, xla
from tests.helpers.logits import logits
from tests.helpers.optional import needs_torch, torch
from tests.helpers.plugins import install_method

EXAMPLE = Path(__file__).parents[1] / "docs/extending/example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds the example alone."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "example")
    command = [sys.executable, *"-m pip install -q --no-deps --no-build-isolation --target".split()]
    done = subprocess.run([*command, folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def arcee(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint of a family that only the example has."""
    llama = tiny.config()
    folder = tiny.save(tmp_path_factory.mktemp("arcee") / "dense", llama)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "gate_proj" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id dtype"
    ).split()
    options = {name: getattr(llama, name) for name in same} | {"dtype": "float32"}
    ArceeConfig(**options, head_dim=8, architectures=["ArceeForCausalLM"]).save_pretrained(folder)
    return folder


@pytest.fixture
def importable(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed example, in this process too."""
    monkeypatch.syspath_prepend(installed)


def test_a_package_of_somebody_else_prunes(
    installed: Path, importable: None, arcee: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = (
        "--method rescaled --largest 2 --pattern 2:4 --calib pydoc --nsamples 4 --seqlen 32 --eval "
        "ppl"
    )
    text = "--eval-text pydoc --eval-seqlen 32 --eval-windows 2 --out pruned"
    command = [
        sys.executable,
        *"-m jaxprune prune --ckpt".split(),
        str(arcee),
        *flags.split(),
        *text.split(),
    ]
    environment = os.environ | xla.quick() | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "pruned/jaxprune.json").read_text())
    assert (record["recipe"]["method"]["name"], record["recipe"]["method"]["options"]) == (
        "rescaled",
        {"largest": 2.0},
    )
    tensors = load_file(tmp_path / "pruned/model.safetensors")
    kernels = [name for name in tensors if name.endswith("_proj.weight")]
    assert len(kernels) == 3 * 6
    for name in kernels:
        assert ((tensors[name].reshape(-1, 4) == 0).sum(axis=1) == 2).all(), name
    assert jaxprune(["verify", str(tmp_path / "pruned"), "--against", str(arcee)]) == 0, (
        capsys.readouterr()
    )


def test_it_is_offered_by_the_help(importable: None, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        jaxprune("prune --method rescaled --help".split())
    printed = capsys.readouterr().out
    assert "--largest" in printed and "The largest factor" in printed


def test_without_it_one_line_says_what_is_missing(
    arcee: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for flags in (["--method", "rescaled"], []):
        assert (
            jaxprune(["prune", "--ckpt", str(arcee), *flags, "--out", str(tmp_path / "pruned")])
            == 2
        )
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        assert ("rescaled" if flags else "arcee") in printed


NOISY = '''
import dataclasses

from jaxprune.methods.wanda import Wanda


@dataclasses.dataclass(frozen=True)
class Noisy(Wanda):
    """Wanda, with an option that has the name of a run's."""

    seed: int = 7
    """The seed of the noise."""
'''


def test_an_option_of_a_runs_name_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Neither the method nor the run is given the other's value; a command without such a flag
    takes the method."""
    install_method(tmp_path, "noisy", NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    lines = ["prune --ckpt x", "plan --ckpt x", "snapshot file --layer 0 --ckpt x", "prune"]
    for line in lines:
        assert jaxprune([*line.split(), "--method", "noisy", "--seed", "3"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert (
            "two flags of" in error
            and "--seed" in error
            and "'Method noisy' and one of 'Calibration'" in error
        )
    _, _, recipe, _ = parse_solve(["file", "--method", "noisy", "--seed", "3"])
    assert recipe.method.seed == 3  # type: ignore[attr-defined]
    example = Path(__file__).parent / "reporting/records/unstructured.json"
    record = dataclasses.replace(load_record(example), recipe=recipe)
    (tmp_path / "jaxprune.json").write_text(to_text(dump(record)))
    assert (
        jaxprune(["--config", str(tmp_path / "jaxprune.json"), "--out", str(tmp_path / "out")]) == 2
    )
    assert "two flags of jaxprune prune have the name --seed" in capsys.readouterr().err


@needs_torch
def test_the_family_computes_what_transformers_does(importable: None, arcee: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, (2, 50))
    found, _ = logits(load(arcee), tokens.astype(np.int32))
    with torch.no_grad():
        expected = (
            ArceeForCausalLM.from_pretrained(arcee)
            .eval()
            .double()(torch.tensor(tokens))
            .logits.numpy()
        )
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.9, per_output=True), NM(2, 4)], ids=str
)
def test_the_method_is_not_worse_than_wanda(
    pattern: Unstructured | NM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    from jaxprune_example.rescaled import Rescaled  # type: ignore[import-not-found]

    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(100, 16)) + 1, jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(16, 8)), jnp.float32)
    errors = []
    for method in (Wanda(), Rescaled()):
        solution = method.solve(method.prepare(gram(x)), kernel, pattern)
        errors.append(float(jnp.linalg.norm(x @ (kernel - solution.weight))))
    assert errors[1] < errors[0]
