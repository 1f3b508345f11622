"""How many steps a tuning has, and what is done together."""

import pytest

from jaxprune import Tuning
from jaxprune.calibration.text_stream import windows_held_out
from jaxprune.distill.schedule import TuningSteps


@pytest.mark.parametrize(("tokens", "count"), [(1000, 2), (8 * 5 * 320, 8), (10**6, 16)])
def test_there_are_as_many_measures_as_the_text_has_room_for(tokens: int, count: int) -> None:
    steps = TuningSteps.of(Tuning(tune_tokens=tokens), 1, 32, 320)
    after = steps.measured
    assert steps.count == round(tokens / 32)
    assert len(after) == count and after[-1] == steps.count and min(after) >= steps.count // count
    assert TuningSteps.of(Tuning(tune_tokens=32), 1, 32, 320).measured == [1]


@pytest.mark.parametrize(
    ("tuning", "length", "groups"),
    [
        # 61 steps from one measure to the next
        (Tuning(tune_tokens=10**6, tune_chunks=2), 2048, [*15 * [64], 17]),
        # 4 steps of one batch each
        (Tuning(tune_tokens=10**6, tune_windows=8), 2048, [*15 * [32], 8]),
        (Tuning(tune_tokens=10**6), 512, [*15 * [128], 33]),
        (Tuning(tune_epochs=2), 2048, [128]),
        (Tuning(tune_epochs=2), 4096, 4 * [64]),  # 2 GiB
        (Tuning(tune_epochs=1, tune_windows=3), 4096, [60, 60, 9]),
    ],
)
def test_groups_are_of_whole_batches(tuning: Tuning, length: int, groups: list[int]) -> None:
    """Of LLaMA-7B in 16 bits, on a GPU, which takes 16384 tokens at a time; but for the last."""
    steps = TuningSteps.of(
        tuning, 128, length, windows_held_out(length) * length if tuning.tune_tokens else 0
    )
    assert steps.groups(2 * 4096, 16384) == groups
