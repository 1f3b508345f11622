"""The run store: the finished work of a run on disk, one file for each saved result.

A saved result is named `STAGE/NAME` and lies in `STAGE/NAME.safetensors`. The file has arrays. Its
metadata has figures as JSON, the run's token, the result's name and the file's checksum (see
`convert.ownership`). The store writes it in a work folder, syncs it and renames it, so a saved
result is complete or absent, and it identifies its run. Files that have changed since are
quarantined: moved to a folder that stays when the store is removed.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import pydantic
from safetensors import SafetensorError, safe_open

from convert import CheckpointError, Params, ownership, schema, writing
from convert.errors import DamagedError, UserError
from convert.shards import TensorFile
from convert.writing import failing
from jaxprune.errors import InputError
from jaxprune.processes.collective import broadcast, is_first_process, on_first_process
from jaxprune.sharding import fetch
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.sweep import Results

LAYERS, EXPERTS, HEADS, CHANNELS = "layers", "experts", "heads", "channels"
"""What removals measure, or leave of each layer."""
MIXES = "mixes"
"""The divergence of each mix of removed parts that was tried."""
SENSITIVITY, PRUNED, QUANTIZED = "sensitivity", "pruned", "quantized"
TUNING, TUNED = "tuning", "tuned"
CURVE = "curve"
"""The measures of a tuning that has ended."""
TEXTS = "texts"
WEIGHTS = "weights"
"""Digests of the dense weights; see `identity.SavedDigests`."""
STAGES = {
    *(MIXES, LAYERS, EXPERTS, HEADS, CHANNELS, SENSITIVITY, PRUNED, QUANTIZED),
    *(TUNING, TUNED, CURVE, TEXTS, WEIGHTS),
}
"""The first part of the names of saved results."""
RUN, NEW_RUN, LOCK = "run.json", ".jaxprune-run.json.new", "lock"
"""The files of a store beside its saved results."""
SUFFIX = ".safetensors"
PATIENCE = 20
"""Large states are saved when the work since the last time took so many times longer than saving
them."""
_BYTES_PER_SECOND = 5e8  # assumed of a disk until it has been seen
log = logging.getLogger(__name__)


class DamagedResultError(InputError):
    """A saved result was damaged while the run used it."""

    again = "without what is damaged,"


def damaged(what: str) -> DamagedResultError:
    """Returns the error of a saved result that was damaged during the run."""
    return DamagedResultError(
        f"{what} was damaged on the disk while it was used: run the same command again"
    )


class Saved(NamedTuple):
    """A saved result.

    Attributes:
        arrays: name -> array, C-contiguous.
        figures: JSON.
    """

    arrays: Params
    figures: dict[str, Any]


class _Metadata(schema.Schema):
    run: str
    name: str
    figures: pydantic.Json[dict[str, Any]]


class RunStore:
    """The saved results of a run, written in the background; `opening.open_store` yields it.

    With several processes, all call each method. The first one writes, and all read.

    Args:
        folder: the folder of the store; it exists.
        token: the run's, random.
        run: the digest of the run's identity.

    Attributes:
        folder, token: as given.
        work: the folder of unfinished files, all written by the run.
        quarantine: the folder of files that have changed; it stays when the store is removed.
        result: the folder where the checkpoint is written.
        masks: the file where the masks are written.
        kind: the first words of the marker of the run's result; see `publishing`.
        to_publish: whether the finished result, and the masks, must still be moved to their
            places; None: they are not finished.
        new_digests: returns the digests of weights that were read since the last call, which are
            saved before the next result; None: there are none.
    """

    def __init__(self, folder: Path, token: str = "0", run: str = "") -> None:
        self.folder, self.token, self.kind = folder, token, f"run {run} {token}"
        self.work, self.quarantine = folder / f"work-{token}", folder / f"quarantine-{token}"
        self.result, self.masks = self.work / "result", self.work / "masks"
        self.to_publish: tuple[bool, bool] | None = None
        self.new_digests: Callable[[], Mapping[str, Any] | None] = lambda: None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: Future[None] | None = None
        self._last_saved, self._cost = time.monotonic(), 0.0

    def path(self, name: str) -> Path:
        """Returns the file of a saved result."""
        return self.folder / f"{name}{SUFFIX}"

    def files(self) -> list[Path]:
        """Returns the files at places of saved results."""
        return [self.folder / path for path in writing.names(self.folder) if is_result(path)]

    def names(self, stage: str) -> list[str]:
        """Returns the names of a stage's saved results, without `STAGE/` before them."""
        return broadcast(self._names(stage))

    def _names(self, stage: str) -> list[str]:
        found = writing.names(self.folder / stage)
        return [path.removesuffix(SUFFIX) for path in found if path.endswith(SUFFIX)]

    def __contains__(self, name: str) -> bool:
        return broadcast(self.path(name).is_file())

    def put(self, name: str, arrays: Params, figures: Mapping[str, Any]) -> None:
        """Saves a result in the background, after the previous one; replaces one of its name.

        Args:
            name: STAGE/NAME.
            arrays: name -> array, of a dtype of `convert.shards.STORED`.
            figures: JSON.

        Raises:
            CheckpointError: the previous one could not be written.
        """
        self.wait()
        if jax.process_count() > 1:
            on_first_process(lambda: self._save(name, arrays, figures))
        else:
            self._pending = self._pool.submit(self._save, name, arrays, figures)

    def wait(self) -> None:
        """Returns when all results are saved.

        Raises:
            CheckpointError: one could not be written.
        """
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits for the last save and stops the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def get(self, name: str, prefix: str | None = "") -> Saved | None:
        """Returns a saved result, or None. A damaged one is reported and quarantined.

        Args:
            name: STAGE/NAME.
            prefix: returns the arrays whose names have this prefix, without it; None: no arrays.

        Raises:
            CheckpointError: not all processes can read it.
        """
        self.wait()
        if name not in self:
            return None
        saved = None
        try:
            with self.opened(name) as (file, figures):
                wanted = [] if prefix is None else [n for n in file.keys() if n.startswith(prefix)]
                arrays = {n.removeprefix(prefix or ""): file.get_tensor(n) for n in wanted}
                saved = Saved(arrays, figures)
        except UserError as error:
            self.reject(name, error)
        if not broadcast(saved is not None):
            return None
        if saved is None:
            raise CheckpointError(f"{self.folder} must be on a disk that all hosts see")
        return saved

    def put_states(self, name: str, states: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Saves large states, if enough time has passed since states were last saved.

        Args:
            name: STAGE/NAME.
            states: name -> hidden states, written block by block because they may be larger than
                memory; or an array, on devices or the host. Each process has some of them.
            figures: JSON.

        Raises:
            CheckpointError: they cannot be written.
        """
        if not self.worth_saving(
            sum(math.prod(one.shape) * one.dtype.itemsize for one in states.values())
        ):
            return
        self.wait()  # what they follow is saved first
        start = time.monotonic()
        self._save(name, states, figures)
        self._last_saved = time.monotonic()
        self._cost = self._last_saved - start

    def worth_saving(self, size: int) -> bool:
        """Returns whether saving so many bytes takes little of the time since the last save."""
        cost = self._cost or size / _BYTES_PER_SECOND
        return broadcast(time.monotonic() - self._last_saved > PATIENCE * cost)

    def drop(self, *names: str) -> None:
        """Removes saved results, or all of stages; those that have changed are quarantined."""
        self.wait()
        for name in names if is_first_process() else ():
            for inner in (name, *(f"{name}/{one}" for one in self._names(name))):
                if self._is_intact(inner):
                    ownership.remove_unchanged(self.path(inner))
            ownership.remove_empties(self.folder / name)

    def reject(self, name: str, error: UserError) -> None:
        """Reports that a saved result is damaged, and quarantines it."""
        if is_first_process():
            log.warning("%s is damaged and will be made again: %s", self.path(name), error)
            self._quarantine(name)

    def _quarantine(self, name: str) -> None:
        number = 0
        while os.path.lexists(place := self.quarantine / f"{name}{SUFFIX}.{number}"):
            number += 1
        writing.put(self.path(name), place)

    def _is_intact(self, name: str) -> bool:
        """Returns whether a saved result exists unchanged; quarantines anything else there."""
        path = self.path(name)
        if not os.path.lexists(path):
            return False
        with contextlib.suppress(UserError):
            if ownership.has_checksum(path) and not path.is_symlink():
                return True
        self._quarantine(name)
        return False

    def _save(self, name: str, arrays: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        file = self._file(name, arrays, figures) if is_first_process() else None
        for array, values in arrays.items():
            for first, block in _blocks(values):
                if not file:
                    continue
                if first is None:
                    file.write(array, block)
                else:
                    file.write_rows(array, first, block)
        if file:
            self._place(name, file)

    def _file(self, name: str, arrays: Mapping[str, Any], figures: Mapping[str, Any]) -> TensorFile:
        """Returns a new file in the work folder, for arrays, or states, of these shapes."""
        path = self.work / f"{name}{SUFFIX}"
        with failing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"checksum": ownership.EMPTY_CHECKSUM, "run": self.token, "name": name}
        return TensorFile(path, arrays, metadata | {"figures": json.dumps(figures)})

    def _place(self, name: str, file: TensorFile) -> None:
        """Moves a file to its place, after the digests of the weights that it was made from."""
        if known := self.new_digests():
            number = f"{WEIGHTS}/{len(self._names(WEIGHTS))}"
            self._move(number, self._file(number, {}, known))
        self._move(name, file)

    def _move(self, name: str, file: TensorFile) -> None:
        file.finish()
        ownership.add_checksum(file.path)
        place = self.path(name)
        if self._is_intact(name):
            with failing(place):
                ownership.replace(file.path, place, ownership.remove_unchanged)
                writing.sync(place.parent)
        else:
            writing.put(file.path, place)
        ownership.remember(place)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields an open file whose checksum is right, and its figures.

        Raises:
            UserError: the file has changed, or cannot be read.
        """
        path = self.path(name)
        if not ownership.has_checksum(path):
            raise DamagedError("it has changed since it was written", file=path)
        ownership.remember(path)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = schema.check(_Metadata, file.metadata(), file=path, entry="metadata")
                if (metadata.run, metadata.name) != (self.token, name):
                    raise DamagedError("it is another run's, or another result", file=path)
                yield file, metadata.figures
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"it cannot be read ({error})", file=path) from error


def is_result(path: str) -> bool:
    """Returns whether a relative path is that of a saved result."""
    return path.endswith(SUFFIX) and Path(path).parts[0].removesuffix(SUFFIX) in STAGES


def _blocks(values: Any) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yields hidden states as blocks of rows, each with the index of its first row; an array as a
    whole, with None."""
    if isinstance(values, HiddenStates):
        yield from ((rows.start, values.read(rows)) for rows in values.slices())
    else:
        yield None, fetch(values)


def _specs(states: Mapping[str, HiddenStates]) -> dict[str, Any]:
    return {kind: [one.dtype.name, *one.shape] for kind, one in states.items()}


def flat(**groups: Params) -> Params:
    """Returns the arrays of groups by `GROUP/NAME`."""
    return {f"{group}/{name}": a for group, arrays in groups.items() for name, a in arrays.items()}


def grouped(arrays: Params) -> defaultdict[str, dict[str, Any]]:
    """Returns the groups of `flat`; without arrays, any is empty."""
    groups: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for path, array in arrays.items():
        group, _, name = path.partition("/")
        groups[group][name] = array
    return groups


T = TypeVar("T")


class Stage(Results[T]):
    """The saved results of one stage, by index.

    Args:
        store: the store of the run.
        name: the stage's.
        save: result -> arrays and figures to save.
        load: index of a result, its arrays and figures -> the result. It raises DamagedError if
            `save` cannot have made them.
    """

    def __init__(
        self,
        store: RunStore,
        name: str,
        save: Callable[[T], Saved],
        load: Callable[[int, Saved], T],
    ) -> None:
        self.store, self.name, self._save, self._load = store, name, save, load

    def __contains__(self, index: int) -> bool:
        return f"{self.name}/{index}" in self.store

    def put(self, index: int, result: T) -> None:
        if index not in self:
            self.store.put(f"{self.name}/{index}", *self._save(result))

    def get(self, index: int) -> T | None:
        saved = self.store.get(name := f"{self.name}/{index}")
        try:
            return saved and self._load(index, saved)
        except DamagedError as error:
            self.store.reject(name, error)
            return None

    def put_states(self, states: Mapping[str, HiddenStates], position: int) -> None:
        figures = {"position": position, "states": _specs(states)}
        self.store.put_states(f"{self.name}/states", states, figures)

    def states(
        self, usable: Callable[[int], bool], empty: Callable[[], Mapping[str, HiddenStates]]
    ) -> tuple[int, Mapping[str, HiddenStates]] | None:
        found = self.store.get(name := f"{self.name}/states", None)
        if not found or not usable(found.figures["position"]):
            return None
        states = empty()
        if found.figures["states"] != _specs(states):
            return None
        with self.store.opened(name) as (file, _):
            for kind, one in states.items():
                saved = file.get_slice(kind)
                for rows in one.slices():
                    one.write(rows, saved[rows.start : rows.stop])
        return found.figures["position"], states

    def require(self, index: int) -> T:
        """Returns a result that the run has finished.

        Raises:
            DamagedResultError: it was damaged meanwhile.
        """
        if (found := self.get(index)) is not None:
            return found
        raise damaged(f"layer {index}")

    def complete(self, count: int) -> bool:
        """Returns whether results 0 to count − 1 are saved and undamaged."""
        return all(self.store.get(f"{self.name}/{index}", None) for index in range(count))
