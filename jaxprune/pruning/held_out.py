"""Windows that a tuning does not see: the divergence on them, the step at which it was least, and when to stop."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from convert import Params
from jaxprune.pruning.student import Student
from jaxprune.streaming.model import StreamedModel

PATIENCE = 4
"""So many measures behind the best one, the divergence no longer falls."""


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
            self.best = None  # so that there is never more than one
            self.best = [student.stored(index) for index in range(len(student.state))]
        self.curve.append((tokens, divergence))
        return divergence

    def falls(self, begin: int) -> bool:
        """Returns whether the divergence still falls, by measures after so many tokens and more: while masks move, it
        may rise for a while."""
        best = min(range(len(self.curve)), key=lambda place: self.curve[place][1])
        return sum(tokens >= begin for tokens, _ in self.curve[best + 1 :]) < PATIENCE
