"""A run store by itself: what goes in comes out, and what has changed does not."""

import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.errors import CheckpointError
from convert.ownership import has_checksum
from jaxprune.run_store import store as store_module
from jaxprune.run_store.store import RunStore, Saved, Stage
from jaxprune.streaming.hidden_states import HiddenStates
from tests.helpers.damage import damage

ARRAYS = {
    "a.b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "a/c": np.array(3, np.int32),
    "d": np.ones((2, 2), ml_dtypes.bfloat16),
    "e.f.g": np.zeros(3, np.uint8),
    "half": np.full((3, 1), 0.1, np.float16),
    "mask": np.array([[True, False, True]]),
    "none": np.zeros((0, 4), ml_dtypes.bfloat16),
    "point": np.array(-0.0, np.float64),
    "wide": np.array([2**62, -(2**62)]),
    "": np.array([np.nan, np.inf], np.float32),
}


CODEC: tuple[Any, Any] = (lambda saved: saved, lambda _, saved: saved)


def stage_of(store: RunStore) -> Stage[Saved]:
    return Stage(store, "stage", *CODEC)


def states_of(values: np.ndarray) -> HiddenStates:
    states = HiddenStates(values.shape, values.dtype, batch=2)
    states.array[...] = values
    return states


def test_arrays_come_back_as_they_went(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.put("stage/0.5/x", ARRAYS, {"x": [1.5, None]})
    store.put("stage/none", {}, {})
    store.close()
    again = RunStore(tmp_path)
    saved = again.get("stage/0.5/x")
    assert saved and saved.figures == {"x": [1.5, None]} and saved.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert saved.arrays[name].dtype == array.dtype and saved.arrays[name].shape == array.shape
        np.testing.assert_array_equal(saved.arrays[name], array)
    assert again.get("stage/none") == ({}, {}) and again.get("stage/1") is None
    assert again.names("stage") == ["0.5/x", "none"] and again.names("other") == []
    again.drop("stage")
    assert again.names("stage") == [] and not (tmp_path / "stage").exists()


def test_the_same_results_are_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        store = RunStore(folder)
        store.put("stage/0", ARRAYS, {"x": 1})
        store.close()
        made.append(store.path("stage/0").read_bytes())
    assert made[0] == made[1]


def test_many_results(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for number in range(300):
        store.put(f"stage/{number % 7}/{number}", {"x": np.full(2, number)}, {})
    store.close()
    assert len(store.names("stage")) == 300
    for number in (0, 150, 299):
        saved = store.get(f"stage/{number % 7}/{number}")
        assert saved and saved.arrays["x"].tolist() == [number, number]


@pytest.mark.parametrize("how", ["truncated", "bit-flipped", "emptied", "another's", "renamed"])
def test_a_damaged_result_is_reported_once_and_quarantined(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = RunStore(tmp_path)
    store.put("stage/0", ARRAYS, {})
    store.put("stage/1", ARRAYS, {})
    store.close()
    path = store.path("stage/1")
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "another's":  # whole, but of a run with another token
        (tmp_path / "other").mkdir()
        other = RunStore(tmp_path / "other", "1")
        other.put("stage/1", ARRAYS, {})
        other.close()
        shutil.copyfile(other.path("stage/1"), path)
    elif how == "renamed":
        shutil.copyfile(store.path("stage/0"), path)
    else:
        damage(path, how)
    content = path.read_bytes()
    again = RunStore(tmp_path)
    assert again.get("stage/1") is None and again.get("stage/1") is None
    assert caplog.text.count("1.safetensors is damaged and will be made again") == 1
    assert [one.read_bytes() for one in again.quarantine.rglob("*.safetensors.*")] == [content]
    assert again.get("stage/0") is not None
    again.put("stage/1", ARRAYS, {})
    again.close()
    assert again.get("stage/1") is not None


def test_an_error_of_a_save_comes_with_the_next_call(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    (tmp_path / "stage").write_text("in the way")
    store.put("stage/0", ARRAYS, {})
    with pytest.raises(CheckpointError, match="stage"):
        store.put("stage/1", ARRAYS, {})
    store.close()


def test_new_digests_are_there_before_what_was_made_of_the_weights(tmp_path: Path) -> None:
    store, seen = RunStore(tmp_path), []
    known = iter([{"a": 1}, None, {"b": 2}, {"c": 3}])
    store.new_digests = lambda: seen.append(store.path("stage/0").exists()) or next(known)
    for number in range(3):
        store.put(f"stage/{number}", {}, {})
    states = {"x": states_of(np.zeros((4, 3, 2)))}
    store._last_saved = -math.inf  # long ago
    stage_of(store).put_states(states, 1)
    store.close()
    found = [RunStore(tmp_path).get(f"weights/{number}") for number in range(3)]
    assert [saved and saved.figures for saved in found] == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert seen == [False, True, True, True]


def test_states_are_saved_when_the_work_was_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(store_module.time, "monotonic", lambda: clock[0])
    store = RunStore(tmp_path)
    values = np.arange(24.0).reshape(4, 3, 2)
    states, saved, stage = {"x": states_of(values)}, [], stage_of(store)
    real = RunStore._file

    def slow(*args: Any) -> Any:
        clock[0] += 1.0
        return real(*args)

    monkeypatch.setattr(RunStore, "_file", slow)
    for step in range(50):
        clock[0] += 2.0
        stage.put_states(states, step)
        if (found := store.get("stage/states", None)) and found.figures["position"] == step:
            saved.append(step)
    assert saved == [0, 11, 22, 33, 44]  # every 20 seconds and more, once it is known to take one
    empty = {"x": states_of(np.zeros_like(values))}
    assert stage.states(lambda step: step == 44, lambda: empty) == (44, empty)
    np.testing.assert_array_equal(empty["x"].array, values)
    narrow = {"x": states_of(np.zeros((4, 3, 2), np.float32))}
    assert stage.states(lambda step: step == 44, lambda: narrow) is None
    assert stage.states(lambda step: step < 44, lambda: empty) is None
    assert Stage(store, "none", *CODEC).states(lambda _: True, lambda: empty) is None
    assert has_checksum(store.path("stage/states"))
    store.close()
