"""The state of a tuning in a run's journal, and its measures. Layers without pruned kernels have no state."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from convert import Params
from jaxprune.pruning.adafactor import Kernels, Moving
from jaxprune.pruning.journal import CURVE, TUNING, Journal
from jaxprune.sharding import fetch

log = logging.getLogger(__name__)
BEST = "best"
"""Before the names of the kernels that were best."""


class Kept(NamedTuple):
    """What a tuning goes on with.

    Attributes:
        step: the number of the last step.
        moving: of each layer, what steps change.
        before: the mean divergence of the first steps so far.
        curve: the divergence on held-out windows so far: (tokens that were tuned on, divergence) of each measure.
        best: of each layer, name -> the kernel as it is to be stored from the best step so far; None: there is none.
    """

    step: int
    moving: Sequence[dict[str, Moving]]
    before: float
    curve: list[tuple[int, float]]
    best: Sequence[Params] | None


def keep(journal: Journal | None, kept: Kept) -> None:
    """Keeps the state after a step, if the work since the last time was long enough."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((kept.moving, kept.best)))
    if not (journal and journal.worth_keeping(size)):
        return
    with journal.keeping():
        for index, moving in enumerate(kept.moving):
            if moving:
                arrays = {
                    f"{name}/{field}": a for name, one in fetch(moving).items() for field, a in one._asdict().items()
                }
                arrays |= {f"{BEST}/{name}": kernel for name, kernel in kept.best[index].items()} if kept.best else {}
                metadata = {"before": kept.before, "curve": [list(point) for point in kept.curve]}
                journal.put(f"{TUNING}/{kept.step}/{index}", arrays, metadata)
        journal.wait()
    for other in journal.names(TUNING):
        if other != str(kept.step):
            journal.drop(f"{TUNING}/{other}")


def restore(journal: Journal | None, state: Sequence[Kernels]) -> Kept | None:
    """Returns what was kept of kernels; None where nothing was. What a version with another optimizer kept is passed
    over, which is said."""
    names = {
        index: {f"{name}/{field}" for name in kernels.moving for field in Moving._fields}
        for index, kernels in enumerate(state)
        if kernels.moving
    }
    for step in sorted(map(int, journal.names(TUNING)), reverse=True) if journal else ():
        assert journal
        entries = {index: journal.get(f"{TUNING}/{step}/{index}") for index in names}
        found = {index: entry for index, entry in entries.items() if entry and names[index] == _names(entry.arrays)}
        if len(found) < len(names):
            if all(entries.values()):
                log.warning("the tuning begins again: what was kept of it is of another version of jaxprune")
            continue
        moving: list[dict[str, Moving]] = [{} for _ in state]
        best: list[Params] = [{} for _ in state]
        for index, entry in found.items():
            arrays, fields = entry.arrays, Moving._fields
            moving[index] = {n: Moving(*(arrays[f"{n}/{field}"] for field in fields)) for n in state[index].moving}
            best[index] = {path.partition("/")[2]: a for path, a in arrays.items() if path.startswith(f"{BEST}/")}
        metadata = next(iter(found.values())).metadata
        curve = [(int(n), float(kl)) for n, kl in metadata.get("curve", [])]
        before = metadata.get("before", 1.0)  # by which an earlier version tuned everything
        return Kept(step, moving, before, curve, best if any(best) else None)
    return None


def _names(arrays: Params) -> set[str]:
    return {path for path in arrays if not path.startswith(f"{BEST}/")}


def keep_curve(journal: Journal | None, curve: list[tuple[int, float]]) -> None:
    """Keeps the measures of a tuning that has ended; its state goes once all layers are tuned."""
    if journal and curve:
        tokens, divergences = zip(*curve, strict=True)
        journal.put(CURVE, {"tokens": np.array(tokens), "divergences": np.array(divergences)}, {})


def curve(journal: Journal | None) -> list[tuple[int, float]]:
    """Returns the measures of a tuning that has ended; none where none was kept."""
    entry = journal.get(CURVE) if journal else None
    columns = [entry.arrays[name].tolist() for name in ("tokens", "divergences")] if entry else [(), ()]
    return [*zip(*columns, strict=True)]
