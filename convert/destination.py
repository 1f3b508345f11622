"""Destinations of results, checked before the work and again when the result is published."""

import contextlib
import dataclasses
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from convert import renaming
from convert.errors import Change, CheckpointError, OccupiedError, UserError
from convert.files import expand
from convert.ownership import (
    has_checksum,
    marker_of,
    remove_empty,
    remove_folder,
    remove_own,
    remove_unchanged,
    replace,
    verify,
)
from convert.writing import failing, sync


@dataclasses.dataclass
class Destination:
    """The place of a result, checked before the work and again when the result is published.

    Attributes:
        path: absolute path.
        option: the option that names it; None if there is none.
        overwrite: whether to replace an earlier result.
        folder: whether the result is a folder or a file.
        inputs: real paths of the inputs of the work.
        again: what the user can do if a finished result cannot be published, once the place is
            free.
    """

    path: Path
    option: str | None = None
    overwrite: bool = False
    folder: bool = True
    inputs: tuple[Path, ...] = ()
    again: str = "can be moved there once the place is free"
    _made: str | None = None

    def with_inputs(self, inputs: Mapping[str, Iterable[Path]]) -> "Destination":
        """Returns the same place for work that also reads these paths, by option."""
        paths = (path for ones in inputs.values() for path in ones)
        return dataclasses.replace(self, inputs=(*self.inputs, *paths))

    def check(self) -> None:
        """Checks that the result may be written there.

        Raises:
            CheckpointError: something there must not be replaced, or the place is not writable.
        """
        path = self.path
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            self._require_writable()
            return
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", problem)
            raise CheckpointError(
                f"nothing can be made there ({reason})", file=path, options=self._other()
            ) from None
        if stat.S_ISLNK(found.st_mode):
            raise self.occupied("it is a symbolic link, which is not replaced")
        if stat.S_ISDIR(found.st_mode) != self.folder:
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a file"
            raise self.occupied(
                f"it is {kind}, but the result is {'a folder' if self.folder else 'a file'}"
            )
        if self._made is not None and self._made == marker_of(path):
            return
        if not self.overwrite:
            ours = marker_of(path) if self.folder else has_checksum(path)
            options = self._other() | ({"overwrite": True} if ours else {})
            raise OccupiedError("it already exists", file=path, options=options)
        self._require_replaceable()
        self._require_writable()

    def occupied(self, problem: str) -> OccupiedError:
        return OccupiedError(problem, file=self.path, options=self._other())

    def _other(self) -> dict[str, object]:
        return {self.option: Change.OTHER} if self.option else {}

    def _require_writable(self) -> None:
        parent = next(p for p in self.path.parents if os.path.lexists(p))
        if not parent.is_dir():
            raise CheckpointError(
                "it is not a folder, so nothing can be made in it",
                file=parent,
                options=self._other(),
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise CheckpointError("it cannot be written into", file=parent, options=self._other())

    def _require_replaceable(self) -> None:
        """Raises OccupiedError unless jaxprune wrote all that is there."""
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
                verify(self.path)
            elif not has_checksum(self.path):
                raise OccupiedError(
                    "jaxprune did not write it, or it has changed since, so it is not replaced: "
                    "move or remove it yourself",
                    file=self.path,
                )
        except OccupiedError as error:
            error.options = self._other()
            raise

    def publish(self, finished: Path) -> None:
        """Moves a finished result to its place, and removes the earlier result there.

        Args:
            finished: a folder with its marker, or a file with its checksum, on the same disk.

        Raises:
            OccupiedError: something that must not be replaced appeared there during the work. The
                result stays where it is.
            CheckpointError: the result cannot be moved there.
        """
        try:
            self.check()
            with failing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self._near(finished) as near:
                    if os.path.lexists(self.path):
                        replace(near, self.path, remove_folder if self.folder else remove_unchanged)
                    else:
                        self._put(near)
                sync(self.path.parent)
        except UserError as error:
            if not os.path.lexists(finished):
                raise
            raise type(error)(
                f"{error.problem}; the finished result is saved in {finished}, and {self.again}",
                file=error.file,
            ) from error
        self._made = marker_of(self.path)

    @contextlib.contextmanager
    def _near(self, finished: Path) -> Iterator[Path]:
        """Yields the finished result on the disk of its destination; copies a file from another
        disk."""
        parent = self.path.parent
        if self.folder or os.lstat(finished).st_dev == os.stat(parent).st_dev:
            yield finished
            return
        with tempfile.TemporaryDirectory(
            prefix=f".{self.path.name[:60]}.", suffix=".partial", dir=parent
        ) as own:
            near = Path(own) / self.path.name
            shutil.copyfile(finished, near)
            sync(near)
            yield near
        remove_own(finished)

    def _put(self, finished: Path) -> None:
        try:
            renaming.rename_new(finished, self.path)
        except FileExistsError as problem:
            raise self.occupied(
                "it appeared there during the work, so it is not replaced"
            ) from problem


def destination(
    path: str | Path | Destination,
    option: str | None = None,
    *,
    overwrite: bool = False,
    folder: bool = True,
) -> Destination:
    """Returns the `Destination` of a user's path; one that is a `Destination` already is returned
    as it is.

    Raises:
        CheckpointError: the path is impossible.
    """
    return (
        path
        if isinstance(path, Destination)
        else Destination(absolute(path), option, overwrite, folder)
    )


def absolute(path: str | Path) -> Path:
    """Returns a user's path as an absolute one, whose last part is a name.

    Raises:
        CheckpointError: see `expand`, or the path is the root.
    """
    found = expand(path).absolute()
    found = found.resolve() if found.name in ("", "..") else found
    if not found.name:
        raise CheckpointError("it is the root, which is not replaced", file=path)
    return found


@contextlib.contextmanager
def staged(place: Destination) -> Iterator[Path]:
    """Yields a temporary place for a result, and publishes the result when the block ends.

    The place is an empty folder, or a file that does not exist yet. The block must write its marker
    or checksum. After an error the unfinished result is removed.

    Raises:
        CheckpointError: see `Destination`; or nothing can be written there.
    """
    place.check()
    with failing(place.path.parent):
        place.path.parent.mkdir(parents=True, exist_ok=True)
        own = Path(
            tempfile.mkdtemp(
                prefix=f".{place.path.name[:60]}.", suffix=".partial", dir=place.path.parent
            )
        )
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
