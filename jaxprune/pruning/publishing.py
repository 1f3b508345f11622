"""The end of a run: its result is complete, is moved to its place, and the run store is removed."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from convert import ownership, schema, writing
from convert.destination import Destination
from convert.errors import UserError, joined
from convert.ownership import MARKER, Listed
from convert.schema import Schema
from jaxprune.processes.collective import on_first_process
from jaxprune.pruning.store import RunStore, contents

RUN, NEW_RUN, LOCK, FINISHED = "run.json", ".jaxprune-run.json.new", "lock", "finished.json"
"""The files of a store beside its saved results."""
Token = Annotated[str, Field(pattern="^[0-9a-f]*$", max_length=64)]
log = logging.getLogger(__name__)


class Masks(Schema):
    """The finished masks of a run: where they are to be, and their digest."""

    path: str
    sha256: str


class Finished(Schema):
    """What finished.json says: the result is complete, and from now on it is only moved.

    Attributes:
        token: the store's.
        run: the digest of the run's identity.
        result: the digest of the result's marker.
        masks: None where none are asked for.
    """

    token: Token
    run: str
    result: str
    masks: Masks | None

    def made(self, masks: Path | None) -> bool:
        """Returns whether the run's result is what is asked for now."""
        return (str(masks) if masks else None) == (self.masks.path if self.masks else None)

    def masks_are_published(self) -> bool:
        """Returns whether the masks are at their place, or none are asked for."""
        return self.masks is None or _has(Path(self.masks.path), self.masks.sha256)

    def is_published(self, out: Path) -> bool:
        """Returns whether result and masks are at their places."""
        return ownership.marker_of(out) == self.result and self.masks_are_published()


def finished_of(folder: Path) -> Finished | None:
    """Returns what the finished.json of a store says; None where there is none."""
    path = folder / FINISHED
    return schema.read(Finished, path) if os.path.lexists(path) else None


def _has(path: Path, sha256: str) -> bool:
    try:
        return ownership.digest(path) == sha256
    except UserError:
        return False


def finish(store: RunStore, files: Iterable[str], masks_at: Path | None) -> None:
    """Says that the result is complete, once nothing is still being written.

    Args:
        store: the store of the run.
        files: relative paths of the result's files.
        masks_at: where the masks are to be; None: there are none.

    Raises:
        CheckpointError: something could not be written.
    """
    store.wait()
    on_first_process(lambda: _finish(store, files, masks_at))


def _finish(store: RunStore, files: Iterable[str], masks_at: Path | None) -> None:
    ownership.mark(store.result, f"run {store.run}", files)
    finished = Finished(
        token=store.token,
        run=store.run,
        result=ownership.digest(store.result / MARKER),
        masks=Masks(path=str(masks_at), sha256=ownership.digest(store.masks)) if masks_at else None,
    )
    writing.put_text(store.folder / FINISHED, finished.model_dump_json(), store.work / FINISHED)


def is_finished(store: RunStore, out: Path, masks_at: Path | None) -> bool:
    """Returns whether an earlier process made the whole result, so that it only has to be
    published; what is left of a result that is not whole, or not what is asked for, is removed."""
    return on_first_process(lambda: _is_finished(store, out, masks_at))


def _is_finished(store: RunStore, out: Path, masks_at: Path | None) -> bool:
    finished = finished_of(store.folder)
    if finished is None:
        return False
    if finished.made(masks_at) and (finished.is_published(out) or _is_whole(store, out, finished)):
        return True
    ownership.remove_own(store.folder / FINISHED)
    ownership.remove_own(store.work)
    return False


def _is_whole(store: RunStore, out: Path, finished: Finished) -> bool:
    try:
        if ownership.marker_of(out) != finished.result:
            ownership.prove(store.result)
            if ownership.marker_of(store.result) != finished.result:
                return False
    except UserError:
        return False
    masks = finished.masks
    return masks is None or finished.masks_are_published() or _has(store.masks, masks.sha256)


def publish(store: RunStore, place: Destination, masks_place: Destination | None) -> None:
    """Moves the finished result to its place, and removes the store.

    Raises:
        OccupiedError: something appeared there. The result is saved, and the same command continues
            from there.
    """
    on_first_process(lambda: _publish(store, place, masks_place))


def _publish(store: RunStore, place: Destination, masks_place: Destination | None) -> None:
    finished = finished_of(store.folder)
    assert finished
    again = "is put there by the same command once the place is free"
    if masks_place and not finished.masks_are_published():
        masks_place.again = again
        masks_place.publish(store.masks)
    if ownership.marker_of(place.path) != finished.result:
        place.again = again
        place.publish(store.result)
    remove(store)


def remove(store: RunStore) -> None:
    """Removes all of a store that is its own; finished.json goes last, so that a kill before leaves
    no doubt."""
    folder = store.folder
    with contextlib.suppress(UserError):  # what was replaced
        ownership.remove_folder(store.result)
    for path in (*store.files(), store.masks, folder / RUN):
        with contextlib.suppress(UserError):
            ownership.remove_sealed(path)
    ownership.remove_empties(folder)
    ownership.remove_listed(folder, {LOCK: Listed(size=0, sha256=hashlib.sha256().hexdigest())})
    left = sorted(map(str, {*contents(folder)} - {Path(NEW_RUN), Path(FINISHED)}))
    for name in (NEW_RUN, FINISHED):
        ownership.remove_own(folder / name)
    if not ownership.remove_empty(folder) and left:
        log.warning(
            "left in %s, as jaxprune did not write it, or it has changed: %s", folder, joined(left)
        )
