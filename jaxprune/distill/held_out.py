"""Windows that a tuning does not see: the divergence on them, the step at which it was least, and
when to stop."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from convert import Params
from jaxprune.distill.student import Student
from jaxprune.streaming.model import StreamedModel

PATIENCE = 4
"""So many measures after the best one, the divergence no longer falls."""


class HeldOut:
    """The divergence of a student on windows that it is not tuned on.

    Args:
        model: the dense model.
        windows: token ids, [windows, length].
        begin: measures after so many tokens count, and after more: before, the student has too few
            zeros.

    Attributes:
        curve: (tokens that were tuned on, divergence) of each measure.
        best: of each layer, name -> the kernel as it is to be stored from the best measure that
            counts; None: there is none.
    """

    def __init__(self, model: StreamedModel, windows: Int[np.ndarray, "h t"], begin: int) -> None:
        self._windows, self._begin = windows, begin
        (self._dense,) = model.final_states(windows)
        self.curve: list[tuple[int, float]] = []
        self.best: Sequence[Params] | None = None

    def measure(self, student: Student, tokens: int) -> float:
        """Measures the divergence after so many tokens; keeps the student's kernels where it
        counts, and none was as small."""
        divergence = student.divergence(self._windows, self._dense)
        if tokens >= self._begin and all(divergence < other for other in self._counting()):
            self.best = None  # so that there is never more than one
            self.best = [student.stored(index) for index in range(len(student.state))]
        self.curve.append((tokens, divergence))
        return divergence

    def _counting(self) -> list[float]:
        return [divergence for tokens, divergence in self.curve if tokens >= self._begin]

    @property
    def falls(self) -> bool:
        """Whether the divergence still falls, or no measure counts yet."""
        divergences = self._counting()
        return not divergences or len(divergences) - int(np.argmin(divergences)) <= PATIENCE
