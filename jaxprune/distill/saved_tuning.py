"""Saves and restores a tuning: its state and its measurements.

Layers without pruned kernels have no state.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from convert import Params
from jaxprune.distill.adafactor import Kernels, Moving
from jaxprune.run_store.store import CURVE, TUNING, RunStore, damaged, grouped

log = logging.getLogger(__name__)
FIELDS = list(Moving._fields)


class Progress(NamedTuple):
    """The progress of a tuning that a later process continues.

    Attributes:
        step: the number of the last step.
        before: the mean divergence of the first steps so far.
        curve: (tuned tokens, divergence on held-out windows) of each measurement so far.
        best: for each layer, name -> kernel in its stored dtype from the best step so far; None:
            there is none.
    """

    step: int
    before: float
    curve: list[tuple[int, float]]
    best: Sequence[Params] | None


def save(store: RunStore | None, state: Sequence[Kernels], progress: Progress) -> None:
    """Saves the changing state of each layer's kernels, and their masks.

    Nothing is saved if too little time has passed since the last save.
    """
    if store is None:
        return
    arrays: dict[str, Any] = {}
    for index, kernels in enumerate(state):
        for linear, moving in kernels.moving.items():
            arrays |= {f"{index}/{field}/{linear}": getattr(moving, field) for field in FIELDS}
            arrays[f"{index}/mask/{linear}"] = kernels.masks[linear]
    for index, best in enumerate(progress.best or ()):
        arrays |= {f"{index}/best/{linear}": kernel for linear, kernel in best.items()}
    figures = progress._replace(best=None)._asdict()
    store.put_states(TUNING, arrays, {"fields": FIELDS} | figures)


def restore(
    store: RunStore | None,
    state: Sequence[Kernels],
    take: Callable[[int, dict[str, Moving], Params], None],
) -> Progress | None:
    """Restores a saved tuning; returns None if there is none.

    A tuning that a version with another optimizer saved is ignored with a warning.

    Args:
        store: where it was saved; None: nowhere.
        state: the kernels of each layer before the first step.
        take: is called for each layer with its index, the changing state of its kernels and the
            bits of their masks.
    """
    saved = store.get(TUNING, None) if store else None
    if store is None or saved is None:
        return None
    figures = saved.figures
    if figures["fields"] != FIELDS:
        log.warning("the tuning starts over: its saved state is from another version of jaxprune")
        return None
    best: list[Params] = [{} for _ in state]
    for index, kernels in enumerate(state):
        if kernels.moving:
            if (saved := store.get(TUNING, f"{index}/")) is None:
                raise damaged("the tuning")
            groups = grouped(saved.arrays)
            moving = {
                linear: Moving(*(groups[field][linear] for field in FIELDS))
                for linear in kernels.moving
            }
            best[index] = groups["best"]
            take(index, moving, groups["mask"])
    curve = [(tokens, divergence) for tokens, divergence in figures["curve"]]
    return Progress(figures["step"], figures["before"], curve, best if any(best) else None)


def save_curve(store: RunStore | None, curve: list[tuple[int, float]]) -> None:
    """Saves the measurements of a finished tuning.

    The tuning's state is removed once all layers are tuned.
    """
    if store and curve:
        store.put(CURVE, {}, {"curve": curve})


def curve(store: RunStore | None) -> list[tuple[int, float]]:
    """Returns the measurements of a finished tuning; an empty list if none were saved."""
    saved = store.get(CURVE) if store else None
    return [(tokens, divergence) for tokens, divergence in saved.figures["curve"]] if saved else []
