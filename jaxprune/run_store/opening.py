"""Opening the run store OUT.unfinished beside the checkpoint to be: whose it is, what may be in it,
and who may write it.

The folder holds run.json, with the run's identity and a random token; a lock; saved results (see
`store`); and work-TOKEN, where all is made: results that are being saved, and the checkpoint.
"""

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
from typing import Annotated, Any

import jax
from pydantic import Field

from convert import CheckpointError, ownership, schema, writing
from convert.destination import Destination
from convert.errors import Change, OccupiedError, UserError, joined
from convert.schema import Schema
from convert.writing import failing
from jaxprune.errors import InputError
from jaxprune.processes.collective import differing, is_first_process, on_first_process
from jaxprune.run_store.publishing import LOCK, NEW_RUN, RUN, has_digest, remove, unpublished
from jaxprune.run_store.store import RunStore, is_result

OTHER = {"out": Change.OTHER}
log = logging.getLogger(__name__)


class AnotherRunError(InputError):
    """What a run store holds was made from something else than what there is now."""


class Run(Schema):
    """What run.json says, in a file that is sealed.

    Attributes:
        token: random, in the names of the folders that are the store's whatever they hold.
        identity: all that decides the run's outcome.
    """

    token: Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]
    identity: dict[str, Any]


def store_folder(out: Path) -> Path:
    """Returns where the store of the run that makes `out` is."""
    return out.with_name(f"{out.name}.unfinished")


def digest_of(identity: Mapping[str, Any]) -> str:
    """Returns a digest of a run's identity."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _store(out: Path, run: Run | None = None) -> RunStore:
    """Returns the store of a run by its run.json; without one, a store that nothing belongs to."""
    folder = store_folder(out)
    return RunStore(folder, run.token, digest_of(run.identity)) if run else RunStore(folder)


def check(place: Destination, masks_place: Destination | None) -> bool:
    """Makes sure that a run may make what it makes, unless an earlier process of it did.

    Returns:
        Whether its store is as a kill right before its end leaves it: nothing is in it, and the
        result is at its place.

    Raises:
        CheckpointError: see `Destination.check` and `look`.
    """
    out, masks_at = place.path, masks_place.path if masks_place else None
    run, folder = look(out), store_folder(out)
    if os.path.lexists(folder) and _is_new(folder) and ownership.marker_of(out):
        return True
    result, masks = unpublished(_store(out, run), out, masks_at) or (True, True)
    if masks_place and masks:
        masks_place.check()
    if result:
        place.check()
    return False


def require_begun(out: Path) -> None:
    """Raises InputError where there is no store of a run that was stopped; else errors as for
    `look`."""
    if look(out) is None:
        raise InputError(
            f"there is nothing to go on with at {store_folder(out)}",
            options={"resume": Change.OMIT},
        )


def tidy_up(out: Path, identity: Mapping[str, Any], masks_at: Path | None) -> bool:
    """Removes the store of a run that was killed right before its end, if result and masks are this
    run's; returns whether they are."""
    run, _, masks = ownership.prove(out).kind.rpartition(" ")
    made = run.startswith(f"run {digest_of(identity)} ")
    if not made or (masks_at and not has_digest(masks_at, masks)):
        return False
    remove(_store(out))
    return True


@contextlib.contextmanager
def open_store(
    out: Path, identity: Mapping[str, Any], masks_at: Path | None = None, *, resume: bool = False
) -> Iterator[RunStore]:
    """Yields the store of a run; empty, or what an earlier process of the same run left.

    Args:
        out: the folder that the run makes.
        identity: all that decides its outcome, as JSON.
        masks_at: where its masks are to be; None: none are made.
        resume: whether there must be something to go on with.

    Raises:
        InputError: the store belongs to another run, or another process works on it, or there is
            none to resume.
        CheckpointError: it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: _lock(out, identity, stack, resume=resume))
        try:
            token, left = on_first_process(lambda: _begin(out, identity, masks_at))
            store = _store(out, Run(token=token, identity=dict(identity)))
            store.unpublished = left
            with contextlib.closing(store):
                if is_first_process() and store.files():
                    log.warning("going on with what is finished in %s", store.folder)
                yield store
        except BaseException as error:
            # a stop or a defect says nothing against running again
            again = getattr(error, "again", "")
            if is_first_process() and _leave(out, masks_at) and again is not None:
                when = f"{again} the same command continues from it".lstrip()
                error.add_note(f"finished work is saved in {store_folder(out)}: {when}")
            raise


def look(out: Path) -> Run | None:
    """Makes sure that a run may use its store, before it does anything; writes nothing.

    Args:
        out: the folder that the run makes.

    Returns:
        What its run.json says; None where there is none.

    Raises:
        OccupiedError: something of somebody else's is where the store is to be, or in it.
    """
    folder = store_folder(out)
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise CheckpointError(
            f"it cannot be used ({problem.strerror})", file=folder, options=OTHER
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a file"
        raise OccupiedError(
            f"it is {kind}, where the run keeps what is finished", file=folder, options=OTHER
        )
    run = _run_of(folder)
    # another process works there, as the lock will tell
    with contextlib.suppress(FileNotFoundError):
        for path in () if _is_new(folder) else writing.names(folder):
            if not _is_own(folder, path, run):
                raise OccupiedError(
                    "jaxprune did not write it, and the run's folder for what is finished is to be "
                    "removed in the end: move it away",
                    file=folder / path,
                    options=OTHER,
                )
    return run


def _is_own(folder: Path, path: str, run: Run | None) -> bool:
    """Returns whether the store of a run has a regular file at a path."""
    if path == LOCK or not run:
        return path == LOCK
    if path.startswith((f"work-{run.token}/", f"quarantine-{run.token}/")):
        return True
    known = path in (RUN, NEW_RUN) or is_result(path)
    return known and stat.S_ISREG((folder / path).lstat().st_mode)


def _is_new(folder: Path) -> bool:
    """Returns whether a folder is as a store's first moments leave it."""
    names = set(os.listdir(folder)) - {NEW_RUN}
    return not names or (names == {LOCK} and (folder / LOCK).lstat().st_size == 0)


def _run_of(folder: Path) -> Run | None:
    """Returns what run.json says; None where there is none."""
    path = folder / RUN
    if not os.path.lexists(path):
        return None
    run = schema.read(Run, path, error=OccupiedError)
    if not ownership.sealed(path):
        raise OccupiedError(
            "it is not, or not any more, as jaxprune wrote it: move its folder away",
            file=path,
            options=OTHER,
        )
    return run


def _lock(
    out: Path, identity: Mapping[str, Any], stack: contextlib.ExitStack, *, resume: bool
) -> None:
    """Makes the folder of a store, and locks it; errors as for `open_store`."""
    folder = store_folder(out)
    if resume:
        require_begun(out)
    with failing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_locked(folder))
    if run := look(out):
        _require_same(folder, run.identity, identity)


def _begin(
    out: Path, identity: Mapping[str, Any], masks_at: Path | None
) -> tuple[str, tuple[bool, bool] | None]:
    """Writes run.json, or tidies up after an earlier process; returns the store's token, and
    `RunStore.unpublished`."""
    run, folder = _run_of(store_folder(out)), store_folder(out)
    if run is None:
        run, new = Run(token=secrets.token_hex(8), identity=dict(identity)), folder / NEW_RUN
        ownership.remove_own(new)
        content = {"seal": ownership.UNSEALED} | run.model_dump()
        writing.write_text(new, json.dumps(content, indent=1) + "\n")
        ownership.seal(new)
        writing.put(new, folder / RUN)
    store = _store(out, run)
    if (left := unpublished(store, out, masks_at)) is None:
        ownership.remove_own(store.work)
    return run.token, left


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a store.

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


def _leave(out: Path, masks_at: Path | None) -> bool:
    """Removes a store that holds nothing; returns whether something is saved."""
    saved = False
    with contextlib.suppress(UserError, OSError):  # on a disk that is read-only by now, all stays
        store = _store(out, _run_of(store_folder(out)))
        finished = unpublished(store, out, masks_at) is not None
        saved = finished or bool(store.files())
        # The other processes of the run may be reading the result: they are to end with this one's
        # error, and not with a file that is missing.
        if not finished and not (saved and jax.process_count() > 1):
            ownership.remove_own(store.work)
        if not saved:
            remove(store)
    return saved


def _require_same(folder: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises AnotherRunError where a store is another run's, and says what differs."""
    now = json.loads(json.dumps(identity))
    differences = [f"{name}: {one} then, {other} now" for name, one, other in differing(saved, now)]
    if differences:
        raise AnotherRunError(
            f"it was left by another run, whose options were others: {joined(differences)}; it "
            "goes on where they are given again; for a new one",
            file=folder,
            options=OTHER,
        )
