"""Rules by name: linear layers that stay dense, and such with a pattern of their own."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxprune import NM, InputError, Recipe, Rule, Unstructured, load, phases, prune_model
from jaxprune.__main__ import main as jaxprune
from jaxprune.commands.prune import main, require_suitable
from jaxprune.commands.run_options import PRUNE, parse, read
from jaxprune.commands.verify import main as verify
from jaxprune.methods.wanda import Wanda
from jaxprune.recipe import PRESETS
from jaxprune.reporting import record as records
from jaxprune.solve.rules import by_rules, count_weights, effective_recipe, require_sparsity
from tests.helpers import families
from tests.helpers.shapes import windows

LINE = [
    *"--skip layers.0.* --skip *.o_proj".split(),
    *"--rule *.q_proj=0.75 --rule=layers.[12].mlp.down_proj=2:4".split(),
]


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", windows(4, 32))
    return tmp_path / "ids.npy"


def test_the_last_rule_that_names_a_linear_layer_counts(checkpoint: Path) -> None:
    rules = (Rule("*.q_proj", Unstructured(0.75)), Rule("layers.1.*", NM(2, 4)), Rule("*.v_proj"))
    named = by_rules(load(checkpoint).architecture, rules)
    assert named[0, "self_attn.q_proj"] == Unstructured(0.75)
    assert named[1, "self_attn.q_proj"] == named[1, "mlp.up_proj"] == NM(2, 4)
    assert named[1, "self_attn.v_proj"] is None and (0, "mlp.up_proj") not in named


def test_a_rule_that_names_nothing_is_an_error_with_the_nearest_names(checkpoint: Path) -> None:
    recipe = Recipe(Wanda(), rules=(Rule("layers.1.mlp.dwn_proj"),))
    with pytest.raises(
        InputError, match="no linear layer is named .*dwn_proj.*layers.1.mlp.down_proj"
    ):
        prune_model(load(checkpoint), windows(), recipe)


@pytest.mark.parametrize(
    "preset", [[], ["--preset", "fast", "--sparsity", "0.3"]], ids=["plain", "max_deviation"]
)
def test_a_run_with_rules(preset: list[str], checkpoint: Path, ids: Path, tmp_path: Path) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    line = [
        "--ckpt",
        checkpoint,
        "--calib",
        ids,
        *"--nsamples 4 --seqlen 32 --eval none".split(),
        *LINE,
        *preset,
    ]
    assert main([*map(str, line), "--out", str(out), "--save-masks", str(masks)]) == 0
    dense, pruned = (load_file(folder / "model.safetensors") for folder in (checkpoint, out))
    zeros, total, size = {}, 0, 0
    for name, kernel in pruned.items():
        if "_proj" in name:
            zeros[name.removeprefix("model.").removesuffix(".weight")] = float((kernel == 0).mean())
            total, size = total + int((kernel == 0).sum()), size + kernel.size
    for name, share in zeros.items():
        if name.startswith("layers.0.") or name.endswith("o_proj"):
            np.testing.assert_array_equal(
                pruned[f"model.{name}.weight"], dense[f"model.{name}.weight"], err_msg=name
            )
        elif name.endswith("q_proj"):
            assert share == 0.75
        elif name.endswith("down_proj"):
            assert (
                share == 0.5
                and ((pruned[f"model.{name}.weight"].reshape(-1, 4) == 0).sum(1) == 2).all()
            )
    record = json.loads((out / "jaxprune.json").read_text())
    assert record["sparsity"] == total / size
    if preset:
        assert total == round(0.3 * size)  # the others make up for those that stay dense
    assert {name.removeprefix("model.").removesuffix(".weight") for name in load_file(masks)} == {
        name for name in zeros if not name.startswith("layers.0.") and not name.endswith("o_proj")
    }
    assert verify([str(out), "--against", str(checkpoint)]) == 0
    again = parse(["--config", str(out / "jaxprune.json"), "--out", "again"])[1]
    assert again == Recipe.from_json(again.to_json()) == parse([*map(str, line)])[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rule 0.8", "--rule takes NAMES=SPARSITY"),
        ("--rule *.q_proj=much", "much is no finite number"),
        ("--rule *.q_proj=1", "sparsity must be at least 0 and below 1"),
        ("--rule *.q_proj=4:2", "0 < N < M"),
        (
            "--mask from-file:m --update exact --rule *.q_proj=0.5",
            "the given masks decide which weights stay",
        ),
    ],
)
def test_rules_that_cannot_be(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        parse(["--ckpt", "x", *line.split()])


@pytest.fixture
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reverse pass of the dense model is an error."""
    monkeypatch.setattr(
        phases, "measure_sensitivity", lambda *_, **__: pytest.fail("a reverse pass")
    )


@pytest.mark.parametrize("command", [["prune"], ["prune", "--dry-run"], ["plan"]])
@pytest.mark.usefixtures("no_gradients")
def test_rules_that_leave_too_few_weights_are_an_error(
    command: list[str], checkpoint: Path, ids: Path, capsys: pytest.CaptureFixture
) -> None:
    line = [
        "--ckpt",
        checkpoint,
        "--calib",
        ids,
        *"--nsamples 4 --seqlen 32 --eval none --preset fast".split(),
    ]
    line += ["--sparsity", 0.7, "--skip", "*.mlp.*", "--out", ids.parent / "out"]
    assert jaxprune([*command, *map(str, line)]) == 2
    assert "needs 16128 zeros among the 9216 weights that no rule names" in capsys.readouterr().err
    assert [path.name for path in ids.parent.iterdir()] == ["ids.npy"]


def pruned(line: str, checkpoint: Path, ids: Path) -> Path:
    """The folder of a run, which verifies, and which its record repeats."""
    folder, own = ids.parent / "out", ids.parent / "again"
    flags = f"--calib {ids} --nsamples 4 --seqlen 32 --eval none --overwrite {line}".split()
    assert main(["--ckpt", str(checkpoint), *flags, "--out", str(folder)]) == 0
    assert verify([str(folder), "--against", str(checkpoint)]) == 0
    assert main(["--config", str(folder / "jaxprune.json"), "--overwrite", "--out", str(own)]) == 0
    assert (own / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    return folder


@pytest.mark.usefixtures("no_gradients")
def test_nothing_is_done_where_all_stay_dense(
    checkpoint: Path, ids: Path, capsys: pytest.CaptureFixture
) -> None:
    out = pruned("--preset best --asymmetry 0.5 --skip *", checkpoint, ids)
    assert "0.0000 % zeros, * dense, 30 other tensors" in " ".join(capsys.readouterr().out.split())
    dense, found = (load_file(folder / "model.safetensors") for folder in (checkpoint, out))
    assert found.keys() == dense.keys() and all(
        np.array_equal(found[name], dense[name]) for name in dense
    )
    record = json.loads((out / "jaxprune.json").read_text())
    assert record["sparsity"] == 0 and not {"sensitivity", "tune"} & record["seconds"].keys()
    # as asked
    assert (
        record["recipe"]["importance"]["max_deviation"] == 0.3
        and record["recipe"]["tuning"]["tune_epochs"] == 2
    )
    run = records.run_of(out)
    assert run
    assert (run.pattern_text, run.method_text) == ("* dense", "best: linear layers left dense")
    card, report = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert (
        "linear layers left dense\n" in card
        and "pruned" not in card
        and "sparse" not in card.replace("sparsity", "")
    )
    assert "50 %" not in card + report and "in total" not in card + report


@pytest.mark.usefixtures("no_gradients")
def test_what_stays_dense_is_quantized(checkpoint: Path, ids: Path) -> None:
    out = pruned("--preset fast --skip * --quantize q4_0", checkpoint, ids)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert len(np.unique(load_file(out / "model.safetensors")[name][0])) <= 16
    run = records.run_of(out)
    assert run and run.method_text == "fast: linear layers left dense, quantized to Q4_0"


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_rules_that_name_every_linear_layer_decide(
    preset: str, checkpoint: Path, ids: Path
) -> None:
    """As the same sparsity of all does, of which no part is left to the tuning."""
    rules = "--rule *.self_attn.*=0.7 --rule *.mlp.*=0.7"
    out = pruned(f"--preset {preset} {rules}", checkpoint, ids)
    found, run = (out / "model.safetensors").read_bytes(), records.run_of(out)
    assert run and run.pattern_text == "*.self_attn.* 70 %, *.mlp.* 70 %"
    assert "sparsities within" not in run.method_text and "pruned gradually" not in run.method_text
    assert "outputs weighed" in run.method_text and "epochs of tuning" in run.method_text
    assert (
        found
        == (
            pruned(f"--preset {preset} --sparsity 0.7 --uniform --tune-gradual 0", checkpoint, ids)
            / "model.safetensors"
        ).read_bytes()
    )


@pytest.mark.usefixtures("no_gradients")
def test_nothing_is_measured_for_an_allocation_of_nothing(checkpoint: Path, ids: Path) -> None:
    pruned("--max-deviation 0.3 --rule *=0.7", checkpoint, ids)


@pytest.mark.usefixtures("no_gradients")
def test_a_recipe_of_the_library_lets_the_rules_decide(checkpoint: Path) -> None:
    rules = Rule("*.self_attn.*"), Rule("*.mlp.*")
    recipe, model = dataclasses.replace(PRESETS["best"].at(0.7), rules=rules), load(checkpoint)
    tokens = windows(2, 16)
    for layer, params in zip(prune_model(model, tokens, recipe), model.layers(), strict=True):
        assert all(
            np.array_equal(array, params[name.split(".", 2)[2]])
            for name, array in layer.params.items()
        )
    assert effective_recipe(model.architecture, recipe) == Recipe(
        recipe.method, recipe.pattern, preset="best", rules=rules
    )


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("--preset fast --sparsity 0.7 --rule *=0.5", "0.5"),
        ("--preset fast --sparsity 0.5 --skip *", "0.0"),
        ("--method wanda --sparsity 0.5 --rule *=2:4 --rule *.down_proj=0.6", "0.5"),
        ("--config typed.yaml --rule *.mlp.*=0.5 --rule *.self_attn.*=0.8", "0.6"),
    ],
)
@pytest.mark.parametrize(
    "command", ["prune", "prune --dry-run", "plan", "plan --target h100", "snapshot file --layer 0"]
)
def test_a_typed_sparsity_that_rules_miss_is_an_error_before_any_work(
    command: str,
    line: str,
    given: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """config.json is enough: there are no weights, and no text."""
    if command.startswith("snapshot"):
        line = line.replace("--preset fast ", "")
    monkeypatch.chdir(tmp_path)
    Path("typed.yaml").write_text("sparsity: 0.75\n")
    Path("model").mkdir()
    Path("model/config.json").write_bytes((checkpoint / "config.json").read_bytes())
    np.save("ids.npy", windows(1, 4))
    options = "--ckpt model --calib ids.npy --nsamples 1 --seqlen 4 --eval none"
    assert jaxprune([*command.split(), *options.split(), *line.split()]) == 2
    error = capsys.readouterr().err
    assert f"the rules name every linear layer and give a total sparsity of {given}" in error
    assert error.endswith("leave --sparsity out\n") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        ("--preset fast --sparsity 0.7 --rule *=0.7", 0.7),
        ("--method wanda --sparsity 0.7 --rule *=0.7", 0.7),  # 22 of 32 and 34 of 48 of each output
        ("--preset best --pattern 2:4 --sparsity 0.5 --rule *=2:4", 0.5),
        ("--sparsity 0.7 --rule *.mlp.*=0.5", 0.7),  # not all are named
        ("--skip * --sparsity 0", 0.0),
        ("--preset fast --rule *=0.9", None),
        ("--pattern 2:4 --skip *", None),
    ],
)
def test_a_typed_sparsity_that_rules_give(line: str, typed: float | None, checkpoint: Path) -> None:
    asked = read(["--ckpt", str(checkpoint), *line.split()], PRUNE)
    assert asked.sparsity == typed
    require_suitable(asked.config, asked.recipe, asked.sparsity)


def test_a_records_sparsity_is_not_typed() -> None:
    record = Path(__file__).parents[1] / "reporting/records/best.json"
    asked = read(["--config", str(record), "--skip", "*"], PRUNE)
    assert asked.sparsity is None and asked.recipe.pattern
    assert read(["--config", str(record), "--sparsity", "0.6"], PRUNE).sparsity == 0.6


def test_routers_count_where_a_rule_gives_them_a_pattern(tmp_path: Path) -> None:
    families.save(tmp_path, families.config("qwen3_moe", "mixed"))
    architecture = load(tmp_path).architecture
    shapes = architecture.kernel_shapes(routers=True)
    gates = {which for which in shapes if architecture.is_router(*which)}
    assert gates
    every = sum(n * m for which, (n, m) in shapes.items() if which not in gates)
    dense = Recipe(rules=(Rule("*"),))
    require_sparsity(architecture, dense, 0.0)
    assert count_weights(architecture, by_rules(architecture, dense.rules)) == (every, 0, 0.0, {})
    named = by_rules(architecture, (Rule("*.gate", Unstructured(0.5)),))
    counts = count_weights(architecture, named)
    assert counts.weights == every + sum(n * m for n, m in (shapes[which] for which in gates))
    assert counts.zeros == sum(round(n * m / 2) for n, m in (shapes[which] for which in gates))
    assert counts.unnamed.keys() == shapes.keys() - gates
