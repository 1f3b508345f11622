"""Windows that a tuning does not see: the divergence on them, the step at which it was least, and when to stop."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from convert import Params
from jaxprune.pruning.student import Student
from jaxprune.streaming.model import StreamedModel

PATIENCE = 4
"""So many measures behind the best one, the divergence no longer falls."""
MEASURES = 16
"""How often the divergence is measured at most, behind the first time, which is before the first step."""
SHARE = 5
"""What is tuned on between two measures, at least, in tokens over those of the windows that are held out: a measure
takes a quarter of a step's time a token, so all take a twentieth."""


def measured(steps: int, tokens: int, held_out: int) -> Sequence[int]:
    """Returns the numbers of the steps, from 1, after which the divergence is measured; the last is one of them.

    Args:
        steps: how many there are.
        tokens: of all of them.
        held_out: tokens of the windows that are held out.
    """
    count = min(MEASURES, max(2, tokens // (SHARE * held_out)))
    return sorted({math.ceil(steps * (number + 1) / count) for number in range(count)})


class HeldOut:
    """The divergence of a student on windows that it is not tuned on.

    Args:
        model: the dense model.
        windows: token ids, [windows, length].

    Attributes:
        curve: (tokens that were tuned on, divergence) of each measure.
        best: of each layer, name -> the kernel as it is to be stored from the best measure; None: there is none.
    """

    def __init__(self, model: StreamedModel, windows: Int[np.ndarray, "h t"]) -> None:
        self._windows = windows
        (self._dense,) = model.final_states(windows)
        self.curve: list[tuple[int, float]] = []
        self.best: Sequence[Params] | None = None

    def measure(self, student: Student, tokens: int) -> float:
        """Measures the divergence after so many tokens; keeps the student's kernels where it was never less."""
        divergence = student.divergence(self._windows, self._dense)
        if all(divergence < other for _, other in self.curve):
            self.best = [student.stored(index) for index in range(len(student.state))]
        self.curve.append((tokens, divergence))
        return divergence

    @property
    def falls(self) -> bool:
        """Whether the divergence still falls."""
        divergences = [divergence for _, divergence in self.curve]
        return len(divergences) - int(np.argmin(divergences)) <= PATIENCE if divergences else True
