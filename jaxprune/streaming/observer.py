"""What happens while a model is pruned or measured, for whoever wants to know: progress bars,
records, callbacks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any


class Observer:
    """Is notified of progress; each method does nothing here, so that a subclass defines only those
    that it wants."""

    def planned(self, need: Any) -> None:
        """The work is known to fit; `need` is what it takes (`planning.estimate.Need`)."""

    def started(self, what: str, count: int, unit: str = "layers") -> None:
        """Work begins that visits layers, or takes steps or batches.

        Args:
            what: what is done, in words: which model, on which text, on how many tokens.
            count: number of layers, steps or batches.
            unit: what is counted.
        """

    def layer_done(self, result: Any) -> None:
        """A layer is pruned, or later quantized; `result` is a `solve.layer_result.LayerResult`."""

    def layer_visited(self, index: int) -> None:
        """One layer, step or batch of the phase that started last is done."""

    def phase_timed(self, phase: str, seconds: float) -> None:
        """A phase took so many more seconds; those of a single layer are in its result."""

    def tuning_resumed(self, step: int) -> None:
        """The tuning resumes after a step of an earlier process. The observer receives its
        measurements again."""

    def layer_tuned(self, result: Any) -> None:
        """A layer's kernels are tuned; `result` is its `solve.layer_result.LayerResult` after
        that."""

    def finished(self, result: Any) -> None:
        """The result is in its place: an `api.prune.PruningResult` or an
        `api.evaluate.Evaluation`."""

    def step_done(self, number: int, steps: int, divergence: float) -> None:
        """A distillation step is done; `number` counts from 1. `divergence` is the mean KL
        divergence of its tokens before the step, in nats."""

    def divergence_measured(self, tokens: int, divergence: float) -> None:
        """The mean KL divergence on held-out text was measured, in nats, after so many tuned
        tokens."""


class Observers(Observer):
    """Tells several observers.

    Args:
        observers: those to notify, in order.
    """

    def __init__(self, *observers: Observer) -> None:
        methods = [name for name in vars(Observer) if not name.startswith("_")]
        for name in methods:
            setattr(self, name, partial(_call_all, [getattr(one, name) for one in observers]))


def _call_all(methods: Sequence[Callable[..., None]], *args: Any, **kwargs: Any) -> None:
    for method in methods:
        method(*args, **kwargs)


SILENT = Observer()
"""An observer that does nothing."""
