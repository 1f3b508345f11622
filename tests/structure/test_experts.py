"""Pruning a model with experts: their Gram matrices, those with few tokens, groups of them, and
dropping them whole."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import open_checkpoint
from jaxprune import Magnitude, Observer, Recipe, hardware, load, prune_model
from jaxprune import prune as prune_whole
from jaxprune.api.snapshot import capture
from jaxprune.commands.progress import short_names
from jaxprune.commands.prune import main as prune
from jaxprune.commands.verify import main as verify
from jaxprune.errors import InputError
from jaxprune.loop import prune_layers
from jaxprune.methods.admm import ADMM
from jaxprune.methods.wanda import Wanda
from jaxprune.recipe_parts import Rule, Structure, Tuning
from jaxprune.solve import gram_matrices
from jaxprune.solve import layer as solving
from jaxprune.solve.calibration_states import CalibrationStates
from jaxprune.solve.gram_matrices import groups
from jaxprune.solve.layer import least_damping
from jaxprune.solve.rules import by_rules
from jaxprune.sparsity.patterns import NM, Unstructured
from jaxprune.streaming.model import StreamedModel
from jaxprune.structure.experts import kept_experts
from jaxprune.structure.removal import removal_from
from tests.helpers import cgroups, families
from tests.helpers.command import failing
from tests.helpers.optional import needs_torch, torch

pytestmark = needs_torch
WINDOWS = np.random.default_rng(0).integers(0, 300, (4, 40)).astype(np.int32)
NAMES = "gate_proj", "up_proj", "down_proj"
LINE = "--ckpt dense --calib ids.npy --nsamples 4 --seqlen 40 --eval none".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "dense"
    families.save(folder, families.config("qwen3_moe", "mixed"))
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoint and token ids, entered."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").symlink_to(folder)
    np.save("ids.npy", WINDOWS)
    return tmp_path


def layer_by_hand(model: StreamedModel, x: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The Gram matrices of the first layer's experts, and their saliencies, in float64."""
    layer = model.architecture.layers[0]
    (params,) = (p for i, p in enumerate(model.layers([0])) if i == 0)
    _, captures = jax.jit(layer)(jax.device_put(params), x)
    tokens = np.asarray(captures["mlp_input"], np.float64).reshape(-1, x.shape[-1])
    scores = tokens @ np.asarray(params["mlp.gate.kernel"], np.float64)
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    found, saliency = {}, np.zeros(6)
    chosen = np.argsort(-shares, axis=1)[:, :2]
    for expert in range(shares.shape[1]):
        own = np.flatnonzero((chosen == expert).any(axis=1))
        share = shares[own, expert] / np.take_along_axis(shares, chosen, axis=1)[own].sum(axis=1)
        read = tokens[own]
        kernels = {
            name: np.asarray(params[f"mlp.experts.{name}.kernel"][expert], np.float64)
            for name in NAMES
        }
        gate, up = read @ kernels["gate_proj"], read @ kernels["up_proj"]
        hidden = gate / (1 + np.exp(-gate)) * up
        saliency[expert] = np.mean(share * np.linalg.norm(hidden @ kernels["down_proj"], axis=1))
        for name, rows in (("expert_input", read), ("expert_hidden", hidden)):
            found[f"{name}.{expert}"] = rows.T @ (share[:, None] ** 2 * rows)
    return found, saliency


def test_gram_matrices_are_of_the_tokens_routed_there_by_squared_shares(folder: Path) -> None:
    model = load(folder)
    states = CalibrationStates(model, WINDOWS, with_dense=False)
    (params,) = model.layers([0])
    grams, _ = gram_matrices.gram_matrices(states, 0, model.put_layer(0, params))
    expected, _ = layer_by_hand(model, states.pruned.array)
    assert sum(grams.tokens(f"expert_input.{k}") or 0 for k in range(6)) == 2 * WINDOWS.size
    for name, gram in expected.items():
        np.testing.assert_allclose(
            grams.take(name), gram, rtol=1e-4, atol=1e-4 * np.abs(gram).max(), err_msg=name
        )


def test_some_experts_at_a_time_give_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    whole = list(prune_layers(model, WINDOWS, ADMM(), Unstructured(0.5)))
    cgroups.limit(tmp_path, monkeypatch, int(2.5 * 4 * 32**2 / hardware.CPU_FRACTION) + 1)
    layer = model.architecture.layers[0]
    sizes = [len(group) for group in groups(layer, list(layer.inputs), solving.most_bytes())]
    assert len(sizes) > 4 and sum(sizes) == len(layer.inputs)
    for one, other in zip(
        whole, prune_layers(model, WINDOWS, ADMM(), Unstructured(0.5)), strict=True
    ):
        assert one.kernels == other.kernels
        for path, array in one.params.items():
            np.testing.assert_array_equal(array, other.params[path], err_msg=path)


def test_an_expert_with_few_tokens_is_damped_and_named(folder: Path) -> None:
    model, few = load(folder), WINDOWS[:1, :12]
    for layer in prune_layers(model, few, ADMM(), Unstructured(0.5)):
        for path, kernel in layer.kernels.items():
            assert np.isfinite(kernel.error) and kernel.zeros == kernel.wanted
            if ".experts." in path:
                inputs = model.architecture.layers[layer.index].kernels[path][0]
                times = least_damping(int(kernel.stats["tokens"]), inputs)
                assert kernel.stats.get("damping_times", 1) >= times > 1
            else:
                assert "tokens" not in kernel.stats
    assert [least_damping(tokens, 64) for tokens in (0, 1, 16, 32, 33, 64, 100)] == [
        64,
        64,
        4,
        2,
        2,
        1,
        1,
    ]


@pytest.mark.parametrize("pattern", [Unstructured(0.5, per_output=True), NM(2, 4)], ids=str)
def test_an_expert_without_tokens_is_pruned_by_magnitude(
    folder: Path, pattern: Unstructured | NM
) -> None:
    """One token reaches two experts of six."""
    model = load(folder)
    dense, select = open_checkpoint(folder), jax.jit(lambda selector, saliency: selector(saliency))
    layer = next(iter(prune_layers(model, WINDOWS[:1, :1], Wanda(), pattern)))
    unseen = [path for path, kernel in layer.kernels.items() if kernel.stats.get("tokens") == 0]
    assert len(unseen) == 4 * 3
    for path in unseen:
        name = f"layers.0.{path}.kernel"
        kernel, pruned = dense.read([name])[name], layer.params[name]
        wanted = select(pattern.selector(kernel.shape), np.abs(kernel))
        np.testing.assert_array_equal(pruned, np.where(wanted, kernel, 0))


def test_every_token_for_every_expert(folder: Path) -> None:
    model = load(folder)
    routed = list(prune_layers(model, WINDOWS, ADMM(), Unstructured(0.5)))
    every = list(prune_layers(model.routing_all(), WINDOWS, ADMM(), Unstructured(0.5)))
    for one, other in zip(routed, every, strict=True):
        tokens = [k.stats["tokens"] for k in other.kernels.values() if "tokens" in k.stats]
        assert tokens == [WINDOWS.size] * (18 if one.index != 1 else 0)
        same = [
            one.kernels[path] == kernel
            for path, kernel in other.kernels.items()
            if ".experts." not in path
        ]
        assert one.index > 0 or all(same)  # before the first experts nothing differs


def test_a_router_is_pruned_by_its_own_name_and_skipped_by_any(folder: Path) -> None:
    architecture = load(folder).architecture
    routers = [
        which
        for which in architecture.kernel_shapes(routers=True)
        if architecture.is_router(*which)
    ]
    for rules, pruned in (
        ([Rule("*", Unstructured(0.5))], []),
        ([Rule("layers.0.*", Unstructured(0.5))], []),
        ([Rule("*.mlp.gate", Unstructured(0.5))], routers),
        ([Rule("*.mlp.gate", Unstructured(0.5)), Rule("layers.0.*")], routers[1:]),
        ([Rule("*.mlp.gate", Unstructured(0.5)), Rule("*")], []),
    ):
        named = by_rules(architecture, rules)
        assert [which for which in routers if named[which]] == pruned


def test_a_snapshot_has_no_routers(folder: Path) -> None:
    snapshot = capture(load(folder), WINDOWS, 2, Recipe(), prune_before=False)
    assert len(snapshot.kernels) == 4 + 3 * 6 and "mlp.gate" not in snapshot.kernels


def test_short_names_are_distinguished() -> None:
    paths = [
        "mlp.gate",
        "mlp.experts.*.gate_proj",
        "mlp.experts.*.up_proj",
        "mlp.shared_experts.gate_proj",
        "o_proj",
    ]
    assert short_names(paths) == ["mlp.gate", "experts.gate", "up", "shared_experts.gate", "o"]


def test_a_run_drops_experts_and_prunes_the_rest(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    line = [
        *LINE,
        *"--drop-experts 0.34 --sparsity 0.5 --save-masks masks.safetensors --out out".split(),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solving, "prune_and_round", failing(solving.prune_and_round, 9))
        assert prune(line) == 2
    assert prune([*line, "--resume"]) == 0
    assert verify(["out", "--against", "dense"]) == 0
    record = json.loads((here / "out/jaxprune.json").read_text())
    kept = kept_experts(load("dense"), WINDOWS, 0.34)
    assert {int(index): experts for index, experts in record["removed"]["experts"].items()} == kept
    assert all(len(experts) == 4 for experts in kept.values()) and sorted(kept) == [0, 2]
    loaded, info = AutoModelForCausalLM.from_pretrained(
        "out", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()) and loaded.config.num_experts == 4
    with torch.no_grad():
        expected = loaded.double()(torch.tensor(WINDOWS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(
        load("out").logits(WINDOWS), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )
    assert (
        prune(
            [*LINE, *"--drop-experts 0.34 --mask from-file:masks.safetensors --out again".split()]
        )
        == 0
    )
    assert (
        prune([*LINE, *"--drop-experts 0.5 --mask from-file:masks.safetensors --out fewer".split()])
        == 2
    )
    assert (
        "the masks cover more experts than the 3 of layer 0 that remain" in capsys.readouterr().err
    )
    for name in ("out", "again"):
        assert verify([name]) == 0


class First(Observer):
    """Remembers the divergence before the first step."""

    divergence = 0.0

    def step_done(self, number: int, steps: int, divergence: float) -> None:
        self.divergence = divergence if number == 1 else self.divergence


def test_what_is_left_is_tuned_towards_the_model_with_all_experts(here: Path) -> None:
    """Before the first step, where hardly a weight is zero, it is as far from that as the dropped
    experts make it."""
    model, seen = load("dense"), First()
    recipe = Recipe(
        Magnitude(),
        Unstructured(1e-4),
        structure=Structure(drop_experts=0.5),
        tuning=Tuning(tune_epochs=1, tune_windows=4),
    )
    prune_whole(model, WINDOWS, recipe, "out", observer=seen)
    smaller = model.keeping(kept_experts(model, WINDOWS, 0.5))
    p, q = (jax.nn.log_softmax(one.logits(WINDOWS), axis=-1) for one in (model, smaller))
    expected = float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))
    assert seen.divergence == pytest.approx(expected, rel=0.02) and expected > 1e-4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_experts_that_stay_dense_are_not_tuned(dtype: type, here: Path) -> None:
    """Their stack moves, in a computation of 16 bits rounded to them; they are stored as they
    were."""
    model = load("dense", dtype=dtype)
    rules = (Rule("*.experts.1.*", None),)
    recipe = Recipe(
        Magnitude(), Unstructured(0.5), rules=rules, tuning=Tuning(tune_epochs=1, tune_windows=4)
    )
    before = model.reader.read([path for path in model.reader.spec if ".experts." in path])
    for layer in prune_model(model, WINDOWS, recipe):
        experts = {path: array for path, array in layer.params.items() if ".experts." in path}
        same = {
            path: np.array_equal(array[array != 0], before[path][array != 0])
            for path, array in experts.items()
        }
        assert all(equal == (".experts.1." in path) for path, equal in same.items())


@pytest.mark.slow
def test_dropping_alone_leaves_the_others_as_they_are(here: Path) -> None:
    assert prune([*LINE, "--drop-experts", "0.5", "--skip", "*", "--out", "out"]) == 0
    model, kept = load("dense"), kept_experts(load("dense"), WINDOWS, 0.5)
    found = open_checkpoint("out")
    smaller = model.keeping(kept).reader
    assert found.spec == smaller.spec
    for path in found.spec:
        np.testing.assert_array_equal(found.read([path])[path], smaller.read([path])[path])
    router = "layers.2.mlp.gate.kernel"
    np.testing.assert_array_equal(
        found.read([router])[router], model.reader.read([router])[router][:, kept[2]]
    )


def test_the_experts_that_go_are_those_of_least_saliency(folder: Path) -> None:
    model = load(folder)
    _, saliency = layer_by_hand(model, model.embed(WINDOWS).array)
    for share, count in ((0.17, 5), (0.5, 3), (0.66, 2)):
        kept = kept_experts(model, WINDOWS, share)[0]
        assert kept == sorted(np.argsort(-saliency)[:count].tolist())


def test_routers_stay_dense_unless_named(here: Path) -> None:
    assert (
        prune([*LINE, "--rule", "layers.0.*=0.7", "--rule", "*.2.mlp.gate=0.25", "--out", "out"])
        == 0
    )
    assert verify(["out", "--against", "dense"]) == 0
    zeros = {
        path: int((array == 0).sum())
        for path, array in open_checkpoint("out")
        .read([f"layers.{index}.mlp.gate.kernel" for index in (0, 2)])
        .items()
    }
    assert zeros == {"layers.0.mlp.gate.kernel": 0, "layers.2.mlp.gate.kernel": 32 * 6 // 4}
    linears = {
        layer["index"]: layer["kernels"]
        for layer in json.loads((here / "out/jaxprune.json").read_text())["layers"]
    }
    assert "mlp.gate" in linears[2] and "mlp.gate" not in linears[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--drop-experts", "0.9"], "each token needs 2"),
        (["--drop-experts", "1"], "below 1"),
        (["--drop-experts", "-0.1"], "at least 0"),
        (["--asymmetry", "0.5"], "experts"),
        (["--rule", "*.experts.9.*=0.5"], "mlp.experts"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    here: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune([*LINE, *options, "--out", "out"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (here / "out").exists()


def test_models_without_experts_refuse_what_is_for_experts(tmp_path: Path) -> None:
    families.save(tmp_path, families.config("llama", "plain"))
    with pytest.raises(InputError, match="no experts"):
        removal_from(load(tmp_path), "experts", Structure(drop_experts=0.5))
