"""The end of a run: its result is complete, is moved to its place, and the journal is removed."""

import contextlib
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from convert import ownership, writing
from convert.destination import Destination
from convert.errors import UserError, joined
from convert.ownership import MARKER, Listed
from jaxprune.processes.collective import on_first_process
from jaxprune.pruning.journal import Journal
from jaxprune.pruning.journal_folder import (
    FINISHED,
    LOCK,
    NEW_MARKER,
    Finished,
    Masks,
    digest_at,
    finished_of,
    marker_of,
    masks_file,
    result_folder,
)

log = logging.getLogger(__name__)


def finish(journal: Journal, files: Iterable[str], run: str, masks_at: Path | None) -> None:
    """Says that the result is complete, once nothing is still being written.

    Args:
        journal: the journal of the run.
        files: relative paths of the result's files.
        run: see `run_of`.
        masks_at: where the masks are to be; None: there are none.

    Raises:
        CheckpointError: something could not be written.
    """
    journal.wait()
    on_first_process(lambda: _finish(journal, files, run, masks_at))


def _finish(journal: Journal, files: Iterable[str], run: str, masks_at: Path | None) -> None:
    ownership.mark(result_folder(journal), f"run {run}", files)
    marker = marker_of(journal.folder)
    assert marker
    finished = Finished(
        token=marker.token,
        run=run,
        result=ownership.digest(result_folder(journal) / MARKER),
        masks=Masks(path=str(masks_at), sha256=ownership.digest(masks_file(journal)))
        if masks_at
        else None,
    )
    writing.put_text(journal.folder / FINISHED, finished.model_dump_json(), journal.work / FINISHED)


def is_finished(journal: Journal, out: Path, masks_at: Path | None) -> bool:
    """Returns whether an earlier process made the whole result, so that it only has to be
    published; what is left of a result that is not whole, or not what is asked for, is removed."""
    return on_first_process(lambda: _is_finished(journal, out, masks_at))


def _is_finished(journal: Journal, out: Path, masks_at: Path | None) -> bool:
    finished = finished_of(journal.folder, marker_of(journal.folder))
    if finished is None:
        return False
    if finished.made(masks_at) and (
        finished.is_published(out) or _is_whole(journal, out, finished)
    ):
        return True
    ownership.remove_own(journal.folder / FINISHED)
    ownership.remove_own(journal.work)
    return False


def _is_whole(journal: Journal, out: Path, finished: Finished) -> bool:
    try:
        if ownership.marker_of(out) != finished.result:
            ownership.prove(result_folder(journal))
            if ownership.marker_of(result_folder(journal)) != finished.result:
                return False
    except UserError:
        return False
    wanted = finished.masks and finished.masks.sha256
    return finished.masks_are_published() or digest_at(masks_file(journal)) == wanted


def publish(journal: Journal, place: Destination, masks_place: Destination | None) -> None:
    """Moves the finished result to its place, and removes the journal.

    Raises:
        OccupiedError: something appeared there. The result is kept, and the same command goes on
            from there.
    """
    on_first_process(lambda: _publish(journal, place, masks_place))


def _publish(journal: Journal, place: Destination, masks_place: Destination | None) -> None:
    finished = finished_of(journal.folder, marker_of(journal.folder))
    assert finished
    again = "is put there by the same command once the place is free"
    if masks_place and not finished.masks_are_published():
        masks_place.again = again
        masks_place.publish(masks_file(journal))
    if ownership.marker_of(place.path) != finished.result:
        place.again = again
        place.publish(result_folder(journal))
    remove(journal)


def remove(journal: Journal) -> None:
    """Removes all of a journal that is its own; finished.json goes last, so that a kill before
    leaves no doubt."""
    folder, marker = journal.folder, marker_of(journal.folder)
    ownership.remove_listed(folder, journal.files())
    with contextlib.suppress(UserError):  # what was replaced
        ownership.remove_folder(result_folder(journal))
    with contextlib.suppress(UserError):
        ownership.remove_sealed(masks_file(journal))
    ownership.remove_listed(folder, marker.files if marker else {})
    ownership.remove_empties(folder)
    ownership.remove_listed(folder, {LOCK: Listed(size=0, sha256=hashlib.sha256().hexdigest())})
    left = sorted(ownership.strange(folder, {MARKER, NEW_MARKER, FINISHED}))
    for name in (NEW_MARKER, MARKER, FINISHED):
        ownership.remove_own(folder / name)
    if not ownership.remove_empty(folder) and left:
        log.warning(
            "left in %s, as jaxprune did not write it, or it has changed: %s", folder, joined(left)
        )
