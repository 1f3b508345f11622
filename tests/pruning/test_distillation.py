"""Distillation against torch's autograd."""

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxprune import ADMM, InputError, Magnitude, Observer, Recipe, Tuning, Unstructured, load, prune_layers
from jaxprune.calibration.stream import TextStream
from jaxprune.errors import Change
from jaxprune.pruning import adam, kept_tuning, student, tuning_steps
from jaxprune.pruning.adam import BETAS, EPSILON
from jaxprune.pruning.distillation import Rate, distill, of_stream, of_windows
from jaxprune.pruning.journal import Journal
from jaxprune.pruning.kept_tuning import Kept
from jaxprune.pruning.results import LayerResult
from jaxprune.pruning.student import Placement, Student, placement_of
from jaxprune.pruning.tuning_steps import TuningSteps
from jaxprune.pruning.whole_model import prune_model
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT
from tests.helpers import tiny
from tests.helpers.command import failing
from tests.helpers.optional import needs_torch, torch
from tests.helpers.shapes import LINEARS, windows


class Steps(Observer):
    """Remembers the divergences of steps, and those on what is held out."""

    def __init__(self) -> None:
        self.told: list[float] = []
        self.held_out: list[tuple[int, float]] = []

    def step_done(self, number: int, steps: int, divergence: float) -> None:
        self.told.append(divergence)
        assert len(self.told) <= steps

    def divergence_measured(self, tokens: int, divergence: float) -> None:
        self.held_out.append((tokens, divergence))


def tune(
    checkpoint: Path, layers: list[LayerResult], tuning: Tuning, seed: int = 0, observer: Observer = SILENT
) -> Iterator[LayerResult]:
    text = of_windows(windows(), tuning, seed)
    return distill(load(checkpoint), text, layers, tuning, observer=observer)


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
    for before, after in zip(layers, tune(checkpoint, layers, Tuning(tune_epochs=1, tune_windows=2)), strict=True):
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


def test_layers_are_run_again_where_little_fits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, calls = pruned(checkpoint), []

    def run() -> list[LayerResult]:
        return list(tune(checkpoint, layers, Tuning(tune_epochs=1, tune_windows=1)))

    real = student.apply_layer
    monkeypatch.setattr(student, "apply_layer", lambda *args: calls.append(1) or real(*args))
    kept = run()
    assert calls == []
    monkeypatch.setattr(student, "CPU_BYTES", 0)
    again = run()
    assert len(calls) == 3 * len(windows())
    monkeypatch.setattr(student, "placement_of", lambda *_: Placement(state=False, results=False))
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
    # What stays leaves room for a batch of the dense model.
    fits = [placement_of(architecture, (1, 64), 1, 1e7, tokens).state for tokens in (64, 2**20)]
    assert fits == [True, False]


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
    assert len(np.unique(found.reshape(25, -1)[:12], axis=0)) == text.steps.different == len(windows()) == 12
    assert TuningSteps.of(Tuning(tune_epochs=1, tune_windows=99), 12, 32).shape == (12, 32)


def test_windows_are_cut_into_pieces(tmp_path: Path) -> None:
    """Of 32 tokens into three of 10: two are left out. A stream's come in their order, also from a later step on."""
    ids = np.arange(5 * 32, dtype=np.int32).reshape(5, 32)
    expected = ids[:, :30].reshape(15, 10)
    text = of_windows(ids, Tuning(tune_epochs=1, tune_pieces=3, tune_windows=3), 0)
    assert (text.steps.count, text.steps.shape) == (5, (3, 10))
    visited = np.concatenate(list(text.batches(0)))
    np.testing.assert_array_equal(visited[np.argsort(visited[:, 0])], expected)

    stream, tuning = of_ids(tmp_path), Tuning(tune_tokens=20 * 8, tune_pieces=3, tune_windows=2)
    windows = np.stack([*islice(stream.windows(), 6)])
    text = of_stream(stream, tuning)
    assert (text.steps.count, text.steps.shape) == (8, (2, 10)) and text.held_out is stream.held_out
    for begin in range(8):
        found = np.concatenate(list(text.batches(begin)))
        np.testing.assert_array_equal(found, windows[:, :30].reshape(18, 10)[2 * begin : 16])
    assert Tuning(tune_epochs=1).pieces(5, 32) == (5, 32)
    with pytest.raises(InputError, match="windows of 32 tokens cannot be cut into 17 pieces"):
        Tuning(tune_epochs=1, tune_pieces=17).pieces(5, 32)


@pytest.mark.parametrize(
    "bad",
    [
        {"tune_epochs": -1},
        {"tune_epochs": float("nan")},
        {"tune_rate": 0.0},
        {"tune_windows": 0},
        {"tune_pieces": 0},
    ],
)
def test_impossible_options_are_refused(bad: dict) -> None:
    with pytest.raises(InputError, match="tune_.* must be"):
        Tuning(**bad)


@pytest.mark.parametrize(
    ("divergences", "shares"),
    [([2.0, 4.0, 0.1], [1, 1, 1]), ([0.6, 0.3, 9.0], [0.8, 0.6, 0.6]), ([0.3, 2.0, 0.1], [0.4, 1, 1])],
)
def test_what_is_near_the_dense_model_is_tuned_less(divergences: list[float], shares: list[float]) -> None:
    """By the mean divergence of the first two steps, of 2048 tokens, up to 0.75 nats."""
    rate = Rate(0.002, 16, 1024)
    found = [rate.of(number, divergence) for number, divergence in enumerate(divergences, 1)]
    rising = (0.1, 0.55, 1.0)
    assert found == pytest.approx([0.002 * share * of_step for share, of_step in zip(shares, rising, strict=True)])


def test_a_rate_that_explodes_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="NaN or infinity") as error:
        list(tune(checkpoint, pruned(checkpoint), Tuning(tune_epochs=2, tune_rate=1e30)))
    assert error.value.options["tune_rate"] is Change.LOWER


def test_what_is_kept_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without kernels has no entry; what another version kept is passed over."""
    monkeypatch.setattr(Journal, "worth_keeping", lambda *_: True)
    value = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    none, before = adam.init({}), adam.init({"a.kernel": value})
    moving = {"a.kernel": before.moving["a.kernel"]._replace(value=2 * value, rows=np.ones(8, np.float32))}
    journal = Journal(tmp_path)
    kept_tuning.keep(journal, Kept(3, [{}, moving], 0.25, [(64, 0.5)], [{}, {"a.kernel": value.astype(np.float16)}]))
    journal.put("tuning/4/1", {"leaf0": value}, {"divergences": []})
    found = kept_tuning.restore(journal, [none, before])
    assert found and (found.step, found.before, found.curve) == (3, 0.25, [(64, 0.5)])
    assert found.best and found.best[0] == {} and found.best[1]["a.kernel"].dtype == np.float16
    for one, other in zip(jax.tree.leaves(found.moving), jax.tree.leaves(moving), strict=True):
        np.testing.assert_array_equal(one, other)
    assert kept_tuning.restore(None, [none, before]) is None
    journal.close()


def of_ids(tmp_path: Path, held_out: int = 4) -> TextStream:
    ids = np.random.default_rng(1).integers(0, 300, (80, 32))
    np.save(tmp_path / "ids.npy", ids)
    return TextStream(str(tmp_path / "ids.npy"), None, 32, held_out=held_out)


def test_too_short_a_text_is_said_before_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_stream(of_ids(tmp_path), Tuning(tune_tokens=76 * 32))
    assert not caplog.text
    of_stream(of_ids(tmp_path), Tuning(tune_tokens=152 * 32))
    assert "about 2,432 tokens beside those that are held out: 4,864 take it 2.0 times" in caplog.text


@pytest.mark.parametrize("to_end", [False, True])
def test_the_best_step_on_what_is_held_out_is_kept(
    to_end: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the start and sixteen measures the fifth is least; four behind it the tuning stops, unless it is told not
    to."""
    monkeypatch.setattr(tuning_steps, "SHARE", 1)
    layers, seen = pruned(checkpoint), Steps()
    tuning = Tuning(tune_tokens=32 * 2 * 32, tune_windows=2, tune_to_end=to_end)
    text = of_stream(of_ids(tmp_path), tuning)
    at_fifth: list[np.ndarray] = []

    def measured(own: Student, *_: object) -> float:
        number = len(seen.held_out) + 1
        if number == 5:
            at_fifth.extend(own.stored(0)[f"{LINEARS[0]}.kernel"][None].copy())
        return 1 + abs(number - 5) / 10

    monkeypatch.setattr(Student, "divergence", measured)
    found = list(distill(load(checkpoint), text, layers, tuning, observer=seen))
    np.testing.assert_array_equal(kernel(found[0], LINEARS[0]), at_fifth[0])
    assert text.steps.count == 32 and len(seen.told) == (32 if to_end else 16)
    assert [tokens for tokens, _ in seen.held_out] == [64 * 2 * n for n in range(17 if to_end else 9)]


def test_a_stream_is_met_between_two_measures(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model's predictions are computed for as much of the text as is tuned on until the next measure."""
    monkeypatch.setattr(tuning_steps, "SHARE", 1)
    passes, seen, states_of = [], Steps(), StreamedModel.final_states

    def counted(model: StreamedModel, windows: np.ndarray) -> Any:
        passes.append((windows.shape, len(seen.told)))
        return states_of(model, windows)

    monkeypatch.setattr(StreamedModel, "final_states", counted)
    tuning = Tuning(tune_tokens=8 * 2 * 4 * 32, tune_windows=2, tune_to_end=True)
    list(distill(load(checkpoint), of_stream(of_ids(tmp_path), tuning), pruned(checkpoint), tuning, observer=seen))
    assert len(seen.held_out) == 17 and passes[0] == ((4, 32), 0)  # what is held out
    assert passes[1:] == [((4, 32), 2 * n) for n in range(16)]


@pytest.mark.parametrize(("tokens", "count"), [(1000, 2), (8 * 5 * 320, 8), (10**6, 16)])
def test_there_are_as_many_measures_as_the_text_has_room_for(tokens: int, count: int) -> None:
    steps = TuningSteps.of(Tuning(tune_tokens=tokens), 1, 32, 320)
    after = steps.measured
    assert steps.count == round(tokens / 32)
    assert len(after) == count and after[-1] == steps.count and min(after) >= steps.count // count
    assert TuningSteps.of(Tuning(tune_tokens=32), 1, 32, 320).measured == [1]


def test_the_divergence_is_that_of_the_models(checkpoint: Path, tmp_path: Path) -> None:
    """Before a step moves anything, a step's own divergence and the measured one are those of the two models."""
    model, layers = load(checkpoint), pruned(checkpoint)
    tokens = of_ids(tmp_path).held_out
    own = Student(model, layers, tokens.shape)
    (dense,) = model.final_states(tokens)
    measured = own.divergence(tokens, dense)
    assert measured == pytest.approx(own.step(tokens, dense.read(slice(None)), 1, lambda _: 0.0), rel=1e-5)
    assert 0.001 < measured < 10


def test_a_stream_goes_on_where_it_was_stopped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "worth_keeping", lambda *_: True)
    layers, tuning = pruned(checkpoint), Tuning(tune_tokens=16 * 32)
    text, whole, rest = of_stream(of_ids(tmp_path), tuning), Steps(), Steps()
    expected = list(distill(load(checkpoint), text, layers, tuning, observer=whole))
    journal = Journal(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped here"):
        patch.setattr(Student, "step", failing(Student.step, 10))
        list(distill(load(checkpoint), text, layers, tuning, journal=journal))
    found = list(distill(load(checkpoint), text, layers, tuning, journal=journal, observer=rest))
    assert rest.told == whole.told[9:] and rest.held_out == whole.held_out
    for one, other in zip(found, expected, strict=True):
        for path, array in one.params.items():
            np.testing.assert_array_equal(array, other.params[path])
    journal.close()


@pytest.mark.parametrize(
    ("tuning", "length", "groups"),
    [
        (Tuning(tune_tokens=10**6, tune_pieces=2), 2048, [*5 * [176], 97]),  # 163 steps from one measure to the next
        (Tuning(tune_tokens=10**6, tune_windows=8), 2048, [*5 * [88], 48]),  # 11 steps of one batch each
        (Tuning(tune_tokens=10**6), 512, [*15 * [128], 33]),
        (Tuning(tune_epochs=2), 2048, [128]),
        (Tuning(tune_epochs=2), 4096, 4 * [64]),  # 2 GiB
        (Tuning(tune_epochs=1, tune_windows=3), 4096, [60, 60, 9]),
    ],
)
def test_groups_are_of_whole_batches(tuning: Tuning, length: int, groups: list[int]) -> None:
    """Of LLaMA-7B in 16 bits, on a GPU, which takes 16384 tokens at a time; but for the last."""
    steps = TuningSteps.of(tuning, 128, length, 16 * length if tuning.tune_tokens else 0)
    assert steps.groups(2 * 4096, 16384) == groups


@pytest.mark.parametrize("of", ["windows", "stream"])
@pytest.mark.parametrize("stop", [3, 7, 12])
def test_a_run_that_goes_on_computes_the_dense_model_for_the_same_windows_together(
    of: str, stop: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape of a product decides how it is rounded, most of all in bfloat16. It is what plans count, too."""
    monkeypatch.setattr(Journal, "worth_keeping", lambda *_: True)
    layers, states_of, model = pruned(checkpoint), StreamedModel.final_states, load(checkpoint)
    state = model.architecture.width * model.dtype.itemsize
    monkeypatch.setattr(tuning_steps, "DENSE_BYTES", 5 * 32 * state)
    tuning = Tuning(tune_epochs=1.5) if of == "windows" else Tuning(tune_tokens=18 * 32)
    text = of_windows(windows()[:, :32], tuning, 0) if of == "windows" else of_stream(of_ids(tmp_path, 2), tuning)
    passes: list[np.ndarray] = []

    def counted(model: StreamedModel, windows: np.ndarray) -> Any:
        passes.append(windows)
        return states_of(model, windows)

    monkeypatch.setattr(StreamedModel, "final_states", counted)
    expected, whole = list(distill(model, text, layers, tuning)), passes[of == "stream" :]
    together = text.steps.together(state)
    assert together == 5 and [len(found) for found in whole] == text.steps.groups(state) == [5, 5, 5, 3]
    journal = Journal(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped here"):
        patch.setattr(Student, "step", failing(Student.step, stop))
        list(distill(model, text, layers, tuning, journal=journal))
    passes.clear()
    found = list(distill(model, text, layers, tuning, journal=journal))
    again = passes[of == "stream" :]
    assert len(again) == 4 - (stop - 1) // together
    for one, other in zip(again, whole[-len(again) :], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(found, expected, strict=True):
        for path, array in one.params.items():
            np.testing.assert_array_equal(array, other.params[path])
    passes.clear()
    list(distill(model, text, layers, tuning, journal=journal))  # all steps are kept
    assert len(passes) == (of == "stream")
    journal.close()


def test_a_run_that_was_stopped_after_its_tuning_tells_its_measures_again(checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe(Magnitude(), Unstructured(0.5), tuning=Tuning(tune_tokens=16 * 32))
    (tmp_path / "journal").mkdir()
    journal, first, again = Journal(tmp_path / "journal"), Steps(), Steps()
    model, stream = load(checkpoint), of_ids(tmp_path)
    for observer in (first, again):
        list(prune_model(model, windows(), recipe, stream=stream, journal=journal, observer=observer))
    assert len(first.told) == 16 and len(first.held_out) > 1
    assert again.told == [] and again.held_out == first.held_out
    journal.close()
