"""The store and the observer of a run, which every phase takes."""

import contextlib
import dataclasses
from collections.abc import Iterator

from jaxprune.run_store.store import RunStore
from jaxprune.streaming.observer import SILENT, Observer
from jaxprune.streaming.sweep import timed


@dataclasses.dataclass(frozen=True)
class Context:
    """The store and the observer of a run.

    Attributes:
        store: where finished work is saved and looked up; None: nothing is saved.
        observer: is notified of progress.
    """

    store: RunStore | None = None
    observer: Observer = SILENT

    def drop(self, *names: str) -> None:
        """Removes saved results, or all of stages."""
        if self.store:
            self.store.drop(*names)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Notifies the observer of the seconds that a block takes."""
        seconds: dict[str, float] = {}
        with timed(seconds, phase):
            yield
        self.observer.phase_timed(phase, seconds[phase])


NO_STORE = Context()
"""Saves nothing and notifies nobody."""
