"""The state of a tuning in a run's journal, and its measures. Layers without pruned kernels have no
state."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from convert import Params
from jaxprune.pruning.adafactor import Kernels, Moving
from jaxprune.pruning.journal import CURVE, TUNING, DamagedEntryError, Entry, Journal
from jaxprune.sharding import fetch

log = logging.getLogger(__name__)
MASK = "mask"
"""After the name of a kernel: the bits of its mask."""
BEST = "best"
"""Before the names of the kernels that were best."""


class Kept(NamedTuple):
    """What a tuning goes on with.

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


def keep(journal: Journal | None, state: Sequence[Kernels], kept: Kept) -> None:
    """Keeps what steps changed of each layer's kernels, and their masks, if the work since the last
    time was long enough."""
    changed = [(kernels.moving, kernels.masks) for kernels in state]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((changed, kept.best)))
    if not (journal and journal.worth_keeping(size)):
        return
    with journal.keeping():
        for index, kernels in enumerate(state):
            if kernels.moving:
                moving, masks = fetch((kernels.moving, kernels.masks))
                arrays = {
                    f"{name}/{field}": a
                    for name, one in moving.items()
                    for field, a in one._asdict().items()
                }
                arrays |= {f"{name}/{MASK}": mask for name, mask in masks.items()}
                arrays |= (
                    {f"{BEST}/{name}": kernel for name, kernel in kept.best[index].items()}
                    if kept.best
                    else {}
                )
                metadata = {"before": kept.before, "curve": [list(point) for point in kept.curve]}
                journal.put(f"{TUNING}/{kept.step}/{index}", arrays, metadata)
        journal.wait()
    for other in journal.names(TUNING):
        if other != str(kept.step):
            journal.drop(f"{TUNING}/{other}")


def restore(
    journal: Journal | None,
    state: Sequence[Kernels],
    take: Callable[[int, dict[str, Moving], Params], None],
) -> Kept | None:
    """Returns what was kept of a tuning; None where nothing was. What a version with another
    optimizer kept is passed over, which is said.

    Args:
        journal: where it was kept; None: nowhere.
        state: the kernels of each layer before the first step.
        take: is given a layer's index, what steps changed of it, and the bits of its masks, one
            layer after the other.
    """
    names = {
        index: {f"{name}/{field}" for name in kernels.moving for field in (*Moving._fields, MASK)}
        for index, kernels in enumerate(state)
        if kernels.moving
    }
    for step in sorted(map(int, journal.names(TUNING)), reverse=True) if journal else ():
        assert journal
        # All are looked at before one is taken, and none stays meanwhile.
        found = {index: _names(journal.get(f"{TUNING}/{step}/{index}")) for index in names}
        if found != names:
            if None not in found.values():
                log.warning(
                    "the tuning begins again: what was kept of it is of another version of jaxprune"
                )
            continue
        best: list[Params] = [{} for _ in state]
        metadata: dict[str, Any] = {}
        for index in names:
            entry = journal.get(f"{TUNING}/{step}/{index}")
            if entry is None:
                raise DamagedEntryError(
                    "the tuning was damaged on the disk while it was used: run the same command "
                    "again"
                )
            arrays, metadata = entry.arrays, entry.metadata
            moving = {
                n: Moving(*(arrays[f"{n}/{field}"] for field in Moving._fields))
                for n in state[index].moving
            }
            best[index] = {
                path.partition("/")[2]: a
                for path, a in arrays.items()
                if path.startswith(f"{BEST}/")
            }
            take(index, moving, {name: arrays[f"{name}/{MASK}"] for name in moving})
        curve = [(int(n), float(kl)) for n, kl in metadata.get("curve", [])]
        return Kept(step, metadata.get("before", 1.0), curve, best if any(best) else None)
    return None


def _names(entry: Entry | None) -> set[str] | None:
    return entry and {path for path in entry.arrays if not path.startswith(f"{BEST}/")}


def keep_curve(journal: Journal | None, curve: list[tuple[int, float]]) -> None:
    """Keeps the measures of a tuning that has ended; its state goes once all layers are tuned."""
    if journal and curve:
        tokens, divergences = zip(*curve, strict=True)
        journal.put(CURVE, {"tokens": np.array(tokens), "divergences": np.array(divergences)}, {})


def curve(journal: Journal | None) -> list[tuple[int, float]]:
    """Returns the measures of a tuning that has ended; none where none was kept."""
    entry = journal.get(CURVE) if journal else None
    columns = (
        [entry.arrays[name].tolist() for name in ("tokens", "divergences")] if entry else [(), ()]
    )
    return [*zip(*columns, strict=True)]
