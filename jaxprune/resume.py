"""Going on with a run that was stopped: the journal OUT.unfinished beside the checkpoint to be, and whose it is."""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from convert import CheckpointError, Params, Reader, parts
from convert.staging import replace, write_text
from jaxprune import devices
from jaxprune.errors import InputError
from jaxprune.journal import Journal

IDENTITY, LOCK, FINISHING, RESULT = "run.json", "lock", "finishing", "result"


@contextlib.contextmanager
def open_journal(out: Path, identity: Mapping[str, Any], *, resume: bool = False) -> Iterator[Journal]:
    """The journal of a run; empty, or what an earlier process of the same run left.

    Args:
        out: the folder that the run makes.
        identity: all that decides its outcome, as JSON.
        resume: whether there must be something to go on with.

    Raises:
        InputError: the journal belongs to another run, or another process works on it, or there is none to resume.
        CheckpointError: it cannot be written.
    """
    folder = journal_folder(out)
    with contextlib.ExitStack() as stack:
        fault = ""
        try:
            if devices.is_first():
                _take(folder, identity, resume, stack)
        except (InputError, CheckpointError) as error:
            fault = str(error)
        if fault := devices.agree(fault):
            raise InputError(fault)
        try:
            with contextlib.closing(Journal(folder)) as journal:
                yield journal
        except BaseException:
            if devices.is_first():
                _leave(folder)
            raise


def _take(folder: Path, identity: Mapping[str, Any], resume: bool, stack: contextlib.ExitStack) -> None:
    """Locks the folder of a journal and tidies it up; errors as for `open_journal`."""
    if resume and not (folder / IDENTITY).exists():
        raise InputError(f"there is nothing to go on with at {folder}: leave --resume out to begin")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(filelock.FileLock(folder / LOCK, timeout=0))
    except filelock.Timeout:
        raise InputError(f"another process is working on {folder}: let it finish, or choose another --out") from None
    except OSError as error:
        raise CheckpointError(f"cannot write into {folder.parent}: {error.strerror}; choose another --out") from error
    _require_same(folder, json.loads(json.dumps(identity)))
    for leftover in [folder / RESULT, *folder.rglob("*.partial"), *folder.rglob("*orbax-checkpoint-tmp*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _leave(folder: Path) -> None:
    """Says what is kept of a run that stops."""
    shutil.rmtree(folder / RESULT, ignore_errors=True)
    if any(path.is_dir() for path in folder.glob("*")):
        print(f"what is finished is kept in {folder}: the same command goes on from there", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def result(journal: Journal) -> Path:
    """The folder that the checkpoint is made at."""
    return journal.folder / RESULT


def finish(journal: Journal) -> None:
    """Says that the result is complete, once nothing is still being written; see `finishing`.

    Raises:
        CheckpointError: the last entry could not be written.
    """
    journal.wait()
    if devices.is_first():
        (journal.folder / FINISHING).touch()


def finishing(out: Path) -> bool:
    """Whether an earlier process of the run had all of `out` and began to move it to its place."""
    return (journal_folder(out) / FINISHING).exists()


def publish(journal: Journal, out: Path) -> None:
    """Moves the finished checkpoint to its place, and removes the journal."""
    if devices.is_first():
        replace(result(journal), out)
    remove(journal)


def remove(journal: Journal) -> None:
    """Removes a journal whose result is at its place. The mark of that goes last: a kill before leaves no doubt."""
    if devices.is_first():
        for path in sorted(journal.folder.iterdir(), key=lambda path: path.name == FINISHING):
            _delete(path)
        journal.folder.rmdir()
    devices.agree(None)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def journal_folder(out: Path) -> Path:
    """Where the journal of the run that makes `out` is."""
    return out.with_name(f"{out.name}.unfinished")


def fingerprint(reader: Reader) -> str:
    """A digest of a checkpoint: all names, shapes and dtypes, and the content of its first and last layers and norm."""
    grouped = parts(reader.spec)
    layers = [part for part in grouped if part.startswith("layers.")]
    content = reader.read([path for part in {layers[0], layers[-1], "norm"} & grouped.keys() for path in grouped[part]])
    shapes = {path: [list(t.shape), t.dtype.name] for path, t in sorted(reader.spec.items())}
    return hashlib.sha256((json.dumps(shapes) + _digest(content)).encode()).hexdigest()


def _require_same(folder: Path, identity: dict[str, Any]) -> None:
    file = folder / IDENTITY
    if not file.exists():
        write_text(file, json.dumps(identity, indent=1) + "\n")
        return
    try:
        found = _flat(json.loads(file.read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error}): remove {folder} to begin anew") from error
    wanted = _flat(identity)
    differences = [
        f"{name}: {found.get(name, 'nothing')} then, {wanted.get(name, 'nothing')} now"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise InputError(
            f"{folder} was left by another run. Give its options again, choose another --out, or remove the folder; "
            "different are\n  " + "\n  ".join(differences)
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _digest(arrays: Params) -> str:
    whole = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")  # ascontiguousarray makes 1-d arrays of 0-d ones
        whole.update(f"{name} {array.dtype.name} {array.shape};".encode())
        whole.update(array.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()
