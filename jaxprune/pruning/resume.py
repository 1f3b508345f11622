"""Going on with a run that was stopped: the journal OUT.unfinished beside the checkpoint to be, and whose it is.

The folder holds its marker, with a random token; run.json, which says what run it is; entries (see `journal`); and
work-TOKEN, where all is made: entries that are being written, and the result. finished.json says that the result
is complete; from then on it is only moved to its place.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from convert import CheckpointError, ownership, schema
from convert.errors import Change, OccupiedError, UserError, joined
from convert.files import read_bytes
from convert.ownership import MARKER, Destination, Listed, Marker, failing
from convert.schema import Schema, decode
from jaxprune import sharding as devices
from jaxprune.errors import InputError
from jaxprune.pruning import adoption
from jaxprune.pruning.journal import AnotherRunError, Journal

IDENTITY, LOCK, FINISHED, RESULT, MASKS = "run.json", "lock", "finished.json", "result", "masks"
KIND = "journal"
_NEW_MARKER = f"{MARKER}.new"
_OTHER = {"out": Change.OTHER}
log = logging.getLogger(__name__)


class JournalMarker(Marker):
    """The marker of a journal.

    Attributes:
        token: random, in the names of the folders that are the journal's whatever they hold.
        others: relative paths of what was there before the journal had a marker, and stays.
    """

    token: str
    others: list[str] = []


class Masks(Schema):
    """The finished masks of a run: where they are to be, and their digest."""

    path: str
    sha256: str


class Finished(Schema):
    """What finished.json says.

    Attributes:
        token: the journal's.
        run: digest of the run's identity.
        result: the digest of the result's marker.
        masks: None where none are asked for.
    """

    token: str
    run: str
    result: str
    masks: Masks | None

    def made(self, masks: Path | None) -> bool:
        """Whether the run's result is what is asked for now."""
        return (str(masks) if masks else None) == (self.masks.path if self.masks else None)

    def masks_are_published(self) -> bool:
        return self.masks is None or _digest_at(Path(self.masks.path)) == self.masks.sha256

    def is_published(self, out: Path) -> bool:
        return ownership.marker_of(out) == self.result and self.masks_are_published()


def look(out: Path) -> Finished | None:
    """Makes sure that a run may use its journal, before it does anything; writes nothing.

    Args:
        out: the folder that the run makes.

    Returns:
        What an earlier process of the run finished.

    Raises:
        OccupiedError: something of somebody else's is where the journal is to be.
    """
    folder = journal_folder(out)
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise CheckpointError(f"it cannot be used ({problem.strerror})", file=folder, options=_OTHER) from None
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a file"
        raise OccupiedError(f"it is {kind}, where the run keeps what is finished", file=folder, options=_OTHER)
    marker = _marker(folder)
    if marker is None:
        if _is_new(folder) or adoption.is_journal(folder):
            return None
        names = sorted(name for name in os.listdir(folder) if name != LOCK)
        if names != [FINISHED]:
            raise OccupiedError(
                "jaxprune did not make it, though the run needs the name: move it away",
                file=folder / names[0],
                options=_OTHER,
            )
    else:
        with contextlib.suppress(FileNotFoundError):  # another process works there, as the lock will tell
            _require_listed(folder, marker)
    return _finished(folder, marker)


def check(place: Destination, masks_place: Destination | None) -> bool:
    """Makes sure that a run may make what it makes, unless an earlier process of it did.

    Returns:
        Whether its journal is as a kill right before its end leaves it: nothing is in it, and the result stands.

    Raises:
        CheckpointError: see `Destination.check` and `look`.
    """
    finished, folder = look(place.path), journal_folder(place.path)
    if os.path.lexists(folder) and _marker(folder) is None and _is_new(folder) and ownership.marker_of(place.path):
        return True
    if masks_place and not (finished and finished.made(masks_place.path) and finished.masks_are_published()):
        masks_place.check()
    if not (finished and finished.is_published(place.path)):
        place.check()
    return False


def end_bare(out: Path, run: str, masks_at: Path | None) -> bool:
    """Removes such a journal, if result and masks are this run's, as far as can be known; whether they are."""
    if ownership.prove(out).kind != f"run {run}" or (masks_at and not ownership.sealed(masks_at)):
        return False
    folder = journal_folder(out)
    for name in (LOCK, _NEW_MARKER):
        ownership.remove_own(folder / name)
    ownership.remove_empty(folder)
    return True


def _marker(folder: Path) -> JournalMarker | None:
    path = folder / MARKER
    return schema.read(JournalMarker, path, error=OccupiedError) if os.path.lexists(path) else None


def _is_new(folder: Path) -> bool:
    """Whether a folder without a marker is as a journal's first moments leave it."""
    names = set(os.listdir(folder)) - {_NEW_MARKER}
    return not names or (names == {LOCK} and (folder / LOCK).lstat().st_size == 0)


def _require_listed(folder: Path, marker: JournalMarker) -> None:
    """Raises OccupiedError for the first file in the journal that is not its own; what has changed is left aside."""
    journal = Journal(folder, folder / _work(marker.token))
    names = {MARKER, _NEW_MARKER, LOCK, IDENTITY, FINISHED, *marker.files, *marker.others, *journal.files()}
    own = {journal.work.name, journal.aside.name}
    damaged: set[str] = set()  # notes that list nothing any more
    for name in ownership.strange(folder, names):
        top = Path(name).parts[0]
        entry = name.removesuffix(".json")
        if (
            top in own
            or ownership.is_hollow(folder / name)
            or any(name.startswith(f"{one}/") or name == one for one in damaged)
        ):
            continue
        if name.endswith(".json") and len(Path(name).parts) > 1 and (folder / entry).is_dir():
            damaged.add(entry)
            continue
        if (folder / f"{name}.json").is_file() and len(Path(name).parts) > 1:
            damaged.add(name)
            continue
        raise OccupiedError(
            "jaxprune did not write it, and the run's folder for what is finished is to be removed in the end: move it "
            "away",
            file=folder / name,
            options=_OTHER,
        )


def _finished(folder: Path, marker: JournalMarker | None) -> Finished | None:
    path = folder / FINISHED
    if not os.path.lexists(path):
        return None
    found = schema.read(Finished, path)
    return found if marker is None or found.token == marker.token else None


def _digest_at(path: Path) -> str | None:
    try:
        return ownership.digest(path)
    except UserError:
        return None


def _work(token: str) -> str:
    return f"work-{token}"


@contextlib.contextmanager
def open_journal(
    out: Path,
    identity: Mapping[str, Any],
    *,
    of_version_1: Callable[[], Mapping[str, Any]] = dict,
    resume: bool = False,
) -> Iterator[Journal]:
    """The journal of a run; empty, or what an earlier process of the same run left.

    Args:
        out: the folder that the run makes.
        identity: all that decides its outcome, as JSON.
        of_version_1: gives the same as version 1 wrote it, in whose journals `identity` is looked for.
        resume: whether there must be something to go on with.

    Raises:
        InputError: the journal belongs to another run, or another process works on it, or there is none to resume.
        CheckpointError: it cannot be written.
    """
    folder = journal_folder(out)
    with contextlib.ExitStack() as stack:
        token = by_first(lambda: _take(folder, out, identity, of_version_1, resume, stack))
        try:
            with contextlib.closing(Journal(folder, folder / _work(token))) as journal:
                yield journal
        except BaseException as error:
            if devices.is_first():
                _leave(folder, aloud=not isinstance(error, AnotherRunError))
            raise


def by_first(action: Callable[[], Any]) -> Any:
    """What an action of the first process gives, on all of them; its error is everybody's."""
    if devices.processes() == 1:
        return action()
    value, fault = None, ""
    if devices.is_first():
        try:
            value = action()
        except UserError as error:
            fault = str(error)
    value, fault = devices.agree([value, fault])
    if fault:
        raise InputError(fault)
    return value


def _take(
    folder: Path,
    out: Path,
    identity: Mapping[str, Any],
    of_version_1: Callable[[], Mapping[str, Any]],
    resume: bool,
    stack: contextlib.ExitStack,
) -> str:
    """Locks the folder of a journal and tidies it up; its token. Errors as for `open_journal`."""
    if resume and not (folder / IDENTITY).exists() and look(out) is None:
        raise InputError(f"there is nothing to go on with at {folder}", options={"resume": Change.OMIT})
    with failing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_locked(folder))
    look(out)
    text = _text(identity)
    try:
        marker = _marker(folder) or _begin(folder, text)
        work, finished = folder / _work(marker.token), _finished(folder, marker)
        if not finished:
            ownership.remove_own(work)
            if not (folder / IDENTITY).exists():
                ownership.put_text(folder / IDENTITY, text, work / IDENTITY)
    except UserError:
        _leave(folder, aloud=False)
        raise
    if (folder / IDENTITY).exists():
        _require_same(folder, identity, of_version_1)
    elif finished and finished.run != run_of(identity):
        raise InputError(f"{folder} was left by another run", options=_OTHER)
    return marker.token


def _text(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, indent=1) + "\n"


def run_of(identity: Mapping[str, Any]) -> str:
    """A digest of a run's identity."""
    return hashlib.sha256(_text(identity).encode()).hexdigest()


def _begin(folder: Path, identity: str) -> JournalMarker:
    """Writes the marker of a journal, which adopts what is there of an earlier version's."""
    old = None
    if (finished := _finished(folder, None)) is not None:  # all but the last two files were removed
        marker = JournalMarker(kind=KIND, files={}, token=finished.token)
    elif adoption.is_journal(folder):
        old = adoption.adopted(folder)
        files = old.files | old.states
        marker = JournalMarker(kind=KIND, files=files, token=secrets.token_hex(8), others=old.others)
    else:
        content = identity.encode()
        listed = Listed(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        marker = JournalMarker(kind=KIND, files={IDENTITY: listed}, token=secrets.token_hex(8))
    ownership.remove_own(folder / _NEW_MARKER)
    ownership.put_text(folder / MARKER, marker.model_dump_json(), folder / _NEW_MARKER)
    if old:
        ownership.remove_listed(folder, old.states)
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
            raise OccupiedError("it is no regular file, where the run keeps its lock", file=path, options=_OTHER)
        with failing(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                gone = not os.path.samestat(os.fstat(descriptor), os.stat(path))
            except (BlockingIOError, FileNotFoundError):
                gone = True
        if gone:
            raise InputError(f"another process is working on {folder}: let it finish", options=_OTHER)
        yield
    finally:
        os.close(descriptor)


def _leave(folder: Path, *, aloud: bool = True) -> None:
    """Says what is kept of a run that stops, or removes a journal that holds nothing."""
    with contextlib.suppress(UserError):
        marker = _marker(folder)
        journal = Journal(folder, folder / _work(marker.token if marker else ""))
        finished = _finished(folder, marker) is not None
        if marker and not finished:
            ownership.remove_own(journal.work)
        if not finished and not journal.files():
            _remove(journal)
        elif aloud:
            print(f"what is finished is kept in {folder}: the same command goes on from there", file=sys.stderr)


def result(journal: Journal) -> Path:
    """The folder that the checkpoint is made at."""
    return journal.work / RESULT


def masks(journal: Journal) -> Path:
    """The file that the masks are made at."""
    return journal.work / MASKS


def finish(journal: Journal, files: Iterable[str], run: str, masks_at: Path | None) -> None:
    """Says that the result is complete, once nothing is still being written.

    Args:
        journal: of the run.
        files: relative paths of the result's files.
        run: see `run_of`.
        masks_at: where the masks are to be; None: there are none.

    Raises:
        CheckpointError: something could not be written.
    """
    journal.wait()
    by_first(lambda: _finish(journal, files, run, masks_at))


def _finish(journal: Journal, files: Iterable[str], run: str, masks_at: Path | None) -> None:
    ownership.mark(result(journal), f"run {run}", files)
    marker = _marker(journal.folder)
    assert marker
    finished = Finished(
        token=marker.token,
        run=run,
        result=ownership.digest(result(journal) / MARKER),
        masks=Masks(path=str(masks_at), sha256=ownership.digest(masks(journal))) if masks_at else None,
    )
    ownership.put_text(journal.folder / FINISHED, finished.model_dump_json(), journal.work / FINISHED)


def is_finished(journal: Journal, out: Path, masks_at: Path | None) -> bool:
    """Whether an earlier process made the whole result, so that it only has to be published; what is left of a result
    that is not whole, or not what is asked for, is removed."""
    return by_first(lambda: _is_finished(journal, out, masks_at))


def _is_finished(journal: Journal, out: Path, masks_at: Path | None) -> bool:
    finished = _finished(journal.folder, _marker(journal.folder))
    if finished is None:
        return False
    if finished.made(masks_at) and (finished.is_published(out) or _is_whole(journal, out, finished)):
        return True
    ownership.remove_own(journal.folder / FINISHED)
    ownership.remove_own(journal.work)
    return False


def _is_whole(journal: Journal, out: Path, finished: Finished) -> bool:
    try:
        if ownership.marker_of(out) != finished.result:
            ownership.prove(result(journal))
            if ownership.marker_of(result(journal)) != finished.result:
                return False
    except UserError:
        return False
    wanted = finished.masks and finished.masks.sha256
    return finished.masks_are_published() or _digest_at(masks(journal)) == wanted


def publish(journal: Journal, place: Destination, masks_place: Destination | None) -> None:
    """Moves the finished result to its place, and removes the journal.

    Raises:
        OccupiedError: something appeared there. The result is kept, and the same command goes on from there.
    """
    by_first(lambda: _publish(journal, place, masks_place))


def _publish(journal: Journal, place: Destination, masks_place: Destination | None) -> None:
    finished = _finished(journal.folder, _marker(journal.folder))
    assert finished
    again = "is put there by the same command once the place is free"
    if masks_place and not finished.masks_are_published():
        masks_place.again = again
        masks_place.publish(masks(journal))
    if ownership.marker_of(place.path) != finished.result:
        place.again = again
        place.publish(result(journal))
    _remove(journal)


def _remove(journal: Journal) -> None:
    """Removes all of a journal that is its own; finished.json goes last, so that a kill before leaves no doubt."""
    folder, marker = journal.folder, _marker(journal.folder)
    ownership.remove_listed(folder, journal.files())
    with contextlib.suppress(UserError):  # what was replaced
        ownership.remove_folder(result(journal))
    with contextlib.suppress(UserError):
        ownership.remove_sealed(masks(journal))
    ownership.remove_listed(folder, marker.files if marker else {})
    ownership.remove_empties(folder)
    ownership.remove_listed(folder, {LOCK: Listed(size=0, sha256=hashlib.sha256().hexdigest())})
    left = sorted(ownership.strange(folder, {MARKER, _NEW_MARKER, FINISHED}))
    for name in (_NEW_MARKER, MARKER, FINISHED):
        ownership.remove_own(folder / name)
    if not ownership.remove_empty(folder) and left:
        log.warning("left in %s, as jaxprune did not write it, or it has changed: %s", folder, joined(left))


def journal_folder(out: Path) -> Path:
    """Where the journal of the run that makes `out` is."""
    return out.with_name(f"{out.name}.unfinished")


def _require_same(folder: Path, identity: Mapping[str, Any], of_version_1: Callable[[], Mapping[str, Any]]) -> None:
    """Raises AnotherRunError where a journal is another run's, and says what differs."""
    written = decode(read_bytes(folder / IDENTITY), file=folder / IDENTITY)
    found = _flat(written)
    wanted = _flat(json.loads(json.dumps(identity if "schema" in written else of_version_1())))
    differences = [
        f"{name}: {found.get(name, 'nothing')} then, {wanted.get(name, 'nothing')} now"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise AnotherRunError(
            f"it was left by another run, whose options were others: {joined(differences)}; give them again, or remove "
            "the folder",
            file=folder,
            options=_OTHER,
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
