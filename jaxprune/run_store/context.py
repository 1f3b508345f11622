"""What a run carries beside its model and recipe."""

import contextlib
import dataclasses
from collections.abc import Iterator

from jaxprune.run_store.store import RunStore
from jaxprune.streaming.observer import SILENT, Observer
from jaxprune.streaming.sweep import timed


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a run saves what it finishes, and whom it tells.

    Attributes:
        store: where all that is finished is saved, and taken from where it is saved already; None:
            nothing is saved.
        observer: is told what happens.
    """

    store: RunStore | None = None
    observer: Observer = SILENT

    def drop(self, *names: str) -> None:
        """Removes saved results, or all of stages."""
        if self.store:
            self.store.drop(*names)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Tells the observer the seconds of what is done."""
        seconds: dict[str, float] = {}
        with timed(seconds, phase):
            yield
        self.observer.phase_timed(phase, seconds[phase])


NOWHERE = Context()
"""Nothing is saved, and nobody told."""
