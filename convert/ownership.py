"""The one place where anything on the user's disks is replaced or deleted.

jaxprune replaces or removes only what carries its marker and holds nothing but the files that the marker lists, each
of the size and SHA-256 that it had when it was written. It never replaces an input, a folder that holds one, the
current or the home folder, the root or a mount point, and nothing that appeared while it worked.

A folder's marker is the file `MARKER` in it, which is written last. A single file carries its own: a seal near its
start, `SEAL` and the SHA-256 of the file with zeros in that place. Files that a user has removed from a folder do not
matter, for nothing of theirs is lost.

What is half-written lies in a folder of its own, with a random name that nobody else uses.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NoReturn

import pydantic

from convert import renaming, schema
from convert.errors import Change, CheckpointError, NoRoomError, OccupiedError, UserError
from convert.files import expand, open_regular
from convert.schema import Schema

MARKER = ".jaxprune-files.json"
SEAL = b"jaxprune-sha256:"
UNSEALED = SEAL.decode() + 64 * "0"
"""What a file that is to be sealed has in its first `_HEAD` bytes."""
_HEAD = 4096
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_digests: dict[tuple[int, ...], str] = {}
"""What `digest` found before: a file whose inode, size and times are the same is not read again."""


class Listed(Schema):
    """A file as it was when it was written.

    Attributes:
        size: bytes.
        sha256: of `prefix` and its content.
        prefix: text before the content.
    """

    size: int
    sha256: str
    prefix: str = ""


class Marker(Schema):
    """What a folder's marker says.

    Attributes:
        version: of this schema.
        kind: of the folder.
        files: relative path -> the file.
    """

    version: Literal[1] = 1
    kind: str
    files: dict[str, Listed]

    @pydantic.field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, Listed]) -> dict[str, Listed]:
        if outside := [name for name in files if not name or Path(name).is_absolute() or ".." in Path(name).parts]:
            raise ValueError(f"a path inside the folder, not {outside[0]!r}")
        return files


def digest(path: Path, prefix: str = "") -> str:
    """SHA-256 of a text and a regular file's bytes after it.

    Raises:
        CheckpointError: it cannot be read.
    """
    with open_regular(path) as file:
        signature = _signature(os.fstat(file.fileno()), prefix)
        if signature not in _digests:
            whole = hashlib.sha256(prefix.encode())
            with failing(path, "read"):
                hashed = hashlib.file_digest(file, lambda: whole).hexdigest()
            remember(path, hashed, prefix, signature)
        return _digests[signature]


def remember(path: Path, hashed: str, prefix: str = "", signature: tuple[int, ...] | None = None) -> None:
    """Says what a file's digest is, where that is known from writing it; `digest` need not read it."""
    _digests[signature or _signature(os.stat(path), prefix)] = hashed


def _signature(found: os.stat_result, prefix: str) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, hash(prefix)


def listed(folder: Path, names: Iterable[str]) -> dict[str, Listed]:
    """Files of a folder as they are now."""
    return {name: Listed(size=(folder / name).stat().st_size, sha256=digest(folder / name)) for name in sorted(names)}


def mark(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Writes a finished folder's marker.

    Args:
        folder: finished.
        kind: of it.
        names: relative paths of the files that were written; what else is there stays somebody else's.
    """
    with failing(folder):
        files = listed(folder, names)
        for path in {folder / name for name in files} | {(folder / name).parent for name in files}:
            sync(path)
        write_text(folder / MARKER, Marker(kind=kind, files=files).model_dump_json(exclude_defaults=False))
        sync(folder)


def names(folder: Path) -> set[str]:
    """Relative paths of all files in a folder."""
    found = set()
    for place, _, files in os.walk(folder, onerror=_raise):
        found |= {str((Path(place) / name).relative_to(folder)) for name in files}
    return found


def marker_of(folder: Path) -> str | None:
    """The digest of a folder's marker, which stands for the whole folder; None where there is none."""
    try:
        return digest(folder / MARKER)
    except UserError:
        return None


def prove(folder: Path) -> Marker:
    """The marker of a folder that holds nothing but what jaxprune wrote.

    Raises:
        OccupiedError: something in it is not, or not any more, what jaxprune wrote; the first such file is named.
    """
    if not os.path.lexists(folder / MARKER):
        raise OccupiedError(
            "it carries no list of the files that jaxprune wrote, as a folder of somebody else's, or of an earlier "
            "version, so it is not replaced: move or remove it yourself",
            file=folder,
        )
    marker = schema.read(Marker, folder / MARKER, error=OccupiedError)
    require_listed(folder, marker.files.keys() | {MARKER})
    for name, file in marker.files.items():
        if os.path.lexists(folder / name) and not unchanged(folder / name, file):
            raise OccupiedError(
                "it has changed since jaxprune wrote it, so its folder is not replaced: move or remove that yourself",
                file=folder / name,
            )
    return marker


def require_listed(folder: Path, names: Collection[str]) -> None:
    """Raises OccupiedError for the first file, link or folder that is neither among the names nor holds one of them."""
    for name in strange(folder, names):
        raise OccupiedError(
            "jaxprune did not write it, so its folder is neither replaced nor removed: move it away", file=folder / name
        )


def strange(folder: Path, names: Collection[str]) -> Iterator[str]:
    """Relative paths of what is neither among the names nor a folder that leads to one of them, in order."""
    holding = {str(parent) for name in names for parent in Path(name).parents}
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        inside = Path(place).relative_to(folder)
        for name in sorted(files):
            if str(inside / name) not in names:
                yield str(inside / name)
        for name in list(folders):
            path = str(inside / name)
            if path in names:
                folders.remove(name)
            elif os.path.islink(folder / path) or path not in holding:
                yield path
                folders.remove(name)


def _raise(problem: OSError) -> NoReturn:
    raise CheckpointError(f"it cannot be looked through ({problem.strerror})", file=problem.filename) from problem


def unchanged(path: Path, file: Listed) -> bool:
    """Whether a file is a regular one with the size and the content that it had."""
    try:
        found = os.lstat(path)
        return stat.S_ISREG(found.st_mode) and found.st_size == file.size and digest(path, file.prefix) == file.sha256
    except (OSError, UserError):
        return False


def remove_listed(folder: Path, files: Mapping[str, Listed]) -> None:
    """Removes those of the files that are as they were, and then the folders inside that are empty."""
    for name, file in files.items():
        with contextlib.suppress(OSError):  # then it stays, which the caller sees
            if unchanged(folder / name, file):
                (folder / name).unlink()
    for inner in sorted({parent for name in files for parent in Path(name).parents}, reverse=True):
        if inner != Path("."):
            remove_empty(folder / inner)


def remove_empty(folder: Path) -> bool:
    """Removes a folder that holds nothing; whether it is gone."""
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not os.path.lexists(folder)


def remove_empties(folder: Path) -> None:
    """Removes the folders inside a folder that hold nothing, or only such folders."""
    for place, _, _ in os.walk(folder, topdown=False):
        if Path(place) != folder:
            remove_empty(Path(place))


def is_hollow(folder: Path) -> bool:
    """Whether a path is a folder without a file in it, at any depth."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return not any(files or any(os.path.islink(Path(p) / n) for n in inner) for p, inner, files in os.walk(folder))


def remove_hollow(folder: Path) -> bool:
    """Removes a folder without a file in it, at any depth; whether it was one."""
    if not is_hollow(folder):
        return False
    remove_empties(folder)
    return remove_empty(folder)


def remove_folder(folder: Path) -> None:
    """Removes a folder that holds nothing but what its marker lists; the marker goes last, so that a kill leaves proof.

    Raises:
        OccupiedError: see `prove`.
    """
    files = prove(folder).files
    remove_listed(folder, files)
    if not any(os.path.lexists(folder / name) for name in files):
        with contextlib.suppress(OSError):
            (folder / MARKER).unlink()
        remove_empty(folder)


def remove_own(path: Path) -> None:
    """Removes what lies under a random name that this program made up, half-written files included; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with failing(path, "removed"):
            path.unlink()


def seal(path: Path) -> None:
    """Puts the digest of a finished file, which was written with `UNSEALED`, into its place."""
    with failing(path), path.open("r+b") as file:
        place = file.read(_HEAD).index(UNSEALED.encode()) + len(SEAL)
        hashed = _sealed_digest(path, place)
        file.seek(place)
        file.write(hashed.encode())
        file.flush()
        os.fsync(file.fileno())


def sealed(path: Path) -> bool:
    """Whether a file is as it was when it was sealed."""
    with open_regular(path) as file:
        head = file.read(_HEAD)
    place = head.find(SEAL) + len(SEAL)
    return place >= len(SEAL) and head[place : place + 64] == _sealed_digest(path, place).encode()


def remove_sealed(path: Path) -> None:
    """Removes a file of ours.

    Raises:
        OccupiedError: it is not as it was when it was sealed.
        CheckpointError: it cannot be read.
    """
    if not sealed(path):
        raise OccupiedError("it has changed since jaxprune wrote it", file=path)
    with failing(path, "removed"):
        path.unlink()


def _sealed_digest(path: Path, place: int) -> str:
    with open_regular(path) as file, failing(path, "read"):
        whole = hashlib.sha256(file.read(place) + 64 * b"0")
        file.seek(place + 64)
        return hashlib.file_digest(file, lambda: whole).hexdigest()


@dataclasses.dataclass
class Destination:
    """Where a result is to be; looked at before the work, and again when the result is put there.

    Attributes:
        path: absolute.
        option: that names it; None where no option does.
        overwrite: whether an earlier result there is replaced.
        folder: whether the result is one; else a file.
        inputs: real paths of what the work reads.
        again: what to do once the place is free, where a finished result could not be put there.
    """

    path: Path
    option: str | None = None
    overwrite: bool = False
    folder: bool = True
    inputs: tuple[Path, ...] = ()
    again: str = "can be moved there once the place is free"
    _made: str | None = None

    def check(self) -> None:
        """Makes sure that the result may be put there.

        Raises:
            CheckpointError: something is there that may not be replaced, or nothing can be written there.
        """
        path = self.path
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            self._require_writable()
            return
        except (OSError, ValueError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else problem
            raise CheckpointError(f"nothing can be made there ({reason})", file=path, options=self._other()) from None
        if stat.S_ISLNK(found.st_mode):
            raise self.occupied("it is a symbolic link, which is not replaced")
        if stat.S_ISDIR(found.st_mode) != self.folder:
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a file"
            raise self.occupied(f"it is {kind}, and {'a folder' if self.folder else 'a file'} is to be made")
        if self._made is not None and self._made == marker_of(path):
            return
        if not self.overwrite:
            ours = {"overwrite": True} if not self.folder or marker_of(path) else {}
            raise OccupiedError("it already exists", file=path, options=self._other() | ours)
        self._require_replaceable()
        self._require_writable()

    def occupied(self, problem: str, file: Path | None = None) -> OccupiedError:
        return OccupiedError(problem, file=file or self.path, options=self._other())

    def _other(self) -> dict[str, object]:
        return {self.option: Change.OTHER} if self.option else {}

    def _require_writable(self) -> None:
        parent = next(p for p in self.path.parents if os.path.lexists(p))
        if not parent.is_dir():
            raise CheckpointError("it is no folder, so nothing can be made in it", file=parent, options=self._other())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise CheckpointError("it cannot be written into", file=parent, options=self._other())

    def _require_replaceable(self) -> None:
        """Raises OccupiedError unless what is there is ours."""
        real = self.path.resolve()
        if real == Path(real.anchor) or os.path.ismount(real):
            raise self.occupied("it is the root or a mount point, which is not replaced")
        kept = {"the current folder": Path.cwd(), "the home folder": Path("~").expanduser()}
        kept |= {f"an input, {path}": path for path in self.inputs}
        for what, path in kept.items():
            if path.resolve().is_relative_to(real):
                raise self.occupied(f"it is or holds {what}, so it is not replaced")
        try:
            if self.folder:
                prove(self.path)
            elif not sealed(self.path):
                raise OccupiedError(
                    "it is not, or not any more, a file as jaxprune wrote it, so it is not replaced: move or remove it "
                    "yourself",
                    file=self.path,
                )
        except OccupiedError as error:
            raise OccupiedError(
                error.problem, file=error.file, entry=error.entry, found=error.found, options=self._other()
            ) from None

    def publish(self, finished: Path) -> None:
        """Puts a finished result in its place; what it replaces is removed.

        Args:
            finished: a folder with its marker, or a file with its seal, on the same disk.

        Raises:
            OccupiedError: something that may not be replaced is there, which was not when the work began. The result
                stays where it is.
            CheckpointError: it cannot be put there.
        """
        try:
            self.check()
            with failing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self._near(finished) as near:
                    self._exchange(near) if os.path.lexists(self.path) else self._put(near)
                sync(self.path.parent)
        except UserError as error:
            if not os.path.lexists(finished):
                raise
            raise type(error)(
                f"{error.problem}; the finished result is kept in {finished}, and {self.again}", file=error.file
            ) from error
        self._made = marker_of(self.path)

    @contextlib.contextmanager
    def _near(self, finished: Path) -> Iterator[Path]:
        """The finished result on the disk of its place: a file that is elsewhere is copied."""
        parent = self.path.parent
        if self.folder or os.lstat(finished).st_dev == os.stat(parent).st_dev:
            yield finished
            return
        with tempfile.TemporaryDirectory(prefix=f".{self.path.name[:60]}.", suffix=".partial", dir=parent) as own:
            near = Path(own) / self.path.name
            shutil.copyfile(finished, near)
            sync(near)
            yield near
        finished.unlink()

    def _put(self, finished: Path) -> None:
        try:
            renaming.rename_new(finished, self.path)
        except FileExistsError as problem:
            raise self.occupied("something appeared there meanwhile, which is not replaced") from problem

    def _exchange(self, finished: Path) -> None:
        renaming.exchange(finished, self.path)
        try:  # what was there may have been touched between the check and the exchange
            remove_folder(finished) if self.folder else remove_sealed(finished)
        except OccupiedError:
            renaming.exchange(finished, self.path)
            raise


def destination(
    path: str | Path | Destination, option: str | None = None, *, overwrite: bool = False, folder: bool = True
) -> Destination:
    """A `Destination` at a path as a user gives it, or one as it is.

    Raises:
        CheckpointError: there is no such place.
    """
    return path if isinstance(path, Destination) else Destination(absolute(path), option, overwrite, folder)


def absolute(path: str | Path) -> Path:
    """A path of the user's from the root on, with a last part that is a name.

    Raises:
        CheckpointError: see `expand`, or it is the root.
    """
    found = expand(path).absolute()
    found = found.resolve() if found.name in ("", "..") else found
    if not found.name:
        raise CheckpointError("it is the root, which is not replaced", file=path)
    return found


@contextlib.contextmanager
def staged(place: Destination) -> Iterator[Path]:
    """Yields where to make a result, an empty folder or a file that is not there yet; puts it in its place at the end.

    The block marks or seals it. After an error it is removed.

    Raises:
        CheckpointError: see `Destination`; nothing can be written there.
    """
    place.check()
    with failing(place.path.parent):
        place.path.parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=f".{place.path.name[:60]}.", suffix=".partial", dir=place.path.parent))
    finished = own / place.path.name
    try:
        if place.folder:
            with failing(finished):
                finished.mkdir()
        yield finished
    except BaseException:
        remove_own(own)
        raise
    try:
        place.publish(finished)
    finally:
        remove_empty(own)


def write_text(path: Path, text: str) -> None:
    """Writes a file into a folder that is being made, through to the disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    with failing(path), path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def put_text(path: Path, text: str, work: Path) -> None:
    """Writes a file that appears whole, and replaces nothing.

    Args:
        path: of the file.
        text: its content.
        work: where it is made first, under a name of ours on the same disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    with failing(work):
        work.parent.mkdir(parents=True, exist_ok=True)
    write_text(work, text)
    put(work, path)


def put(work: Path, path: Path) -> None:
    """Renames what is finished to its place, and replaces nothing.

    Raises:
        OccupiedError: something is there.
        CheckpointError: it cannot be renamed.
    """
    with failing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            renaming.rename_new(work, path)
        except FileExistsError:
            raise OccupiedError("jaxprune did not write it, so it is not replaced: move it away", file=path) from None
        sync(path.parent)


def sync(path: Path) -> None:
    """Brings a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some disks have no folders to sync
            raise
    finally:
        os.close(descriptor)


def failed(problem: OSError, path: Path, what: str = "written") -> CheckpointError:
    """The error of a file that could not be written or read."""
    kind = NoRoomError if problem.errno in _FULL else CheckpointError
    return kind(f"it cannot be {what} ({problem.strerror or problem})", file=path)


@contextlib.contextmanager
def failing(path: Path, what: str = "written") -> Iterator[None]:
    """Turns the system's errors into ours."""
    try:
        yield
    except OSError as problem:
        raise failed(problem, path, what) from problem
