"""What happens while a model is pruned or measured, for whoever wants to know: progress bars, records, callbacks."""

from typing import Any


class Observer:
    """Is told what happens; each method does nothing here, so that a subclass defines only those that it wants."""

    def planned(self, need: Any) -> None:
        """The work is known to fit; `need` is what it takes (`planning.work.Need`)."""

    def started(self, what: str, layers: int) -> None:
        """Layers are about to be visited, so many of them, for what `what` says."""

    def layer_done(self, result: Any) -> None:
        """A layer is pruned; `result` is its `pruning.results.LayerResult`."""

    def layer_visited(self, index: int) -> None:
        """A layer was visited by what was started last."""

    def phase_timed(self, phase: str, seconds: float) -> None:
        """A phase took so many more seconds; those of a single layer are in its result."""

    def finished(self, result: Any) -> None:
        """The result is in its place: an `api.prune.PruningResult` or an `api.evaluate.Evaluation`."""

    def epoch_done(self, epoch: int, divergence: float) -> None:
        """An epoch of the distillation is over; this was the mean KL divergence before its steps, in nats."""


class Observers(Observer):
    """Tells several observers.

    Args:
        observers: who are told, in order.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def planned(self, need: Any) -> None:
        for one in self._observers:
            one.planned(need)

    def started(self, what: str, layers: int) -> None:
        for one in self._observers:
            one.started(what, layers)

    def layer_done(self, result: Any) -> None:
        for one in self._observers:
            one.layer_done(result)

    def layer_visited(self, index: int) -> None:
        for one in self._observers:
            one.layer_visited(index)

    def phase_timed(self, phase: str, seconds: float) -> None:
        for one in self._observers:
            one.phase_timed(phase, seconds)

    def finished(self, result: Any) -> None:
        for one in self._observers:
            one.finished(result)

    def epoch_done(self, epoch: int, divergence: float) -> None:
        for one in self._observers:
            one.epoch_done(epoch, divergence)


SILENT = Observer()
"""Nobody who wants to know."""
