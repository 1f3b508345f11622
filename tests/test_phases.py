"""A recipe on a whole checkpoint is its parts, put together."""

import contextlib
from pathlib import Path

import numpy as np
import pytest

from jaxprune import (
    ADMM,
    Context,
    Importance,
    InputError,
    Magnitude,
    Observer,
    Recipe,
    RunOptions,
    Unstructured,
    Wanda,
    load,
    phases,
    prune,
    prune_layers,
    prune_model,
)
from jaxprune.commands.recipe_options import parse
from jaxprune.distill.distillation import distill, of_windows
from jaxprune.recipe_parts import gradual_sparsity
from jaxprune.run_store.store import RunStore
from jaxprune.solve.allocation import allocate
from jaxprune.solve.layer_result import LayerResult, saved_layers
from jaxprune.solve.sensitivity import Weights, measure_sensitivity, weights
from tests.helpers.damage import damage
from tests.helpers.shapes import windows


class Told(Observer):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.layers: list[LayerResult] = []
        self.seconds: dict[str, float] = {}
        self.steps: list[int] = []

    def layer_done(self, result: LayerResult) -> None:
        self.layers.append(result)

    def phase_timed(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = seconds

    def step_done(self, number: int, steps: int, divergence: float) -> None:
        self.steps.append(number)


def by_recipe(checkpoint: Path, line: str, **options: object) -> list[LayerResult]:
    return list(prune_model(load(checkpoint), windows(), parse(line.split()), **options))


def assert_same(found: list[LayerResult], expected: list[LayerResult]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.kernels == theirs.kernels and mine.params.keys() == theirs.params.keys()
        for path, array in mine.params.items():
            np.testing.assert_array_equal(array, theirs.params[path], err_msg=path)


def test_a_plain_recipe_is_the_loop_over_layers(checkpoint: Path) -> None:
    expected = list(prune_layers(load(checkpoint), windows(), ADMM(), Unstructured(0.6)))
    assert_same(by_recipe(checkpoint, "--sparsity 0.6"), expected)


def test_all_parts_together(checkpoint: Path) -> None:
    model, tokens = load(checkpoint), windows()
    line = "--preset best --sparsity 0.6 --max-deviation 0.2 --tune-epochs 1"
    recipe = parse(line.split())
    chosen = tokens[[0, 1, 3, 4, 6, 7, 9, 10]]  # eight of twelve, evenly spaced
    sensitivity = measure_sensitivity(model, chosen)
    pattern = Unstructured(0.6)
    patterns = allocate(
        model, sensitivity, 0.6, 0.2, gradual=gradual_sparsity(recipe.tuning, pattern)
    )
    weighing = [weights(layer, recipe.importance) for layer in sensitivity]
    layers = list(
        prune_layers(model, tokens, recipe.method, lambda *which: patterns[which], weights=weighing)
    )
    text = of_windows(tokens, recipe.tuning, 7)
    expected = list(distill(model, text, layers, recipe.tuning, target_of=lambda *_: pattern))
    told = Told()
    found = by_recipe(checkpoint, line, seed=7, context=Context(observer=told))
    assert_same(found, expected)
    assert told.seconds.keys() == {"sensitivity", "tune"} and told.steps == [*range(1, 13)]
    assert_same(told.layers, layers)
    zeros, sizes = (
        sum(getattr(one, n) for layer in found for one in layer.kernels.values())
        for n in ("zeros", "size")
    )
    assert zeros == round(0.6 * sizes)


def test_tuned_layers_are_taken_up_or_where_one_is_damaged_made_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    def kept() -> tuple[list[LayerResult], list[int]]:
        told = Told()
        with contextlib.closing(RunStore(tmp_path)) as store:
            line = "--sparsity 0.6 --tune-epochs 1 --tune-windows 3"
            layers = by_recipe(checkpoint, line, context=Context(store, told))
        return layers, [layer.index for layer in told.layers]

    first, told = kept()
    again, told_again = kept()
    assert told == told_again == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned", "work-0"]
    assert all(layer.resumed for layer in again) and not any(layer.resumed for layer in first)
    damage(tmp_path / "tuned/1.safetensors", "truncated")
    third, _ = kept()
    assert not any(layer.resumed for layer in third)
    for layers in (again, third):
        assert_same(layers, first)


def test_a_tuning_that_begins_again_mixes_no_layers(
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped when the first tuned layer was kept, by a version whose optimizer had another
    state."""
    monkeypatch.setattr(RunStore, "worth_saving", lambda *_: True)
    line = "--sparsity 0.6 --tune-epochs 1 --tune-windows 3"
    with contextlib.closing(RunStore(tmp_path)) as store:
        next(prune_model(load(checkpoint), windows(), parse(line.split()), context=Context(store)))
        saved = store.get("tuning")
        assert saved
        store.put(
            "tuning",
            {f"second/{path}": array for path, array in saved.arrays.items()},
            saved.figures | {"fields": ["second"]},
        )
        monkeypatch.setattr(phases.distillation, "FAR", 1e9)  # it tunes otherwise
        found = by_recipe(checkpoint, line, context=Context(store))
        kept = [saved_layers(store, "tuned").require(index) for index in range(3)]
    assert_same(kept, found)
    assert "the tuning starts over" in caplog.text


def test_weights_change_the_mask_but_not_an_outputs_own_update(checkpoint: Path) -> None:
    model, tokens = load(checkpoint), windows()
    weighing = [
        weights(layer, Importance(weigh_outputs=True))
        for layer in measure_sensitivity(model, tokens)
    ]

    def first(per_output: bool, weighing: list[Weights] | None) -> np.ndarray:
        pattern = Unstructured(0.5, per_output=per_output)
        layer = next(prune_layers(model, tokens, Wanda(), pattern, weights=weighing))
        return layer.params["layers.0.mlp.down_proj.kernel"]

    np.testing.assert_allclose(first(True, weighing), first(True, None), rtol=1e-6)
    assert ((first(False, weighing) == 0) != (first(False, None) == 0)).mean() > 0.02


def test_tokens_weigh_in_the_gram_matrix(checkpoint: Path) -> None:
    plain, weighed = by_recipe(checkpoint, ""), by_recipe(checkpoint, "--token-power 0.5")
    assert plain[0]["mlp.down_proj"].error != weighed[0]["mlp.down_proj"].error


@pytest.mark.parametrize("line", ["--pattern 3:5", "--mask from-file:nowhere"])
def test_what_does_not_fit_is_refused_before_work(
    line: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "measure_sensitivity", None)
    with pytest.raises(InputError):
        prune_model(load(checkpoint), windows(), parse(f"--preset fast {line}".split()))


def test_tokens_of_another_vocabulary_are_refused_before_work(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="lies outside the vocabulary, found 555"):
        prune_model(load(checkpoint), windows() + 300, parse(["--preset", "fast"]))


def test_options_that_no_record_can_hold_are_refused_before_work(
    checkpoint: Path, tmp_path: Path
) -> None:
    for value in ({"a": 1}, tmp_path):
        with pytest.raises(InputError, match=r"config\.note\S*: an entry cannot be used"):
            prune(
                load(checkpoint),
                windows(2, 16),
                Recipe(Magnitude()),
                tmp_path / "out",
                RunOptions(config={"note": value}),
            )
    assert not any(tmp_path.iterdir())
