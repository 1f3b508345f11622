"""The sweep over a model's layers: one is visited while the next one is read."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

from jaxprune.streaming.hidden_states import HiddenStates

T = TypeVar("T")
R = TypeVar("R")


class Results(Generic[R]):
    """Where the results of a sweep are saved, by index; this one saves nothing."""

    def __contains__(self, index: int) -> bool:
        return False

    def put(self, index: int, result: R) -> None:
        """Saves a result, unless it is there."""

    def get(self, index: int) -> R | None:
        """Returns a result; None where it is missing or damaged."""
        return None

    def put_states(self, states: Mapping[str, HiddenStates], position: int) -> None:
        """Saves hidden states of the sweep, if the work since the last time was long enough.

        Args:
            states: the states by name.
            position: how far they are, of the sweep's own choice.
        """

    def states(
        self, usable: Callable[[int], bool], empty: Callable[[], Mapping[str, HiddenStates]]
    ) -> tuple[int, Mapping[str, HiddenStates]] | None:
        """Returns how far the saved hidden states are, and them; None where none are usable.

        Args:
            usable: whether states of a position are.
            empty: returns the states to fill, block by block; saved ones of other shapes or dtypes
                are not usable.
        """
        return None


@runtime_checkable
class States(Protocol):
    """Hidden states that go through the layers with a sweep."""

    def catch_up(self, index: int) -> None:
        """Moves the states to a layer's input, through layers whose results are saved."""

    def layer_done(self, index: int) -> None:
        """Is called after a layer's result was saved: the states are now the layer's output."""


def sweep(
    order: Sequence[int],
    source: Callable[[Sequence[int]], Iterator[T]],
    visit: Callable[[int, T, dict[str, float]], R],
    *,
    saved: Results[R] | None = None,
    states: States | None = None,
) -> Iterator[R]:
    """Visits layers in order, and yields their results as they are asked for.

    Args:
        order: indices of the layers.
        source: indices -> what a visit starts from, of each; reads ahead of its use.
        visit: index, what it starts from, seconds by phase so far -> result.
        saved: where results are saved as soon as they are made, and taken from where they are saved
            already; None: nowhere.
        states: the states that visits move; None: there are none.
    """
    saved = Results() if saved is None else saved
    missing = [index for index in order if index not in saved]
    ahead = source(missing)
    for index in order:
        if (found := saved.get(index)) is not None:
            yield found
            continue
        seconds: dict[str, float] = {}
        with timed(seconds, "read"):
            # a result that is damaged is missed only now
            given = next(ahead if index in missing else source([index]))
            if states:
                states.catch_up(index)
        result = visit(index, given, seconds)
        del given
        saved.put(index, result)
        if states:
            states.layer_done(index)
        yield result
        del result


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds of what is done to those of a phase."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
