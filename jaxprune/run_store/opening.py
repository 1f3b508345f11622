"""Opens, locks and checks the run store OUT.unfinished.

The folder has run.json, with the run's identity and a random token; a lock; saved results (see
`store`); and work-TOKEN, where unfinished files are written: saved results and the checkpoint.
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
from jaxprune.run_store.publishing import LOCK, NEW_RUN, RUN, has_digest, left_to_publish, remove
from jaxprune.run_store.store import RunStore, is_result

OTHER_OUT = {"out": Change.OTHER}
log = logging.getLogger(__name__)


class AnotherRunError(InputError):
    """The run store belongs to a run with other inputs or options."""


class Run(Schema):
    """The content of run.json, beside its checksum.

    Attributes:
        token: random; part of the names of folders whose whole content belongs to the run.
        identity: everything that decides the run's outcome.
    """

    token: Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]
    identity: dict[str, Any]


def store_folder(out: Path) -> Path:
    """Returns the folder of the store of the run that makes `out`."""
    return out.with_name(f"{out.name}.unfinished")


def digest_of(identity: Mapping[str, Any]) -> str:
    """Returns a digest of a run's identity."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _store(out: Path, run: Run | None = None) -> RunStore:
    """Returns the store of a run by its run.json; without one, a store that owns no file."""
    folder = store_folder(out)
    return RunStore(folder, run.token, digest_of(run.identity)) if run else RunStore(folder)


def require_free(place: Destination, masks_place: Destination | None) -> bool:
    """Checks that a run may write its result and masks, unless an earlier process of it did.

    Returns:
        Whether the store is empty and the result is at its place: the run was killed right before
        its end.

    Raises:
        CheckpointError: see `Destination.check` and `inspect`.
    """
    out, masks_at = place.path, masks_place.path if masks_place else None
    run, folder = inspect(out), store_folder(out)
    if os.path.lexists(folder) and _is_new(folder) and ownership.marker_of(out):
        return True
    result, masks = left_to_publish(_store(out, run), out, masks_at) or (True, True)
    if masks_place and masks:
        masks_place.check()
    if result:
        place.check()
    return False


def require_begun(out: Path) -> None:
    """Raises InputError if there is no run to resume; other errors as for `inspect`."""
    if inspect(out) is None:
        raise InputError(
            f"there is nothing to resume at {store_folder(out)}",
            options={"resume": Change.OMIT},
        )


def remove_finished(out: Path, identity: Mapping[str, Any], masks_at: Path | None) -> bool:
    """Removes the store of a run that was killed right before its end.

    Returns:
        Whether result and masks are this run's; if not, the store stays.
    """
    run, _, masks = ownership.verify(out).kind.rpartition(" ")
    made = run.startswith(f"run {digest_of(identity)} ")
    if not made or (masks_at and not has_digest(masks_at, masks)):
        return False
    remove(_store(out))
    return True


@contextlib.contextmanager
def open_store(
    out: Path, identity: Mapping[str, Any], masks_at: Path | None = None, *, resume: bool = False
) -> Iterator[RunStore]:
    """Yields the store of a run: empty, or with the saved results of an earlier process.

    Args:
        out: the folder that the run makes.
        identity: everything that decides its outcome, as JSON.
        masks_at: the file of its masks; None: no masks are made.
        resume: whether there must be a run to resume.

    Raises:
        InputError: the store belongs to another run, another process uses it, or there is no run to
            resume.
        CheckpointError: it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: _lock(out, identity, stack, resume=resume))
        try:
            token, left = on_first_process(lambda: _prepare(out, identity, masks_at))
            store = _store(out, Run(token=token, identity=dict(identity)))
            store.to_publish = left
            with contextlib.closing(store):
                if is_first_process() and store.files():
                    log.warning("resuming from the results saved in %s", store.folder)
                yield store
        except BaseException as error:
            # after a stop or a defect the same command may be run again
            again = getattr(error, "again", "")
            if is_first_process() and _close(out, masks_at) and again is not None:
                when = f"{again} the same command continues from it".lstrip()
                error.add_note(f"finished work is saved in {store_folder(out)}: {when}")
            raise


def inspect(out: Path) -> Run | None:
    """Checks that a run may use its store folder; writes nothing.

    Args:
        out: the folder that the run makes.

    Returns:
        The content of run.json; None if there is none.

    Raises:
        OccupiedError: the folder, or a file in it, was not written by jaxprune.
    """
    folder = store_folder(out)
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise CheckpointError(
            f"it cannot be used ({problem.strerror})", file=folder, options=OTHER_OUT
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a file"
        raise OccupiedError(
            f"it is {kind}, where the run saves its progress", file=folder, options=OTHER_OUT
        )
    run = _read_run(folder)
    # a file may vanish if another process uses the store; the lock finds that out later
    with contextlib.suppress(FileNotFoundError):
        for path in () if _is_new(folder) else writing.names(folder):
            if not _is_own(folder, path, run):
                raise OccupiedError(
                    "jaxprune did not write it, and the run removes this folder at its end: move "
                    "it away",
                    file=folder / path,
                    options=OTHER_OUT,
                )
    return run


def _is_own(folder: Path, path: str, run: Run | None) -> bool:
    """Returns whether a path in the store folder is one that the run writes."""
    if path == LOCK or not run:
        return path == LOCK
    if path.startswith((f"work-{run.token}/", f"quarantine-{run.token}/")):
        return True
    known = path in (RUN, NEW_RUN) or is_result(path)
    return known and stat.S_ISREG((folder / path).lstat().st_mode)


def _is_new(folder: Path) -> bool:
    """Returns whether a folder is a store that has just been made."""
    names = set(os.listdir(folder)) - {NEW_RUN}
    return not names or (names == {LOCK} and (folder / LOCK).lstat().st_size == 0)


def _read_run(folder: Path) -> Run | None:
    """Returns the content of run.json; None if there is none."""
    path = folder / RUN
    if not os.path.lexists(path):
        return None
    run = schema.read(Run, path, error=OccupiedError)
    if not ownership.has_checksum(path):
        raise OccupiedError(
            "jaxprune did not write it, or it has changed since: move its folder away",
            file=path,
            options=OTHER_OUT,
        )
    return run


def _lock(
    out: Path, identity: Mapping[str, Any], stack: contextlib.ExitStack, *, resume: bool
) -> None:
    """Makes the folder of a store and locks it; errors as for `open_store`."""
    folder = store_folder(out)
    if resume:
        require_begun(out)
    with failing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_locked(folder))
    if run := inspect(out):
        _require_same(folder, run.identity, identity)


def _prepare(
    out: Path, identity: Mapping[str, Any], masks_at: Path | None
) -> tuple[str, tuple[bool, bool] | None]:
    """Writes run.json, or removes the unfinished files of an earlier process; returns the store's
    token, and `RunStore.to_publish`."""
    run, folder = _read_run(store_folder(out)), store_folder(out)
    if run is None:
        run, new = Run(token=secrets.token_hex(8), identity=dict(identity)), folder / NEW_RUN
        ownership.remove_own(new)
        content = {"checksum": ownership.EMPTY_CHECKSUM} | run.model_dump()
        writing.write_text(new, json.dumps(content, indent=1) + "\n")
        ownership.add_checksum(new)
        writing.put(new, folder / RUN)
    store = _store(out, run)
    if (left := left_to_publish(store, out, masks_at)) is None:
        ownership.remove_own(store.work)
    return run.token, left


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a store.

    Raises:
        InputError: another process holds it.
        CheckpointError: it cannot be written.
    """
    path = folder / LOCK
    with failing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OccupiedError(
                "it is no regular file, where the run has its lock", file=path, options=OTHER_OUT
            )
        with failing(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                gone = not os.path.samestat(os.fstat(descriptor), os.stat(path))
            except (BlockingIOError, FileNotFoundError):
                gone = True
        if gone:
            raise InputError(
                f"another process is working on {folder}: let it finish", options=OTHER_OUT
            )
        yield
    finally:
        os.close(descriptor)


def _close(out: Path, masks_at: Path | None) -> bool:
    """Removes a store without saved results; returns whether there are any."""
    saved = False
    with contextlib.suppress(UserError, OSError):  # if the disk became read-only, all files stay
        store = _store(out, _read_run(store_folder(out)))
        finished = left_to_publish(store, out, masks_at) is not None
        saved = finished or bool(store.files())
        # Other processes of the run may still read the result. They must end with this process's
        # error, not with a missing file.
        if not finished and not (saved and jax.process_count() > 1):
            ownership.remove_own(store.work)
        if not saved:
            remove(store)
    return saved


def _require_same(folder: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises AnotherRunError if a store belongs to another run, and says what differs."""
    now = json.loads(json.dumps(identity))
    differences = [f"{name}: {one} then, {other} now" for name, one, other in differing(saved, now)]
    if differences:
        raise AnotherRunError(
            f"it belongs to a run with other options: {joined(differences)}; give the same options "
            "to resume that run; for a new one",
            file=folder,
            options=OTHER_OUT,
        )
