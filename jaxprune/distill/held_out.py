"""Measures the divergence on held-out windows, finds the best step and decides when to stop."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from convert import Params
from jaxprune.distill.student import Student
from jaxprune.streaming.model import StreamedModel

PATIENCE = 4
"""The tuning stops after this many measurements without a new minimum."""


class HeldOut:
    """The divergence of a student on held-out windows.

    Args:
        model: the dense model.
        windows: token ids, [windows, length].
        begin: number of tuned tokens from which measurements count; the student has too few zeros
            before.

    Attributes:
        curve: (tuned tokens, divergence) of each measurement.
        best: for each layer, name -> kernel in its stored dtype at the best measurement that
            counts; None: there is none.
    """

    def __init__(self, model: StreamedModel, windows: Int[np.ndarray, "h t"], begin: int) -> None:
        self._windows, self._begin = windows, begin
        (self._dense,) = model.final_states(windows)
        self.curve: list[tuple[int, float]] = []
        self.best: Sequence[Params] | None = None

    def measure(self, student: Student, tokens: int) -> float:
        """Measures the divergence after `tokens` tuned tokens; keeps the kernels if it is
        lowest."""
        divergence = student.divergence(self._windows, self._dense)
        if tokens >= self._begin and all(divergence < other for other in self._counting()):
            self.best = None  # frees the previous one first
            self.best = [student.stored(index) for index in range(len(student.state))]
        self.curve.append((tokens, divergence))
        return divergence

    def _counting(self) -> list[float]:
        return [divergence for tokens, divergence in self.curve if tokens >= self._begin]

    @property
    def falls(self) -> bool:
        """Whether the divergence still falls, or no measurement counts yet."""
        divergences = self._counting()
        return not divergences or len(divergences) - int(np.argmin(divergences)) <= PATIENCE
