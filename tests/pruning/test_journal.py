"""A run's journal by itself: what goes in comes out."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxprune.pruning import journal as journal_module
from jaxprune.pruning import kept_states
from jaxprune.pruning.journal import Journal
from jaxprune.streaming.hidden_states import HiddenStates


def test_arrays_come_back_as_they_went(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    arrays = {
        "a.b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a.c": np.array(3, np.int32),
        "d": np.ones((2, 2), ml_dtypes.bfloat16),
        "e.f.g": np.zeros(3, np.uint8),
    }
    journal.put("stage/0", arrays, {"x": [1.5, None]})
    journal.close()
    entry = Journal(tmp_path).get("stage/0")
    assert entry and entry.metadata == {"x": [1.5, None]} and entry.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert entry.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(entry.arrays[name], array)


def test_states_are_kept_when_the_work_was_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: clock[0])
    journal = Journal(tmp_path)
    states = {"x": HiddenStates((4, 3, 2), np.dtype(float), batch=2)}
    states["x"].array[...] = np.arange(24.0).reshape(4, 3, 2)
    kept = []
    real = kept_states._write

    def slow(*args: Any, **options: Any) -> str:
        clock[0] += 1.0
        return real(*args, **options)

    monkeypatch.setattr(kept_states, "_write", slow)
    for step in range(50):
        clock[0] += 2.0
        kept_states.keep(journal, "stage", step, states)
        if kept_states.position(journal, "stage") == step:
            kept.append(step)
    assert kept == [0, 11, 22, 33, 44]  # every 20 seconds and more, once it is known to take one
    found = {"x": HiddenStates((4, 3, 2), np.dtype(float), batch=2)}
    assert kept_states.restore(journal, "stage", found)
    np.testing.assert_array_equal(found["x"].array, states["x"].array)
    journal.close()
