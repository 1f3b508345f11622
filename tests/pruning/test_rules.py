"""Rules by name: linear layers that stay dense, and such with a pattern of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxprune import NM, InputError, Recipe, Rule, Unstructured, load, prune_model
from jaxprune.commands.config import parse
from jaxprune.commands.prune import main
from jaxprune.commands.verify import main as verify
from jaxprune.methods.wanda import Wanda
from jaxprune.pruning.rules import by_rules
from tests.helpers.shapes import windows

LINE = ["--skip", "layers.0.*", "--skip", "*.o_proj", "--rule", "*.q_proj=0.75", "--rule=layers.[12].mlp.down_proj=2:4"]


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
    with pytest.raises(InputError, match="no linear layer is named .*dwn_proj.*layers.1.mlp.down_proj"):
        prune_model(load(checkpoint), windows(), recipe)


@pytest.mark.parametrize("preset", [[], ["--preset", "fast", "--sparsity", "0.3"]], ids=["plain", "spread"])
def test_a_run_with_rules(preset: list[str], checkpoint: Path, ids: Path, tmp_path: Path) -> None:
    out, masks = tmp_path / "out", tmp_path / "masks"
    line = ["--ckpt", checkpoint, "--calib", ids, "--nsamples", 4, "--seqlen", 32, "--eval", "none", *LINE, *preset]
    assert main([*map(str, line), "--out", str(out), "--save-masks", str(masks)]) == 0
    dense, pruned = (load_file(folder / "model.safetensors") for folder in (checkpoint, out))
    zeros, total, size = {}, 0, 0
    for name, kernel in pruned.items():
        if "_proj" in name:
            zeros[name.removeprefix("model.").removesuffix(".weight")] = float((kernel == 0).mean())
            total, size = total + int((kernel == 0).sum()), size + kernel.size
    for name, share in zeros.items():
        if name.startswith("layers.0.") or name.endswith("o_proj"):
            np.testing.assert_array_equal(pruned[f"model.{name}.weight"], dense[f"model.{name}.weight"], err_msg=name)
        elif name.endswith("q_proj"):
            assert share == 0.75
        elif name.endswith("down_proj"):
            assert share == 0.5 and ((pruned[f"model.{name}.weight"].reshape(-1, 4) == 0).sum(1) == 2).all()
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
        ("--mask from-file:m --update exact --rule *.q_proj=0.5", "masks that were made elsewhere decide"),
    ],
)
def test_rules_that_cannot_be(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        parse(["--ckpt", "x", *line.split()])


def test_rules_that_leave_too_few_weights_are_an_error(
    checkpoint: Path, ids: Path, capsys: pytest.CaptureFixture
) -> None:
    line = ["--ckpt", checkpoint, "--calib", ids, "--nsamples", 4, "--seqlen", 32, "--eval", "none", "--preset", "fast"]
    assert main([*map(str, line), "--sparsity", "0.7", "--skip", "*.mlp.*", "--out", str(ids.parent / "out")]) == 2
    assert "that no rule names" in capsys.readouterr().err
