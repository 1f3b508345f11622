"""Distillation against torch's autograd."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxprune import Context, InputError, Observer, Tuning, load
from jaxprune.distill import adafactor, distillation, saved_tuning, student
from jaxprune.distill.distillation import Rate, distill, of_stream, of_windows
from jaxprune.distill.placement import Placement
from jaxprune.distill.saved_tuning import Progress
from jaxprune.distill.schedule import TuningSteps
from jaxprune.errors import Change
from jaxprune.run_store.store import RunStore
from jaxprune.solve.layer_result import LayerResult
from jaxprune.streaming.observer import SILENT
from tests.helpers import cgroups, tiny
from tests.helpers.optional import needs_torch
from tests.helpers.shapes import LINEARS, windows
from tests.helpers.tuning import Steps, kernel, of_ids, pruned
from tests.helpers.tuning_by_torch import tuned_by_torch


def tune(
    checkpoint: Path,
    layers: list[LayerResult],
    tuning: Tuning,
    seed: int = 0,
    observer: Observer = SILENT,
) -> Iterator[LayerResult]:
    text = of_windows(windows(), tuning, seed)
    return distill(load(checkpoint), text, layers, tuning, context=Context(observer=observer))


@needs_torch
def test_steps_are_torchs(checkpoint: Path) -> None:
    tokens = windows()
    layers = pruned(checkpoint)
    tuning, steps = Tuning(tune_epochs=2, tune_rate=0.01, tune_windows=4), Steps()
    found = list(tune(checkpoint, layers, tuning, seed=5, observer=steps))
    order = np.random.default_rng(5)
    rows = np.concatenate([order.permutation(12).reshape(-1, 4) for _ in range(2)])
    # Six steps: one to rise from a tenth, then a cosine to a twentieth.
    shares = [0.1, *(0.05 + 0.95 * (1 + np.cos(np.pi * k / 5)) / 2 for k in range(5))]
    highest = 0.01 * min(1, steps.told[0] / 0.75)
    expected = tuned_by_torch(layers, tokens, rows, [highest * share for share in shares])
    for layer, before, theirs in zip(found, layers, expected, strict=True):
        for name in LINEARS:
            moved = np.abs(theirs[name] - kernel(before, name)).max()
            assert moved > 0.001
            difference = np.abs(kernel(layer, name) - theirs[name])
            assert difference.mean() < 0.001 * moved and difference.max() < 0.02 * moved, name
    assert len(steps.told) == 6 and sum(steps.told[3:]) < sum(steps.told[:3])


def test_masks_and_all_else_stay(checkpoint: Path) -> None:
    layers = pruned(checkpoint, 0.7)
    for before, after in zip(
        layers, tune(checkpoint, layers, Tuning(tune_epochs=1, tune_windows=2)), strict=True
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
    for layer in tune(path, layers, Tuning(tune_epochs=1, tune_windows=2)):
        for name in LINEARS:
            assert kernel(layer, name).dtype == np.float16
            assert (kernel(layer, name) == 0).sum() == kernel(layer, name).size // 2


def test_it_is_deterministic_in_its_seed(checkpoint: Path) -> None:
    layers = pruned(checkpoint)

    def first(seed: int) -> np.ndarray:
        tuning = Tuning(tune_epochs=1, tune_windows=3)
        return kernel(next(tune(checkpoint, layers, tuning, seed)), LINEARS[0])

    np.testing.assert_array_equal(first(0), first(0))
    assert not np.array_equal(first(0), first(1))


def test_layers_are_run_again_where_little_fits(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, calls = pruned(checkpoint), []

    def run() -> list[LayerResult]:
        return list(tune(checkpoint, layers, Tuning(tune_epochs=1, tune_windows=1)))

    real = student.apply_layer
    monkeypatch.setattr(student, "apply_layer", lambda *args: calls.append(1) or real(*args))
    kept = run()
    assert calls == []
    cgroups.limit(tmp_path, monkeypatch, 2**10)
    again = run()
    assert len(calls) == 3 * len(windows())
    monkeypatch.setattr(
        distillation, "placement_of", lambda *_, **__: Placement(state=False, results=False)
    )
    streamed = run()
    assert len(calls) == 6 * len(windows())
    for one, other, third in zip(kept, again, streamed, strict=True):
        for name in LINEARS:
            before = np.abs(kernel(one, name)).mean()
            assert np.abs(kernel(one, name) - kernel(other, name)).mean() < 1e-4 * before
            np.testing.assert_array_equal(kernel(other, name), kernel(third, name))


@pytest.mark.parametrize(("epochs", "visited"), [(0.5, 6), (1.25, 15), (0.01, 1)])
def test_epochs_may_end_early(epochs: float, visited: int) -> None:
    tokens, tuning = windows(), Tuning(tune_epochs=epochs)
    text = of_windows(tokens, tuning, 0)
    every = list(text.batches(0))
    assert text.steps.count == len(every) == visited and text.held_out is None
    # No window comes twice before all have come once.
    assert len({step.tobytes() for step in every}) == min(visited, len(tokens))
    np.testing.assert_array_equal(list(text.batches(visited - 1)), every[-1:])


def test_a_step_takes_as_many_windows_as_it_is_told(checkpoint: Path) -> None:
    """Also where they do not divide all windows: it takes the first of the next epoch then."""
    text = of_windows(windows(), Tuning(tune_epochs=2, tune_windows=5), 0)
    found = np.stack(list(text.batches(0)))
    assert found.shape == (5, *text.steps.shape) == (5, 5, windows().shape[1])
    assert (
        len(np.unique(found.reshape(25, -1)[:12], axis=0))
        == text.steps.different
        == len(windows())
        == 12
    )
    assert TuningSteps.of(Tuning(tune_epochs=1, tune_windows=99), 12, 32).shape == (12, 32)


def test_windows_are_cut_into_chunks(tmp_path: Path) -> None:
    """Of 32 tokens into three of 10: two are left out. A stream's come in their order, also from a
    later step on."""
    ids = np.arange(5 * 32, dtype=np.int32).reshape(5, 32)
    expected = ids[:, :30].reshape(15, 10)
    text = of_windows(ids, Tuning(tune_epochs=1, tune_chunks=3, tune_windows=3), 0)
    assert (text.steps.count, text.steps.shape) == (5, (3, 10))
    visited = np.concatenate(list(text.batches(0)))
    np.testing.assert_array_equal(visited[np.argsort(visited[:, 0])], expected)

    stream, tuning = of_ids(tmp_path), Tuning(tune_tokens=20 * 8, tune_chunks=3, tune_windows=2)
    windows = np.stack([*islice(stream.windows(), 6)])
    text = of_stream(stream, tuning)
    assert (text.steps.count, text.steps.shape) == (8, (2, 10)) and text.held_out is stream.held_out
    for begin in range(8):
        found = np.concatenate(list(text.batches(begin)))
        np.testing.assert_array_equal(found, windows[:, :30].reshape(18, 10)[2 * begin : 16])
    assert Tuning(tune_epochs=1).chunks(5, 32) == (5, 32)
    with pytest.raises(InputError, match="windows of 32 tokens cannot be cut into 17 chunks"):
        Tuning(tune_epochs=1, tune_chunks=17).chunks(5, 32)


@pytest.mark.parametrize(
    "bad",
    [
        {"tune_epochs": -1},
        {"tune_epochs": float("nan")},
        {"tune_rate": 0.0},
        {"tune_rate": 1.5},
        {"tune_windows": 0},
        {"tune_chunks": 0},
        {"tune_gradual": -0.1},
        {"tune_gradual": 1.1},
    ],
)
def test_impossible_options_are_refused(bad: dict) -> None:
    with pytest.raises(InputError, match="tune_.* must be"):
        Tuning(**bad)


@pytest.mark.parametrize(
    ("divergences", "shares"),
    [
        ([2.0, 4.0, 0.1], [1, 1, 1]),
        ([0.6, 0.3, 9.0], [0.8, 0.6, 0.6]),
        ([0.3, 2.0, 0.1], [0.4, 1, 1]),
    ],
)
def test_what_is_near_the_dense_model_is_tuned_less(
    divergences: list[float], shares: list[float]
) -> None:
    """By the mean divergence of the first two steps, of 2048 tokens, up to 0.75 nats."""
    rate = Rate(0.002, 16, 1024)
    found = [rate.of(number, divergence) for number, divergence in enumerate(divergences, 1)]
    rising = (0.1, 0.55, 1.0)
    assert found == pytest.approx(
        [0.002 * share * of_step for share, of_step in zip(shares, rising, strict=True)]
    )


def test_what_is_not_finite_is_an_error_when_it_is_met(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next step, by what is held out, and by the last step's kernels."""

    def broken(kernels: adafactor.Kernels, gradients: dict, *_: object) -> dict:
        gradients.clear()
        return {
            name: m._replace(value=m.value * np.float32(np.inf))
            for name, m in kernels.moving.items()
        }

    monkeypatch.setattr(adafactor, "step", broken)
    layers = pruned(checkpoint)
    for epochs, match in ((1, "the loss of the"), (1 / len(windows()), "a kernel of the")):
        steps = Steps()
        with pytest.raises(InputError, match=f"{match} distillation is NaN or infinite") as error:
            list(tune(checkpoint, layers, Tuning(tune_epochs=epochs), observer=steps))
        assert error.value.options["tune_rate"] is Change.LOWER and len(steps.told) == 1
    model, held_out = load(checkpoint), windows()[:2]
    own = student.Student(model, layers, Placement(True, True))
    own.state[0] = own.state[0]._replace(moving=broken(own.state[0], {}))
    with pytest.raises(InputError, match="the loss of the distillation"):
        own.divergence(held_out, model.final_states(held_out)[0])


def test_what_is_saved_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without kernels has nothing saved; another version's is passed over."""
    monkeypatch.setattr(RunStore, "worth_saving", lambda *_: True)
    value = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    none, before = adafactor.init({}, value.dtype), adafactor.init({"a.kernel": value}, value.dtype)
    moving = {
        "a.kernel": before.moving["a.kernel"]._replace(value=2 * value, rows=np.ones(8, np.float32))
    }
    store = RunStore(tmp_path)
    progress = Progress(3, 0.25, [(64, 0.5)], [{}, {"a.kernel": value.astype(np.float16)}])
    saved_tuning.save(store, [none, before._replace(moving=moving)], progress)
    taken: dict[int, Any] = {}
    found = saved_tuning.restore(
        store, [none, before], lambda index, *state: taken.update({index: state})
    )
    assert found and (found.step, found.before, found.curve) == (3, 0.25, [(64, 0.5)])
    assert found.best and found.best[0] == {} and found.best[1]["a.kernel"].dtype == np.float16
    jax.tree.map(np.testing.assert_array_equal, taken, {1: (moving, before.masks)})
    assert saved_tuning.restore(None, [none, before], lambda *_: None) is None
    store.put("tuning", {"leaf0": value}, {"fields": ["value"]})
    assert saved_tuning.restore(store, [none, before], lambda *_: None) is None
    store.close()
