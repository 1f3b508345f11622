"""Going on with a run that was stopped: whose journal lies beside the checkpoint to be, and who may
write it."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from convert import ownership, writing
from convert.destination import Destination
from convert.errors import Change, OccupiedError, UserError, joined
from convert.files import read_bytes
from convert.ownership import MARKER, Listed
from convert.schema import decode
from convert.writing import failing
from jaxprune.errors import InputError
from jaxprune.processes.collective import flat, is_first_process, on_first_process
from jaxprune.pruning.journal import AnotherRunError, Journal
from jaxprune.pruning.journal_folder import (
    IDENTITY,
    KIND,
    LOCK,
    NEW_MARKER,
    OTHER,
    JournalMarker,
    finished_of,
    is_new,
    journal_folder,
    look,
    marker_of,
    work_name,
)
from jaxprune.pruning.publishing import remove

log = logging.getLogger(__name__)


def check(place: Destination, masks_place: Destination | None) -> bool:
    """Makes sure that a run may make what it makes, unless an earlier process of it did.

    Returns:
        Whether its journal is as a kill right before its end leaves it: nothing is in it, and the
        result stands.

    Raises:
        CheckpointError: see `Destination.check` and `look`.
    """
    finished, folder = look(place.path), journal_folder(place.path)
    if (
        os.path.lexists(folder)
        and marker_of(folder) is None
        and is_new(folder)
        and ownership.marker_of(place.path)
    ):
        return True
    if masks_place and not (
        finished and finished.made(masks_place.path) and finished.masks_are_published()
    ):
        masks_place.check()
    if not (finished and finished.is_published(place.path)):
        place.check()
    return False


def tidy_up(out: Path, run: str, masks_at: Path | None) -> bool:
    """Removes such a journal, if result and masks are this run's, as far as can be known; whether
    they are."""
    if ownership.prove(out).kind != f"run {run}" or (masks_at and not ownership.sealed(masks_at)):
        return False
    folder = journal_folder(out)
    for name in (LOCK, NEW_MARKER):
        ownership.remove_own(folder / name)
    ownership.remove_empty(folder)
    return True


@contextlib.contextmanager
def open_journal(
    out: Path,
    identity: Mapping[str, Any],
    *,
    resume: bool = False,
) -> Iterator[Journal]:
    """Yields the journal of a run; empty, or what an earlier process of the same run left.

    Args:
        out: the folder that the run makes.
        identity: all that decides its outcome, as JSON.
        resume: whether there must be something to go on with.

    Raises:
        InputError: the journal belongs to another run, or another process works on it, or there is
            none to resume.
        CheckpointError: it cannot be written.
    """
    folder = journal_folder(out)
    with contextlib.ExitStack() as stack:
        token = on_first_process(lambda: _take(folder, out, identity, resume, stack))
        try:
            with contextlib.closing(Journal(folder, folder / work_name(token))) as journal:
                if is_first_process() and journal.files():
                    log.warning("going on with what is finished in %s", folder)
                yield journal
        except BaseException as error:
            # a stop or a defect says nothing against running again
            again = getattr(error, "again", "")
            if is_first_process() and _leave(folder) and again is not None:
                when = f"{again} the same command continues from it".lstrip()
                error.add_note(f"finished work is saved in {folder}: {when}")
            raise


def _take(
    folder: Path,
    out: Path,
    identity: Mapping[str, Any],
    resume: bool,
    stack: contextlib.ExitStack,
) -> str:
    """Locks the folder of a journal and tidies it up; its token. Errors as for `open_journal`."""
    if resume and not (folder / IDENTITY).exists() and look(out) is None:
        raise InputError(
            f"there is nothing to go on with at {folder}", options={"resume": Change.OMIT}
        )
    with failing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_locked(folder))
    look(out)
    text = _text(identity)
    try:
        marker = marker_of(folder) or _begin(folder, text)
        work, finished = folder / work_name(marker.token), finished_of(folder, marker)
        if not finished:
            ownership.remove_own(work)
            if not (folder / IDENTITY).exists():
                writing.put_text(folder / IDENTITY, text, work / IDENTITY)
    except UserError:
        _leave(folder)
        raise
    if (folder / IDENTITY).exists():
        _require_same(folder, identity)
    elif finished and finished.run != run_of(identity):
        raise InputError(f"{folder} was left by another run", options=OTHER)
    return marker.token


def _text(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, indent=1) + "\n"


def run_of(identity: Mapping[str, Any]) -> str:
    """Returns a digest of a run's identity."""
    return hashlib.sha256(_text(identity).encode()).hexdigest()


def _begin(folder: Path, identity: str) -> JournalMarker:
    """Writes the marker of a journal."""
    # all but the last two files were removed
    if (finished := finished_of(folder, None)) is not None:
        marker = JournalMarker(kind=KIND, files={}, token=finished.token)
    else:
        content = identity.encode()
        listed = Listed(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        marker = JournalMarker(kind=KIND, files={IDENTITY: listed}, token=secrets.token_hex(8))
    ownership.remove_own(folder / NEW_MARKER)
    writing.put_text(folder / MARKER, marker.model_dump_json(), folder / NEW_MARKER)
    return marker


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a journal.

    Raises:
        InputError: another process does.
        CheckpointError: it cannot be written.
    """
    path = folder / LOCK
    with failing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OccupiedError(
                "it is no regular file, where the run keeps its lock", file=path, options=OTHER
            )
        with failing(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                gone = not os.path.samestat(os.fstat(descriptor), os.stat(path))
            except (BlockingIOError, FileNotFoundError):
                gone = True
        if gone:
            raise InputError(
                f"another process is working on {folder}: let it finish", options=OTHER
            )
        yield
    finally:
        os.close(descriptor)


def _leave(folder: Path) -> bool:
    """Removes a journal that holds nothing; returns whether something is kept."""
    kept = False
    with contextlib.suppress(UserError, OSError):  # on a disk that is read-only by now, all stays
        marker = marker_of(folder)
        journal = Journal(folder, folder / work_name(marker.token if marker else ""))
        finished = finished_of(folder, marker) is not None
        kept = finished or bool(journal.files())
        # The other processes of the run may be reading the result: they are to end with this one's
        # error, and not with a file that is missing.
        if marker and not finished and not (kept and jax.process_count() > 1):
            ownership.remove_own(journal.work)
        if not kept:
            remove(journal)
    return kept


def _require_same(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises AnotherRunError where a journal is another run's, and says what differs."""
    written = decode(read_bytes(folder / IDENTITY), file=folder / IDENTITY)
    found, wanted = flat(written), flat(json.loads(json.dumps(identity)))
    differences = [
        f"{name}: {found.get(name, 'nothing')} then, {wanted.get(name, 'nothing')} now"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise AnotherRunError(
            f"it was left by another run, whose options were others: {joined(differences)}; it "
            "goes on where "
            "they are given again; for a new one",
            file=folder,
            options=OTHER,
        )
