"""Options in files, and those of records."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.errors import UserError
from convert.schema import dump, to_text
from jaxprune import InputError
from jaxprune.commands import evaluate, solve
from jaxprune.commands.run_options import Config, parse
from jaxprune.methods.admm import ADMM
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.exact import Exact
from jaxprune.methods.sparsegpt import SparseGPT
from jaxprune.methods.wanda import Wanda
from jaxprune.recipe import PRESETS, Recipe
from jaxprune.recipe_parts import Importance, Rule
from jaxprune.reporting import record as records
from jaxprune.sparsity.patterns import Unstructured

RECORDS = Path(__file__).parents[1] / "reporting/records"
RECIPES = [
    "",
    "--sparsity 0.6",
    "--pattern per-output --method wanda",
    "--pattern 2:4 --method alps",
    "--schedule constant --iterations 7 --selections 3 --damping 0.2 --rho 2.5 --linear-solve "
    "cholesky",
    "--mask wanda --update exact",
    "--mask sparsegpt --update admm --mask-damping 0.02 --iterations 5",
    "--method sparsegpt --finish-steps 5",
    "--mask from-file:masks.safetensors --update gradient",
    "--mask from-checkpoint:elsewhere",
    "--preset fast --sparsity 0.7",
    "--preset best --sparsity 0.7 --uniform",
    "--preset best --pattern 2:4",
    "--preset fast --tune-epochs 2 --tune-rate 0.002 --damping 0.1",
    "--preset fast --tune-epochs 0",
    "--preset thorough --tune-gradual 0.25",
    "--preset thorough --mask from-file:m",
    "--preset best --tune-tokens 1M --tune-windows 2 --tune-to-end --tune-text own.jsonl",
    "--token-power 0.5 --max-deviation 0.2 --asymmetry 0.3",
    "--preset best --sparsity 0.3 --skip layers.0.* --skip *.o_proj --rule *.q_proj=0.75 --rule "
    "layers.1.*=2:4",
    "--method wanda --rule *.q_proj=0.75",
    "--preset fast --quantize q5_0",
    "--preset fast --tune-chunks 2 --drop-experts 0.25 --route-all",
    "--drop-layers 2",
    "--drop-parameters 0.3",
    "--drop-layers layers.4,layers.7 --sparsity 0.5",
    "--drop-heads 0.25 --drop-channels 0.2 --channel-multiple 32",
    "--weigh-outputs --sensitivity-windows 3",
]


def record(folder: Path, config: Config, recipe: Recipe) -> Path:
    """Writes the record of a run with these options and this recipe."""
    run = records.load(RECORDS / "unstructured.json")
    assert isinstance(run, records.Run)
    asked = records.RunConfig(**dataclasses.asdict(config))
    changed = dataclasses.replace(run, config=asked, recipe=recipe)
    (folder / "jaxprune.json").write_text(to_text(dump(changed)))
    return folder / "jaxprune.json"


@pytest.mark.parametrize("flags", RECIPES)
def test_a_record_makes_its_recipe_again(flags: str, tmp_path: Path) -> None:
    config, recipe = parse(["--ckpt", "model", *flags.split()])
    assert parse(["--config", str(record(tmp_path, config, recipe))])[1] == recipe


def test_every_option_of_a_recipe_is_among_them() -> None:
    def changed(options: Any, usual: Any) -> Iterator[tuple[type, str]]:
        for name, value in vars(options).items():
            if value != getattr(usual, name):
                yield type(options), name
            if dataclasses.is_dataclass(value) and type(value) is type(getattr(usual, name)):
                yield from changed(value, getattr(usual, name))

    def every(options: Any) -> Iterator[tuple[type, str]]:
        for name, value in vars(options).items():
            yield type(options), name
            if dataclasses.is_dataclass(value):
                yield from every(value)

    recipes = [parse(["--ckpt", "model", *flags.split()])[1] for flags in RECIPES]
    assert {*every(Recipe())} == {
        which for recipe in recipes for which in changed(recipe, Recipe())
    }


@pytest.mark.parametrize("name", ["2of4", "best", "given", "per-output", "unstructured"])
def test_records_are_run_again(name: str, tmp_path: Path) -> None:
    record = RECORDS / f"{name}.json"
    config, recipe = parse(["--config", str(record), "--out", str(tmp_path / "again")])
    run = records.read(record.read_bytes(), record)
    assert isinstance(run, records.Run)
    assert (recipe.pattern_text, recipe.method_text) == (run.pattern_text, run.method_text)
    assert (config.ckpt, config.nsamples, config.seed) == (
        run.config.ckpt,
        run.config.nsamples,
        run.config.seed,
    )


@pytest.mark.parametrize(
    ("flags", "beside", "same"),
    [
        ("--eval ppl --eval-text c4 --eval-seqlen 9", "--eval none", "--eval none"),
        (
            "--eval ppl --eval-windows 2",
            "--eval samples --sample-tokens 3",
            "--eval samples --sample-tokens 3",
        ),
        ("--eval ppl,zero-shot --tasks rte --limit 2 --backend torch", "--eval ppl", "--eval ppl"),
        ("--pattern 2:4", "--sparsity 0.7", "--sparsity 0.7"),
        ("--pattern 2:4", "--sparsity 0.50", "--pattern 2:4"),
        ("--sparsity 0.7", "--pattern 2:4", "--pattern 2:4"),
        ("--sparsity 0.7", "--pattern per-output", "--pattern per-output --sparsity 0.7"),
        (
            "--sparsity 0.7 --max-deviation 0.2 --sensitivity-windows 2",
            "--pattern 2:4",
            "--pattern 2:4",
        ),
        ("--max-deviation 0.2 --sensitivity-windows 2", "--max-deviation 0", ""),
        ("--preset fast --max-deviation 0.2", "--uniform", "--preset fast --uniform"),
        (
            "--max-deviation 0.2 --sensitivity-windows 2",
            "--token-power 0.5",
            "--max-deviation 0.2 --token-power 0.5",
        ),
        (
            "--sparsity 0.7 --rule *.q_proj=0.8 --max-deviation 0.2",
            "--mask from-file:m",
            "--mask from-file:m",
        ),
        (
            "--iterations 7 --finish-steps 3",
            "--method wanda",
            "--method wanda --pattern unstructured --finish-steps 3",
        ),
        ("--iterations 7", "--method admm", "--iterations 7"),
        (
            "--iterations 7 --schedule constant",
            "--mask alps",
            "--mask alps --update admm --update-iterations 7",
        ),
        (
            "--method sparsegpt --block 64",
            "--update exact --steps 3",
            "--mask sparsegpt --update exact --block 64 --steps 3",
        ),
        (
            "--mask sparsegpt --update admm --mask-damping 0.3",
            "--update exact",
            "--mask sparsegpt --update exact --mask-damping 0.3",
        ),
        (
            "--mask wanda --update exact --steps 3",
            "--method alps",
            "--method alps --pattern per-output",
        ),
        (
            "--mask from-file:m --update gradient",
            "--method alps",
            "--mask from-file:m --method alps",
        ),
        (
            "--iterations 7",
            "--mask wanda --update exact",
            "--mask wanda --update exact --pattern unstructured",
        ),
        ("--tune-epochs 2 --tune-rate 0.1", "--tune-tokens 9k", "--tune-tokens 9k --tune-rate 0.1"),
        ("--tune-epochs 2 --tune-rate 0.1 --tune-chunks 2", "--tune-epochs 0", ""),
        ("--tune-epochs 2 --tune-gradual 0.5", "--tune-epochs 0", ""),
        (
            "--tune-epochs 2 --tune-gradual 0.5",
            "--mask from-file:m",
            "--mask from-file:m --tune-epochs 2",
        ),
        (
            "--preset thorough --tune-to-end --tune-text t",
            "--tune-epochs 2",
            "--preset thorough --tune-epochs 2",
        ),
    ],
)
def test_flags_win_over_a_record(flags: str, beside: str, same: str, tmp_path: Path) -> None:
    def parsed(line: str) -> tuple[Config, Recipe]:
        return parse(["--ckpt", "model", "--out", "out", *line.split()])

    config, recipe = parsed(flags)
    assert parsed(f"--config {record(tmp_path, config, recipe)} {beside}") == parsed(same)


ONLY_IN_PYTHON = [
    Recipe(rules=(Rule("layers.0.*"), Rule("*.q_proj", Unstructured(0.75)))),
    Recipe(rules=(Rule("*.q_proj", Unstructured(0.75, per_output=True)),)),
    dataclasses.replace(
        PRESETS["fast"], importance=Importance(max_deviation=0.3, sensitivity_windows=8)
    ),
    dataclasses.replace(
        PRESETS["fast"], importance=Importance(weigh_outputs=True, max_deviation=0.3)
    ),
    Recipe(Finished(ADMM(), Exact(steps=3, damping=0.5))),
    Recipe(Crossed(ADMM(), ADMM(damping=0.5))),
    Recipe(Crossed(Crossed(Wanda(), ADMM()), SparseGPT())),
]


@pytest.mark.parametrize("recipe", ONLY_IN_PYTHON)
def test_recipes_that_no_options_make_are_repeated(recipe: Recipe, tmp_path: Path) -> None:
    config, _ = parse(["--ckpt", "model"])
    assert parse(["--config", str(record(tmp_path, config, recipe))])[1] == recipe


def test_recipes_of_another_version_are_not_repeated_in_part(tmp_path: Path) -> None:
    content = json.loads((RECORDS / "unstructured.json").read_text())
    content["recipe"]["tuning"] |= {"tune_otherwise": 0.5}
    (tmp_path / "jaxprune.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="recipe.tuning.tune_otherwise: there is no such entry"):
        parse(["--config", str(tmp_path / "jaxprune.json")])


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_flags_win_over_a_file(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"run{suffix}"
    options = {
        "ckpt": "model",
        "sparsity": 0.7,
        "nsamples": 5,
        "pack": True,
        "eval": "none",
        "eval_text": None,
    }
    lines = (
        json.dumps(options)
        if suffix == ".json"
        else "".join(f"{k}: {json.dumps(v)}\n" for k, v in options.items())
    )
    file.write_text(lines)
    config, recipe = parse(["--config", str(file), "--nsamples", "6", "--sparsity=0.8"])
    assert (config.ckpt, config.nsamples, config.pack, config.eval) == ("model", 6, True, "none")
    assert recipe == parse(["--ckpt", "model", "--sparsity", "0.8"])[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "holds no options"),
        ("ckpt: [1, 2]\n", "no single value"),
        ("{", "holds no options"),
        ("ckpt: model\nnsample: 3\n", r"run\.yaml.*nsample"),
        ("ckpt: model\nnsamples: many\n", r"run\.yaml.*no whole number"),
        ("ckpt: model\npack: 3\n", r"run\.yaml"),
        ("method: wander\n", "did you mean wanda"),
        (f"seed: {10**100}\n", r"run\.yaml: seed: the number is too large"),
        ("!!python/object/apply:os.system ['true']\n", "holds no options"),
        ("a: &a [1]\nb: *a\n", "no single value"),
    ],
)
def test_files_that_hold_no_options_are_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises((InputError, UserError), match=message):
        parse(["--config", str(file)])


@pytest.mark.parametrize("pattern", ["2:4", "10:16", "1:2"])
def test_a_pattern_of_a_file_is_text(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"ckpt: model\npattern: {pattern}\nrule: ['*.q_proj=1:4']\nseed: 3\n"
    )
    config, recipe = parse(["--config", str(tmp_path / "run.yaml")])
    assert (str(recipe.pattern), config.seed) == (pattern, 3)


def test_every_command_takes_options_from_a_file(tmp_path: Path) -> None:
    file, record = tmp_path / "options.yaml", tmp_path / "jaxprune.json"
    file.write_text("eval: ppl\neval-seqlen: 64\nout: elsewhere\n")
    config, names = evaluate.parse(["model", "--config", str(file), "--out", "here"])
    assert (names, config.eval, config.eval_seqlen, config.out) == (["model"], "ppl", 64, "here")
    file.write_text("mask: wanda\nupdate: exact\nsparsity: 0.7\n")
    _, _, recipe, is_given = solve.parse(["layer.safetensors", "--config", str(file)])
    assert recipe.slug == "wanda-exact-70" and is_given
    record.write_bytes((RECORDS / "best.json").read_bytes())
    with pytest.raises(InputError, match="only prune, plan and snapshot repeat"):
        evaluate.parse(["model", "--config", str(record)])
