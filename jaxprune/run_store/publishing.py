"""The end of a run: the finished result is moved to its place, and the run store is removed.

A result is complete once its marker is written. The marker names the store and has the digest of
the masks, so it shows whether the files at the final places come from this run.
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
from jaxprune.run_store.store import LOCK, NEW_RUN, RUN, RunStore

EMPTY = Listed(size=0, sha256=hashlib.sha256().hexdigest())
log = logging.getLogger(__name__)


def finish(store: RunStore, files: Iterable[str], *, masks: bool) -> None:
    """Marks the result as complete, after all pending writes.

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
    store.to_publish = True, masks


def left_to_publish(store: RunStore, out: Path, masks_at: Path | None) -> tuple[bool, bool] | None:
    """Returns whether the finished result, and the masks, must still be moved to their places.

    Returns None if they are incomplete, or do not match this run.
    """
    try:
        kind = ownership.kind_of(out) or ""
        published = kind.startswith(store.kind)
        if not published:
            kind = ownership.verify(store.result).kind
        run, _, masks = kind.rpartition(" ")
        there = masks_at is None or has_digest(masks_at, masks)
        whole = run == store.kind and (there or has_digest(store.masks, masks))
    except UserError:
        return None
    return (not published, not there) if whole else None


def has_digest(path: Path, sha256: str) -> bool:
    """Returns whether a file exists and has a digest."""
    try:
        return ownership.digest(path) == sha256
    except UserError:
        return False


def publish(store: RunStore, place: Destination, masks_place: Destination | None) -> None:
    """Moves the finished masks and the result to their places, and removes the store.

    Raises:
        OccupiedError: something else appeared there. The finished result stays in the store, and
            the same command publishes it later.
    """
    on_first_process(lambda: _publish(store, place, masks_place))


def _publish(store: RunStore, place: Destination, masks_place: Destination | None) -> None:
    assert store.to_publish
    result, masks = store.to_publish
    for missing, one, made in ((masks, masks_place, store.masks), (result, place, store.result)):
        if missing and one:
            one.again = "is put there by the same command once the place is free"
            one.publish(made)
    remove(store)


def remove(store: RunStore) -> None:
    """Removes the files that the store wrote. run.json goes last: until then a killed run leaves
    a store that can be identified.

    Raises:
        CheckpointError: the disk became read-only. The same command removes the rest.
    """
    folder = store.folder
    for path in (store.result, old(store.result)):
        with contextlib.suppress(UserError):  # not as the run wrote it
            ownership.remove_folder(path)
    for path in (*store.files(), store.masks, old(store.masks)):
        with contextlib.suppress(UserError):
            ownership.remove_unchanged(path)
    ownership.remove_empties(folder)
    left = [name for name in names(folder) if name not in (RUN, NEW_RUN, LOCK)]
    ownership.remove_own(folder / NEW_RUN)
    with contextlib.suppress(OccupiedError):  # it has changed
        if os.path.lexists(folder / RUN):
            ownership.remove_unchanged(folder / RUN)
    if ownership.unchanged(folder / LOCK, EMPTY):
        ownership.remove_own(folder / LOCK)
    if not ownership.remove_empty(folder) and left:
        log.warning(
            "left in %s, as jaxprune did not write it, or it has changed: %s", folder, joined(left)
        )
