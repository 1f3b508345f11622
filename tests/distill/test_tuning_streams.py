"""A tuning on a stream of text: what is held out, what is kept, and how it goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxprune import Context, InputError, Magnitude, Recipe, Tuning, Unstructured, load
from jaxprune.distill import schedule
from jaxprune.distill.distillation import distill, of_stream, of_windows
from jaxprune.distill.placement import Placement
from jaxprune.distill.student import Student
from jaxprune.phases import prune_model
from jaxprune.run_store.store import RunStore
from jaxprune.streaming.model import StreamedModel
from tests.helpers.command import failing
from tests.helpers.shapes import LINEARS, windows
from tests.helpers.tuning import Steps, kept_at, kernel, of_ids, pruned


def test_too_short_a_text_is_said_before_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_stream(of_ids(tmp_path), Tuning(tune_tokens=76 * 32))
    assert not caplog.text
    of_stream(of_ids(tmp_path), Tuning(tune_tokens=152 * 32))
    assert (
        "about 2,432 tokens that are not held out, and the tuning takes 4,864: it reads the text "
        "2.0 times" in caplog.text
    )


@pytest.mark.parametrize("to_end", [False, True])
def test_the_best_step_on_what_is_held_out_is_kept(
    to_end: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the start and sixteen measures the fifth is least; four after it the tuning stops, unless
    it is told not to."""
    monkeypatch.setattr(schedule, "BETWEEN", 1)
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
    found = list(distill(load(checkpoint), text, layers, tuning, context=Context(observer=seen)))
    np.testing.assert_array_equal(kernel(found[0], LINEARS[0]), at_fifth[0])
    assert text.steps.count == 32 and len(seen.told) == (32 if to_end else 16)
    assert [tokens for tokens, _ in seen.held_out] == [
        64 * 2 * n for n in range(17 if to_end else 9)
    ]


def test_a_stream_is_met_between_two_measures(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model's predictions are computed for as much of the text as is tuned on until the
    next measure."""
    monkeypatch.setattr(schedule, "BETWEEN", 1)
    passes, seen, states_of = [], Steps(), StreamedModel.final_states

    def counted(model: StreamedModel, windows: np.ndarray) -> Any:
        passes.append((windows.shape, len(seen.told)))
        return states_of(model, windows)

    monkeypatch.setattr(StreamedModel, "final_states", counted)
    tuning = Tuning(tune_tokens=8 * 2 * 4 * 32, tune_windows=2, tune_to_end=True)
    list(
        distill(
            load(checkpoint),
            of_stream(of_ids(tmp_path), tuning),
            pruned(checkpoint),
            tuning,
            context=Context(observer=seen),
        )
    )
    assert len(seen.held_out) == 17 and passes[0] == ((4, 32), 0)  # what is held out
    assert passes[1:] == [((4, 32), 2 * n) for n in range(16)]


def test_the_divergence_is_that_of_the_models(checkpoint: Path, tmp_path: Path) -> None:
    """Before a step moves anything, a step's own divergence and the measured one are those of the
    two models."""
    model, layers = load(checkpoint), pruned(checkpoint)
    tokens = of_ids(tmp_path).held_out
    own = Student(model, layers, Placement(True, True))
    (dense,) = model.final_states(tokens)
    measured = own.divergence(tokens, dense)
    assert measured == pytest.approx(
        own.step(tokens, dense.read(slice(None)), 1, lambda _: 0.0), rel=1e-5
    )
    assert 0.001 < measured < 10


def test_a_kernel_that_is_not_finite_is_not_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no held-out token comes to it, as to an expert's."""
    layers, tuning, stored = pruned(checkpoint), Tuning(tune_tokens=4 * 32), Student.stored
    monkeypatch.setattr(
        Student,
        "stored",
        lambda *one: {name: np.full_like(kernel, np.nan) for name, kernel in stored(*one).items()},
    )
    with pytest.raises(InputError, match="a kernel of the distillation is NaN"):
        list(distill(load(checkpoint), of_stream(of_ids(tmp_path), tuning), layers, tuning))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_stream_goes_on_where_it_was_stopped(
    dtype: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, tuning = pruned(checkpoint), Tuning(tune_tokens=16 * 32)
    text, whole, rest = of_stream(of_ids(tmp_path), tuning), Steps(), Steps()
    model = load(checkpoint, dtype=dtype)
    expected = list(distill(model, text, layers, tuning, context=Context(observer=whole)))
    store = RunStore(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped here"):
        patch.setattr(Student, "step", failing(Student.step, 10))
        patch.setattr(RunStore, "worth_saving", kept_at(9))
        list(distill(model, text, layers, tuning, context=Context(store)))
    found = list(distill(model, text, layers, tuning, context=Context(store, rest)))
    assert rest.told == whole.told[9:] and rest.held_out == whole.held_out
    assert (whole.resumed, rest.resumed) == ([], [9])
    for one, other in zip(found, expected, strict=True):
        for path, array in one.params.items():
            np.testing.assert_array_equal(array, other.params[path])
    store.close()


@pytest.mark.parametrize(("of", "stop"), [("stream", 3), ("windows", 7), ("stream", 12)])
def test_a_run_that_goes_on_computes_the_dense_model_for_the_same_windows_together(
    of: str, stop: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape of a product decides how it is rounded, most of all in bfloat16. It is what plans
    count, too."""
    layers, states_of, model = pruned(checkpoint), StreamedModel.final_states, load(checkpoint)
    state = model.architecture.state_bytes
    monkeypatch.setattr(schedule, "DENSE_BYTES", 5 * 32 * state)
    tuning = Tuning(tune_epochs=1.5) if of == "windows" else Tuning(tune_tokens=18 * 32)
    text = (
        of_windows(windows()[:, :32], tuning, 0)
        if of == "windows"
        else of_stream(of_ids(tmp_path, 2), tuning)
    )
    passes: list[np.ndarray] = []

    def counted(model: StreamedModel, windows: np.ndarray) -> Any:
        passes.append(windows)
        return states_of(model, windows)

    monkeypatch.setattr(StreamedModel, "final_states", counted)
    expected, whole = list(distill(model, text, layers, tuning)), passes[of == "stream" :]
    together = text.steps.together(state)
    assert together == 5 and [len(found) for found in whole] == text.steps.groups(state) == [
        5,
        5,
        5,
        3,
    ]
    store = RunStore(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped here"):
        patch.setattr(Student, "step", failing(Student.step, stop))
        patch.setattr(RunStore, "worth_saving", kept_at(stop - 1))
        list(distill(model, text, layers, tuning, context=Context(store)))
    passes.clear()
    monkeypatch.setattr(RunStore, "worth_saving", kept_at(18 - (stop - 1)))
    found = list(distill(model, text, layers, tuning, context=Context(store)))
    again = passes[of == "stream" :]
    assert len(again) == 4 - (stop - 1) // together
    for one, other in zip(again, whole[-len(again) :], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(found, expected, strict=True):
        for path, array in one.params.items():
            np.testing.assert_array_equal(array, other.params[path])
    passes.clear()
    list(distill(model, text, layers, tuning, context=Context(store)))  # all steps are kept
    assert len(passes) == (of == "stream")
    store.close()


def test_a_run_that_was_stopped_after_its_tuning_tells_its_measures_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    recipe = Recipe(Magnitude(), Unstructured(0.5), tuning=Tuning(tune_tokens=16 * 32))
    (tmp_path / "store").mkdir()
    store, first, again = RunStore(tmp_path / "store"), Steps(), Steps()
    model, stream = load(checkpoint), of_ids(tmp_path)
    for observer in (first, again):
        list(prune_model(model, windows(), recipe, stream=stream, context=Context(store, observer)))
    assert len(first.told) == 16 and len(first.held_out) > 1
    assert again.told == [] and again.held_out == first.held_out
    store.close()
