"""Distillation against torch's autograd and Adam."""

import copy
from pathlib import Path

import numpy as np
import pytest

from jaxprune import ADMM, InputError, Observer, Tuning, Unstructured, load, prune_layers
from jaxprune.errors import Change
from jaxprune.pruning import distillation
from jaxprune.pruning.adam import BETAS
from jaxprune.pruning.distillation import distill
from jaxprune.pruning.results import LayerResult
from tests.helpers import tiny
from tests.helpers.optional import needs_torch, torch
from tests.helpers.shapes import LINEARS, windows


class Epochs(Observer):
    """Remembers the divergences of epochs."""

    def __init__(self) -> None:
        self.told: list[tuple[int, float]] = []

    def epoch_done(self, epoch: int, divergence: float) -> None:
        self.told.append((epoch, divergence))


def pruned(checkpoint: Path, sparsity: float = 0.5) -> list[LayerResult]:
    return list(prune_layers(load(checkpoint), windows(), ADMM(), Unstructured(sparsity)))


def kernel(layer: LayerResult, name: str) -> np.ndarray:
    return layer.params[f"layers.{layer.index}.{name}.kernel"]


def tuned_by_torch(layers: list[LayerResult], tokens: np.ndarray, order: np.ndarray, rates: list[float]) -> list[dict]:
    dense = tiny.model(tiny.config())
    model = copy.deepcopy(dense)
    weights, groups = {}, []
    for layer in layers:
        for name in LINEARS:
            parameter = model.model.layers[layer.index].get_submodule(name).weight
            value = torch.tensor(kernel(layer, name).T.copy())
            parameter.data.copy_(value)
            weights[layer.index, name] = parameter
            groups.append({"params": [parameter], "unit": float(value[value != 0].square().mean().sqrt())})
    masks = {which: (weight != 0).detach() for which, weight in weights.items()}
    adam = torch.optim.Adam(groups, betas=BETAS)
    for rows, rate in zip(order, rates, strict=True):
        ids = torch.tensor(tokens[rows], dtype=torch.long)
        with torch.no_grad():
            target = torch.log_softmax(dense(ids).logits, -1)
        found = torch.log_softmax(model(ids).logits, -1)
        model.zero_grad()
        torch.sum(target.exp() * (target - found)).backward()
        for which, weight in weights.items():
            weight.grad *= masks[which]
        for group in adam.param_groups:
            group["lr"] = rate * group["unit"]
        adam.step()
    return [{n: weights[layer.index, n].detach().numpy().T for n in LINEARS} for layer in layers]


@needs_torch
def test_steps_are_torchs(checkpoint: Path) -> None:
    tokens = windows()
    layers = pruned(checkpoint)
    tuning = Tuning(tune_epochs=2, tune_rate=0.01, tune_windows=4)
    order = np.random.default_rng(5)
    rows = np.concatenate([order.permutation(12).reshape(-1, 4) for _ in range(2)])
    # Six steps: one to rise from a tenth, then a cosine to a twentieth.
    falling = [(0.05 + 0.95 * (1 + np.cos(np.pi * k / 5)) / 2) * 0.01 for k in range(5)]
    expected = tuned_by_torch(layers, tokens, rows, [0.001, *falling])
    epochs = Epochs()
    found = list(distill(load(checkpoint), tokens, layers, tuning, seed=5, observer=epochs))
    for layer, before, theirs in zip(found, layers, expected, strict=True):
        for name in LINEARS:
            moved = np.abs(theirs[name] - kernel(before, name)).max()
            assert moved > 0.001
            # Adam divides by the root of the second moment: where a gradient is near zero rounding decides.
            difference = np.abs(kernel(layer, name) - theirs[name])
            assert difference.mean() < 0.01 * moved and np.quantile(difference, 0.99) < 0.1 * moved, name
    assert [epoch for epoch, _ in epochs.told] == [0, 1] and epochs.told[1][1] < epochs.told[0][1]


def test_masks_and_all_else_stay(checkpoint: Path) -> None:
    layers = pruned(checkpoint, 0.7)
    for before, after in zip(
        layers, distill(load(checkpoint), windows(), layers, Tuning(tune_epochs=1, tune_windows=2)), strict=True
    ):
        assert before.kernels == after.kernels and before.masks is after.masks
        for path, array in after.params.items():
            assert array.dtype == before.params[path].dtype
            if any(path.endswith(f"{name}.kernel") for name in LINEARS):
                np.testing.assert_array_equal(array != 0, before.params[path] != 0)
                assert not np.array_equal(array, before.params[path])
            else:
                np.testing.assert_array_equal(array, before.params[path])


def test_counts_are_exact_in_the_stored_dtype(tmp_path: Path) -> None:
    path = tiny.save(tmp_path, tiny.config(), dtype="float16")
    layers = pruned(path)
    for layer in distill(load(path), windows(), layers, Tuning(tune_epochs=1, tune_windows=2)):
        for name in LINEARS:
            assert kernel(layer, name).dtype == np.float16
            assert (kernel(layer, name) == 0).sum() == kernel(layer, name).size // 2


def test_it_is_deterministic_in_its_seed(checkpoint: Path) -> None:
    layers = pruned(checkpoint)

    def first(seed: int) -> np.ndarray:
        tuning = Tuning(tune_epochs=1, tune_windows=3)
        return kernel(next(distill(load(checkpoint), windows(), layers, tuning, seed=seed)), LINEARS[0])

    np.testing.assert_array_equal(first(0), first(0))
    assert not np.array_equal(first(0), first(1))


def test_layers_are_run_again_where_little_fits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, calls = pruned(checkpoint), []

    def run() -> list[LayerResult]:
        return list(distill(load(checkpoint), windows(), layers, Tuning(tune_epochs=1, tune_windows=1)))

    real = distillation.apply_layer
    monkeypatch.setattr(distillation, "apply_layer", lambda *args: calls.append(1) or real(*args))
    kept = run()
    assert calls == []
    monkeypatch.setattr(distillation, "CPU_BYTES", 0)
    again = run()
    assert len(calls) == 3 * len(windows())
    for one, other in zip(kept, again, strict=True):
        for name in LINEARS:
            before = np.abs(kernel(one, name)).mean()
            assert np.abs(kernel(one, name) - kernel(other, name)).mean() < 1e-4 * before


@pytest.mark.parametrize(("epochs", "told", "visited"), [(0.5, [0], 6), (1.25, [0, 1], 15), (0.01, [0], 1)])
def test_epochs_may_end_early(
    epochs: float, told: list[int], visited: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, steps, observer = pruned(checkpoint), [], Epochs()
    real = distillation._step

    def watched(*args: object) -> float:
        steps.append(args[5])
        return real(*args)

    monkeypatch.setattr(distillation, "_step", watched)
    tokens = windows()
    list(distill(load(checkpoint), tokens, layers, Tuning(tune_epochs=epochs), observer=observer))
    assert len(steps) == visited and [epoch for epoch, _ in observer.told] == told
    # No window comes twice before all have come once.
    assert len({step.tobytes() for step in steps}) == min(visited, len(tokens))
    assert all(0 < divergence < np.inf for _, divergence in observer.told)


@pytest.mark.parametrize(
    "bad", [{"tune_epochs": -1}, {"tune_epochs": float("nan")}, {"tune_rate": 0.0}, {"tune_windows": 0}]
)
def test_impossible_options_are_refused(bad: dict) -> None:
    with pytest.raises(InputError, match="tune_.* must be"):
        Tuning(**bad)


def test_a_rate_that_explodes_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="NaN or infinity") as error:
        list(distill(load(checkpoint), windows(), pruned(checkpoint), Tuning(tune_epochs=2, tune_rate=1e30)))
    assert error.value.options["tune_rate"] is Change.LOWER
