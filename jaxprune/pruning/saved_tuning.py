"""How a run saves a tuning: its state, and its measures. Layers without pruned kernels have no
state."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from convert import Params
from jaxprune.pruning.adafactor import Kernels, Moving
from jaxprune.pruning.store import CURVE, TUNING, RunStore, damaged, flat, grouped
from jaxprune.sharding import fetch

log = logging.getLogger(__name__)
FIELDS = list(Moving._fields)


class Progress(NamedTuple):
    """What a tuning continues with.

    Attributes:
        step: the number of the last step.
        before: the mean divergence of the first steps so far.
        curve: the divergence on held-out windows so far: (tokens that were tuned on, divergence) of
            each measure.
        best: of each layer, name -> the kernel as it is to be stored from the best step so far;
            None: there is none.
    """

    step: int
    before: float
    curve: list[tuple[int, float]]
    best: Sequence[Params] | None


def save(store: RunStore | None, state: Sequence[Kernels], progress: Progress) -> None:
    """Saves what steps changed of each layer's kernels, and their masks, if the work since the last
    time was long enough."""
    changed = [(kernels.moving, kernels.masks) for kernels in state]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((changed, progress.best)))
    if not (store and store.worth_saving(size)):
        return
    figures = {"fields": FIELDS, "before": progress.before, "curve": progress.curve}
    with store.saving():
        for index, kernels in enumerate(state):
            if kernels.moving:
                moving, masks = fetch((kernels.moving, kernels.masks))
                fields = {
                    field: {name: getattr(one, field) for name, one in moving.items()}
                    for field in FIELDS
                }
                best = progress.best[index] if progress.best else {}
                arrays = flat(**fields, mask=masks, best=best)
                store.put(f"{TUNING}/{progress.step}/{index}", arrays, figures)
        store.wait()
    others = (step for step in _steps(store) if step != progress.step)
    store.drop(*(f"{TUNING}/{step}" for step in others))


def restore(
    store: RunStore | None,
    state: Sequence[Kernels],
    take: Callable[[int, dict[str, Moving], Params], None],
) -> Progress | None:
    """Returns what was saved of a tuning; None where nothing was. What a version with another
    optimizer saved is passed over, which is reported.

    Args:
        store: where it was saved; None: nowhere.
        state: the kernels of each layer before the first step.
        take: is given a layer's index, what steps changed of it, and the bits of its masks, one
            layer after the other.
    """
    indices = [index for index, kernels in enumerate(state) if kernels.moving]
    for step in _steps(store) if store else ():
        assert store
        names = [f"{TUNING}/{step}/{index}" for index in indices]
        # All are looked at before one is taken.
        found = [store.get(name, only=()) for name in names]
        if None in found:
            continue
        if any(saved and saved.figures.get("fields") != FIELDS for saved in found):
            log.warning(
                "the tuning begins again: what was saved of it is of another version of jaxprune"
            )
            continue
        best: list[Params] = [{} for _ in state]
        figures: dict[str, Any] = {}
        for index, name in zip(indices, names, strict=True):
            saved = store.get(name)
            if saved is None:
                raise damaged("the tuning")
            groups, figures = grouped(saved.arrays), saved.figures
            moving = {
                linear: Moving(*(groups[field][linear] for field in FIELDS))
                for linear in state[index].moving
            }
            best[index] = groups["best"]
            take(index, moving, groups["mask"])
        curve = [(tokens, divergence) for tokens, divergence in figures.get("curve", ())]
        return Progress(step, figures.get("before", 1.0), curve, best if any(best) else None)
    return None


def _steps(store: RunStore) -> list[int]:
    """Returns the steps of which something is saved, the last first."""
    found = {name.partition("/")[0] for name in store.names(TUNING)}
    return sorted((int(step) for step in found if step.isdecimal()), reverse=True)


def save_curve(store: RunStore | None, curve: list[tuple[int, float]]) -> None:
    """Saves the measures of a tuning that has ended; its state goes once all layers are tuned."""
    if store and curve:
        store.put(CURVE, {}, {"curve": curve})


def curve(store: RunStore | None) -> list[tuple[int, float]]:
    """Returns the measures of a tuning that has ended; none where none was saved."""
    saved = store.get(CURVE) if store else None
    return [(tokens, divergence) for tokens, divergence in saved.figures["curve"]] if saved else []
