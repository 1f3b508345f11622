"""Distillation against torch's autograd."""

import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxprune import ADMM, InputError, Observer, Tuning, Unstructured, load, prune_layers
from jaxprune.errors import Change
from jaxprune.pruning import adam, distillation
from jaxprune.pruning.adam import BETAS, EPSILON
from jaxprune.pruning.distillation import Placement, distill, placement_of
from jaxprune.pruning.journal import Journal
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


class ByTorch:
    """A weight [out, in] under Adam, its second moment by rows and columns of what is kept."""

    def __init__(self, weight: Any) -> None:
        value = weight.detach()
        self.weight, self.kept = weight, (value != 0).float()
        self.unit = value[value != 0].square().mean().sqrt()
        self.first = torch.zeros_like(value)
        self.of_inputs, self.of_outputs = torch.zeros(value.shape[1]), torch.zeros(value.shape[0])

    def step(self, number: int, rate: float) -> None:
        gradient = self.weight.grad * self.kept
        self.first = BETAS[0] * self.first.bfloat16().float() + (1 - BETAS[0]) * gradient
        for axis, means in ((0, self.of_inputs), (1, self.of_outputs)):
            means *= BETAS[1]
            means += (1 - BETAS[1]) * gradient.square().sum(axis) / self.kept.sum(axis).clamp(min=1)
        mean = (self.of_inputs * self.kept.sum(0)).sum() / self.kept.sum()
        second = self.of_outputs[:, None] * self.of_inputs[None, :] / mean
        step = self.first / (1 - BETAS[0] ** number) / ((second / (1 - BETAS[1] ** number)).sqrt() + EPSILON)
        self.weight.data -= rate * self.unit * self.kept * step


def tuned_by_torch(layers: list[LayerResult], tokens: np.ndarray, order: np.ndarray, rates: list[float]) -> list[dict]:
    dense = tiny.model(tiny.config())
    model = copy.deepcopy(dense)
    weights, kernels = {}, []
    for layer in layers:
        for name in LINEARS:
            parameter = model.model.layers[layer.index].get_submodule(name).weight
            value = torch.tensor(kernel(layer, name).T.copy())
            parameter.data.copy_(value)
            weights[layer.index, name] = parameter
            kernels.append(ByTorch(parameter))
    for number, (rows, rate) in enumerate(zip(order, rates, strict=True), 1):
        ids = torch.tensor(tokens[rows], dtype=torch.long)
        with torch.no_grad():
            target = torch.log_softmax(dense(ids).logits, -1)
        found = torch.log_softmax(model(ids).logits, -1)
        model.zero_grad()
        torch.sum(target.exp() * (target - found)).backward()
        for kernel_of_torch in kernels:
            kernel_of_torch.step(number, rate)
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
            difference = np.abs(kernel(layer, name) - theirs[name])
            assert difference.mean() < 0.001 * moved and difference.max() < 0.02 * moved, name
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
    monkeypatch.setattr(distillation, "placement_of", lambda *_: Placement(state=False, results=False))
    streamed = run()
    assert len(calls) == 6 * len(windows())
    for one, other, third in zip(kept, again, streamed, strict=True):
        for name in LINEARS:
            before = np.abs(kernel(one, name)).mean()
            assert np.abs(kernel(one, name) - kernel(other, name)).mean() < 1e-4 * before
            np.testing.assert_array_equal(kernel(other, name), kernel(third, name))


def test_what_fits_stays_on_the_device(checkpoint: Path) -> None:
    architecture = load(checkpoint).architecture
    weights = sum(n * m for n, m in architecture.kernel_shapes().values())
    found = [placement_of(architecture, (1, 64), 1, free) for free in (0, 1e6, 1e7)]
    assert found[0] == Placement(state=False, results=False)
    assert found[-1] == Placement(state=True, results=True)
    assert placement_of(architecture, (1, 64), 1, 4.0 * weights) == Placement(state=False, results=False)
    assert placement_of(architecture, (1, 64)) == Placement(state=True, results=True)


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


def test_what_is_kept_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without kernels has no entry; what another version kept is passed over."""
    monkeypatch.setattr(Journal, "worth_keeping", lambda *_: True)
    value = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    none, before = adam.init({}), adam.init({"a.kernel": value})
    moving = {"a.kernel": before.moving["a.kernel"]._replace(value=2 * value, rows=np.ones(8, np.float32))}
    journal = Journal(tmp_path)
    adam.Saved(journal).keep(3, [none, before._replace(moving=moving)], [0.5])
    journal.put("tuning/4/1", {"leaf0": value}, {"divergences": []})
    state = [none, before]
    assert adam.Saved(journal).restore(state, lambda kernels: kernels) == (3, [0.5])
    assert state[0] is none
    for one, other in zip(jax.tree.leaves(state[1].moving), jax.tree.leaves(moving), strict=True):
        np.testing.assert_array_equal(one, other)
    journal.close()
