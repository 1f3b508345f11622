"""The end of a run: its result is complete, is moved to its place, and the run store is removed.

A result is complete once its marker is written. The marker's kind names the store and has the
digest of the masks, so that it shows whether what is at their places is this run's.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from convert import ownership
from convert.destination import Destination
from convert.errors import OccupiedError, UserError, joined
from convert.ownership import Listed
from convert.renaming import old
from convert.writing import names
from jaxprune.processes.collective import on_first_process
from jaxprune.run_store.store import RunStore

RUN, NEW_RUN, LOCK = "run.json", ".jaxprune-run.json.new", "lock"
"""The files of a store beside its saved results."""
EMPTY = Listed(size=0, sha256=hashlib.sha256().hexdigest())
log = logging.getLogger(__name__)


def finish(store: RunStore, files: Iterable[str], *, masks: bool) -> None:
    """Says that the result is complete, once nothing is still being written.

    Args:
        store: the store of the run.
        files: relative paths of the result's files.
        masks: whether masks are made.

    Raises:
        CheckpointError: something could not be written.
    """

    def mark() -> None:
        kind = f"{store.kind} {ownership.digest(store.masks) if masks else ''}"
        ownership.mark(store.result, kind, files)

    store.wait()
    on_first_process(mark)
    store.unpublished = True, masks


def unpublished(store: RunStore, out: Path, masks_at: Path | None) -> tuple[bool, bool] | None:
    """Returns whether the result, and the masks, that an earlier process made are still to be moved
    to their places; None where they are not whole, or not what is asked for."""
    try:
        kind = ownership.kind_of(out) or ""
        published = kind.startswith(store.kind)
        if not published:
            kind = ownership.prove(store.result).kind
        run, _, masks = kind.rpartition(" ")
        there = masks_at is None or has_digest(masks_at, masks)
        whole = run == store.kind and (there or has_digest(store.masks, masks))
    except UserError:
        return None
    return (not published, not there) if whole else None


def has_digest(path: Path, sha256: str) -> bool:
    """Returns whether a file is there that has a digest."""
    try:
        return ownership.digest(path) == sha256
    except UserError:
        return False


def publish(store: RunStore, place: Destination, masks_place: Destination | None) -> None:
    """Moves the finished masks and the result to their places, and removes the store.

    Raises:
        OccupiedError: something appeared there. What is finished stays, and the same command
            continues from there.
    """
    on_first_process(lambda: _publish(store, place, masks_place))


def _publish(store: RunStore, place: Destination, masks_place: Destination | None) -> None:
    assert store.unpublished
    result, masks = store.unpublished
    for missing, one, made in ((masks, masks_place, store.masks), (result, place, store.result)):
        if missing and one:
            one.again = "is put there by the same command once the place is free"
            one.publish(made)
    remove(store)


def remove(store: RunStore) -> None:
    """Removes all of a store that is its own; run.json goes last, so that a kill before leaves no
    doubt.

    Raises:
        CheckpointError: the disk became read-only. The same command removes the rest.
    """
    folder = store.folder
    for path in (store.result, old(store.result)):
        with contextlib.suppress(UserError):  # what was replaced
            ownership.remove_folder(path)
    for path in (*store.files(), store.masks, old(store.masks)):
        with contextlib.suppress(UserError):
            ownership.remove_sealed(path)
    ownership.remove_empties(folder)
    left = [name for name in names(folder) if name not in (RUN, NEW_RUN, LOCK)]
    ownership.remove_own(folder / NEW_RUN)
    with contextlib.suppress(OccupiedError):  # somebody changed it
        if os.path.lexists(folder / RUN):
            ownership.remove_sealed(folder / RUN)
    if ownership.unchanged(folder / LOCK, EMPTY):
        ownership.remove_own(folder / LOCK)
    if not ownership.remove_empty(folder) and left:
        log.warning(
            "left in %s, as jaxprune did not write it, or it has changed: %s", folder, joined(left)
        )
