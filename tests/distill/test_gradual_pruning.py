"""Zeros that come while weights are tuned: which, their counts, and how a tuning goes on."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import open_checkpoint
from jaxprune import (
    ADMM,
    Context,
    InputError,
    Magnitude,
    Recipe,
    Tuning,
    Unstructured,
    load,
    prune_layers,
)
from jaxprune.commands.prune import main as prune
from jaxprune.commands.recipe_options import parse
from jaxprune.commands.verify import main as verify
from jaxprune.distill import adafactor, distillation, gradual_pruning, schedule
from jaxprune.distill.distillation import Rate, distill, of_stream, of_windows
from jaxprune.distill.placement import Placement
from jaxprune.distill.student import Student
from jaxprune.errors import Change
from jaxprune.phases import prune_model
from jaxprune.recipe_parts import Rule
from jaxprune.run_store.store import RunStore
from jaxprune.solve.layer_result import LayerResult
from jaxprune.sparsity.masks import from_file, unpack
from jaxprune.sparsity.patterns import NM, Given, Pattern, cubic, partly
from jaxprune.streaming.observer import SILENT, Observer
from tests.helpers import families, tiny
from tests.helpers.command import failing
from tests.helpers.optional import needs_torch
from tests.helpers.shapes import LINEARS, windows
from tests.helpers.tuning import Steps, kept_at, kernel, of_ids
from tests.helpers.tuning_by_torch import tuned_by_torch

LATE = Tuning(tune_epochs=2, tune_rate=0.02, tune_windows=2, tune_gradual=0.75)
"""Zeros come after each of the first seven of its twelve steps."""
MOST = Unstructured(0.75)
"""A quarter of its zeros comes late then."""


def solved(checkpoint: Path, pattern: Pattern = MOST) -> list[LayerResult]:
    now = pattern if isinstance(pattern, NM) else partly(pattern, 0.25 * pattern.sparsity)
    return list(prune_layers(load(checkpoint), windows(), ADMM(), now))


def tune(
    checkpoint: Path,
    layers: list[LayerResult],
    tuning: Tuning = LATE,
    pattern: Pattern = MOST,
    observer: Observer = SILENT,
) -> Iterator[LayerResult]:
    text = of_windows(windows(), tuning, 0)
    return distill(
        load(checkpoint),
        text,
        layers,
        tuning,
        target_of=lambda *_: pattern,
        context=Context(observer=observer),
    )


def own_masks(layer: LayerResult) -> dict[str, np.ndarray]:
    return {path: unpack(mask, len(kernel(layer, path))) for path, mask in layer.masks.items()}


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        (Unstructured(0.7), "float16"),
        (Unstructured(0.7, per_output=True), "float32"),
        (NM(2, 4), "float16"),
    ],
    ids=str,
)
def test_each_kernel_gets_as_many_in_its_pattern(
    pattern: Pattern, dtype: str, tmp_path: Path
) -> None:
    path = tiny.save(tmp_path, tiny.config(), dtype=dtype)
    layers = solved(path, pattern)
    for before, after in zip(layers, tune(path, layers, pattern=pattern), strict=True):
        for name in LINEARS:
            stored, masks = (
                kernel(after, name),
                [own_masks(layer)[name] for layer in (before, after)],
            )
            np.testing.assert_array_equal(stored != 0, masks[1])
            assert stored.dtype == np.dtype(dtype)
            wanted = pattern.zeros(stored.shape)
            assert (
                np.count_nonzero(stored == 0) == after[name].zeros == after[name].wanted == wanted
            )
            share = 1 if isinstance(pattern, NM) else 0.75
            assert (
                abs(before[name].zeros - share * wanted) <= 0.5 * stored.shape[1]
                and before[name].wanted == wanted
            )
            if isinstance(pattern, NM):
                assert (masks[1].reshape(-1, 4, stored.shape[1]).sum(1) == 2).all()
            elif pattern.per_output:
                assert len({*masks[1].sum(0)}) == 1
            assert not (masks[1] & ~masks[0]).any()


def test_what_is_kept_matters_most_to_the_loss() -> None:
    """Whether its weight is large, or the gradients of its input and of its output are; what is
    zero stays so, also where other weights have no gradient."""
    generator = np.random.default_rng(0)
    before = generator.random((24, 16)) < 0.6
    value = (generator.random(before.shape) + 0.1).astype(np.float32) * before
    rows, columns = (generator.random(count).astype(np.float32) for count in before.shape)
    rows[0] = 0
    selector = Unstructured(0.5).selector(value.shape, [0.9, 1.0])
    moving = adafactor.Moving(*map(jnp.asarray, (value, 0 * rows, 0 * columns, rows, columns)))
    fixed = adafactor.with_mask(np.float32(1), np.packbits(before, axis=0), value)
    for time, zeros in ((0, 173), (1, 192)):
        now, then = gradual_pruning.pruned(
            *jax.tree.map(jnp.array, (moving, fixed)), selector, np.int32(time)
        )
        kept = np.asarray(adafactor.unpacked(then.mask, 24))
        assert (~kept).sum() == zeros and not (kept & ~before).any()
        moves = kept if time else before
        np.testing.assert_array_equal(now.value, value * moves)
        np.testing.assert_array_equal(adafactor.kept(now.value, then.mask), value * kept)
        np.testing.assert_array_equal(then.row_counts, moves.sum(1))
        np.testing.assert_array_equal(then.column_counts, moves.sum(0))
        saliency = value**2 * np.outer(rows, columns)
        assert saliency[kept].min() >= saliency[before & ~kept].max() > 0
    # What is not kept may be kept later.
    now, then = gradual_pruning.pruned(
        *jax.tree.map(jnp.array, (moving, fixed)), selector, np.int32(0)
    )
    for_now = before & ~np.asarray(adafactor.unpacked(then.mask, 24)) & (rows[:, None] > 0)
    grown = now._replace(value=jnp.where(for_now, 100, now.value))
    kept = np.asarray(
        adafactor.unpacked(gradual_pruning.pruned(grown, then, selector, np.int32(1))[1].mask, 24)
    )
    assert for_now.any() and kept[for_now].all()
    unseen = moving._replace(
        row_shares=jnp.zeros(24, jnp.float32), column_shares=jnp.zeros(16, jnp.float32)
    )
    kept = np.asarray(
        adafactor.unpacked(gradual_pruning.pruned(unseen, fixed, selector, np.int32(1))[1].mask, 24)
    )
    np.testing.assert_array_equal(kept, value >= np.sort(value, axis=None)[192])


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.7), Unstructured(0.7, per_output=True)], ids=str
)
def test_they_come_by_a_cubic(pattern: Unstructured, checkpoint: Path) -> None:
    (result, *_), late = (
        solved(checkpoint, pattern),
        gradual_pruning.GradualPruning(lambda *_: pattern, range(1, 5)),
    )
    found = late.selectors(load(checkpoint).architecture.layers[0], result)
    assert found.keys() == {f"{name}.kernel" for name in LINEARS}
    for name in LINEARS:
        (selector,), each = found[f"{name}.kernel"], kernel(result, name).shape[1]
        zeros = np.asarray(selector.zeros) * (each if pattern.per_output else 1)
        shares = [0.75 + 0.25 * made for made in (1 - 27 / 64, 1 - 8 / 64, 1 - 1 / 64, 1)]
        np.testing.assert_allclose(zeros, np.multiply(shares, result[name].wanted), atol=each)


@needs_torch
def test_steps_and_zeros_are_torchs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "PRUNINGS", 2)
    tuning, steps = (
        Tuning(tune_epochs=2, tune_rate=0.01, tune_windows=4, tune_gradual=0.25),
        Steps(),
    )
    layers, tokens = solved(checkpoint), windows()
    found = list(tune(checkpoint, layers, tuning, observer=steps))
    order = np.random.default_rng(0)
    rows = np.concatenate([order.permutation(12).reshape(-1, 4) for _ in range(2)])
    rate = Rate(0.01, 6, tokens[:4].size)
    rates = [rate.of(number, divergence) for number, divergence in enumerate(steps.told, 1)]
    first, last = (MOST.sparsity * (0.75 + 0.25 * share) for share in cubic(2))
    expected = tuned_by_torch(layers, tokens, rows, rates, {2: first, 4: last})
    for layer, before, theirs in zip(found, layers, expected, strict=True):
        for name in LINEARS:
            one, other = kernel(layer, name), theirs[name]
            both = (one != 0) & (other != 0)
            assert np.count_nonzero((one != 0) != (other != 0)) <= 0.002 * one.size, name
            difference, far = (
                np.abs(one - other)[both],
                np.abs(other - kernel(before, name))[both].max(),
            )
            assert difference.mean() < 0.001 * far and difference.max() < 0.02 * far, name


def test_it_is_the_same_where_the_host_holds_the_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, found = solved(checkpoint), []
    for state in (True, False):
        monkeypatch.setattr(
            distillation,
            "placement_of",
            lambda *_, state=state, **__: Placement(state, results=False),
        )
        found.append(list(tune(checkpoint, layers)))
    for one, other in zip(*found, strict=True):
        for name in LINEARS:
            np.testing.assert_array_equal(kernel(one, name), kernel(other, name))


@pytest.mark.parametrize(
    ("dtype", "stop"),
    [pytest.param("float32", 8, marks=pytest.mark.slow), ("bfloat16", 4), ("bfloat16", 11)],
)
def test_a_tuning_goes_on_where_it_was_stopped(
    dtype: str, stop: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two times that zeros come, right after the last one, and after a measure that is
    the best."""
    monkeypatch.setattr(schedule, "PRUNINGS", 3)
    monkeypatch.setattr(schedule, "BETWEEN", 1)
    tuning = Tuning(tune_tokens=12 * 32, tune_rate=0.02, tune_gradual=0.25)
    text, model = of_stream(of_ids(tmp_path, held_out=1), tuning), load(checkpoint, dtype=dtype)
    layers = solved(checkpoint)
    assert text.steps.prunings == [3, 5, 7] and text.steps.measured == [*range(1, 13)]
    expected = list(distill(model, text, layers, tuning, target_of=lambda *_: MOST))
    store = RunStore(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped here"):
        patch.setattr(Student, "step", failing(Student.step, stop))
        patch.setattr(RunStore, "worth_saving", kept_at(stop - 1))
        list(
            distill(model, text, layers, tuning, target_of=lambda *_: MOST, context=Context(store))
        )
    found = list(
        distill(model, text, layers, tuning, target_of=lambda *_: MOST, context=Context(store))
    )
    for one, other in zip(found, expected, strict=True):
        assert one.kernels == other.kernels
        for arrays in ("params", "masks"):
            for path, array in getattr(one, arrays).items():
                np.testing.assert_array_equal(array, getattr(other, arrays)[path])
    store.close()


def test_measures_count_with_all_zeros(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is the best of seventeen measures, but ten of them lack zeros. The first of the
    others is the best of those; four more end it."""
    monkeypatch.setattr(schedule, "BETWEEN", 1)
    monkeypatch.setattr(Student, "divergence", lambda *_: float(len(seen.held_out)))
    tuning, seen = Tuning(tune_tokens=32 * 2 * 32, tune_windows=2, tune_gradual=0.25), Steps()
    text, layers = of_stream(of_ids(tmp_path), tuning), solved(checkpoint)
    assert text.steps.last_pruning == 19
    found = list(
        distill(
            load(checkpoint),
            text,
            layers,
            tuning,
            target_of=lambda *_: MOST,
            context=Context(observer=seen),
        )
    )
    assert [tokens // 64 for tokens, _ in seen.held_out] == [*range(0, 29, 2)]
    for one in found:
        for name in LINEARS:
            assert one[name].zeros == MOST.zeros(kernel(one, name).shape)


def test_rules_and_dense_experts_stay(tmp_path: Path) -> None:
    """Experts have patterns of their own; one stays dense, so does a layer."""
    families.save(tmp_path / "dense", families.config("qwen3_moe", "mixed"))
    model = load(tmp_path / "dense")
    experts = sorted(path for path in model.architecture.layers[-1].kernels if ".experts." in path)
    dense, other = experts[0], experts[1]
    rules = Rule("layers.0.*"), Rule(f"*.{dense}"), Rule(f"*.{other}", NM(2, 4))
    recipe = Recipe(Magnitude(), Unstructured(0.6), rules=rules, tuning=LATE)
    tokens, different = windows() % 300, 0
    own = Recipe(Magnitude(), Unstructured(0.6), rules=rules)
    for before, after in zip(
        prune_model(model, tokens, own), prune_model(model, tokens, recipe), strict=True
    ):
        assert before.masks.keys() == after.masks.keys()
        for path in before.kernels:
            first, last = (kernel(layer, path) for layer in (before, after))
            if path not in before.masks:
                np.testing.assert_array_equal(first, last)
                continue
            different += np.count_nonzero((last != 0) & (first == 0))
            assert (
                np.count_nonzero(last == 0)
                == after[path].zeros
                == after[path].wanted
                == before[path].wanted
            )
            if path == other:
                assert (np.count_nonzero(last.reshape(-1, 4, last.shape[1]), axis=1) == 2).all()
    assert different > 50


def test_kernels_may_become_wholly_zero(checkpoint: Path) -> None:
    """Those of the fewest weights, for their numbers of zeros are rounded."""
    model = load(checkpoint)
    sizes = {
        path: math.prod(shape) for (_, path), shape in model.architecture.kernel_shapes().items()
    }
    few, many = min(sizes.values()), max(sizes.values())
    pattern = Unstructured(1 - 0.45 / few)
    for layer in prune_model(model, windows(), Recipe(Magnitude(), pattern, tuning=LATE)):
        for path, size in sizes.items():
            assert np.count_nonzero(kernel(layer, path)) == size - round(pattern.sparsity * size)
    assert round(pattern.sparsity * few) == few and round(pattern.sparsity * many) < many


@pytest.mark.parametrize("flags", ["", "--weigh-outputs --max-deviation 0.2"])
def test_the_solves_leave_a_share_of_what_is_above_one_half(flags: str, checkpoint: Path) -> None:
    """Of all linear layers together, where one threshold is over them; what is zero stays so."""
    line, seen = f"--sparsity 0.7 --tune-epochs 1 --tune-gradual 0.5 {flags}", Steps()
    layers = list(
        prune_model(
            load(checkpoint), windows(), parse(line.split()), context=Context(observer=seen)
        )
    )
    first, last, size = 0, 0, 0
    for before, after in zip(seen.layers, layers, strict=True):
        for path in LINEARS:
            assert before[path].zeros < before[path].wanted == after[path].zeros
            assert not np.any(kernel(after, path)[kernel(before, path) == 0])
            first, last, size = (
                first + before[path].zeros,
                last + after[path].zeros,
                size + after[path].size,
            )
    assert (first, last) == (pytest.approx(0.6 * size, abs=21), pytest.approx(0.7 * size, abs=21))


def test_up_to_one_half_they_make_all(checkpoint: Path) -> None:
    lines = [f"--tune-epochs 1 --tune-gradual {share}".split() for share in (0, 0.5)]
    for layers in zip(
        *(prune_model(load(checkpoint), windows(), parse(line)) for line in lines), strict=True
    ):
        for path in LINEARS:
            np.testing.assert_array_equal(*(kernel(layer, path) for layer in layers))


def test_zeros_come_late_in_patterns(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="pass target_of"):
        list(distill(load(checkpoint), of_windows(windows(), LATE, 0), [], LATE))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [(Given("from-file:masks"), "the given masks decide"), (NM(2, 4), "pruned gradually")],
)
def test_gradual_zeros_are_refused_where_none_can_come(pattern: NM | Given, reason: str) -> None:
    with pytest.raises(InputError, match=f"tune_gradual has no effect: .*{reason}") as error:
        Recipe(pattern=pattern, tuning=LATE)
    assert error.value.options == {"tune_gradual": Change.OMIT}


def test_a_run_keeps_and_records_the_masks_of_its_end(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A kernel whose output is dead has more zeros than its pattern wants, and keeps them."""
    dense, out, file = tmp_path / "dense", tmp_path / "out", tmp_path / "masks.safetensors"
    shutil.copytree(checkpoint, dense)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3] = 0.0
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 300, (40, 32), np.int32))
    line = [
        "--ckpt",
        dense,
        "--calib",
        tmp_path / "ids.npy",
        *"--nsamples 4 --seqlen 32 --eval none".split(),
    ]
    line += ["--tune-tokens", 12 * 32, "--tune-gradual", 0.75, "--tune-rate", 0.05, "--tune-to-end"]
    line += ["--pattern", "per-output", "--sparsity", 0.75]
    assert prune([str(word) for word in (*line, "--save-masks", file, "--out", out)]) == 0
    measured = re.findall(
        r"tuned on (\d+) tokens: KL divergence \S+ nats on held-out text(,?)",
        " ".join(capsys.readouterr().out.split()),
    )
    assert measured[0][0] == "0" and measured[-1][0] == str(12 * 32)
    assert [bool(to_come) for _, to_come in measured] == [
        int(tokens) < 0.6 * 12 * 32 for tokens, _ in measured
    ]
    assert verify([str(out), "--against", str(dense)]) == 0
    record = json.loads((out / "jaxprune.json").read_text())
    stored, masks = open_checkpoint(out), from_file(file)
    for layer in record["layers"]:
        for path, linear in layer["kernels"].items():
            kernel = stored.read([f"layers.{layer['index']}.{path}.kernel"])[
                f"layers.{layer['index']}.{path}.kernel"
            ]
            np.testing.assert_array_equal(masks(layer["index"], path).read(), kernel != 0)
            dead = len(kernel) // 4 * ((layer["index"], path) == (1, "mlp.down_proj"))
            assert linear["zeros"] == np.count_nonzero(kernel == 0) == linear["wanted"] + dead
    assert "the last 18.75 % of the weights pruned gradually" in (out / "README.md").read_text()
