"""Hidden states in a run's journal: entries of plain files, for they may be larger than memory.

They are only worth keeping now and then, for without them they are computed again.
"""

import errno
import hashlib
import io
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import ownership
from convert.errors import UserError
from convert.files import require_regular
from convert.writing import failing
from jaxprune.processes.collective import broadcast, is_first_process
from jaxprune.pruning.journal import Journal, read_note
from jaxprune.streaming.hidden_states import HiddenStates

log = logging.getLogger(__name__)


def keep(journal: Journal, stage: str, position: int, states: Mapping[str, HiddenStates]) -> None:
    """Keeps states, in place of those kept before, if the work since then was long enough.

    Args:
        journal: the journal of the run.
        stage: the stage that they belong to.
        position: what they are behind or before; of the stage's own choice.
        states: the states by name.

    Raises:
        CheckpointError: they cannot be written.
    """
    if not journal.worth_keeping(
        sum(math.prod(one.shape) * one.dtype.itemsize for one in states.values())
    ):
        return
    journal.wait()  # what they are behind or before is committed first, and nothing else meanwhile
    before, name = _positions(journal, stage), f"{stage}/states.{position}"
    with journal.keeping():
        if not is_first_process():
            for one in states.values():
                for rows in one.slices():
                    one.read(rows)  # for the first to write
            return
        staged = journal.staging_place(name)
        with failing(staged):
            staged.mkdir(parents=True)
            files = {kind: _write(staged / kind, one) for kind, one in states.items()}
        journal.commit(name, files, _shapes(states))
    for old in before:
        if old != position:
            journal.remove(f"{stage}/states.{old}")


def position(journal: Journal, stage: str) -> int | None:
    """Returns where the kept states of a stage are; None without any."""
    return broadcast(max(_positions(journal, stage), default=None))


def restore(journal: Journal, stage: str, states: Mapping[str, HiddenStates]) -> bool:
    """Fills states with those kept for a stage; returns whether they are whole, else what they hold
    is of no use."""
    kept = position(journal, stage)
    if kept is None:
        return False
    name = f"{stage}/states.{kept}"
    folder = journal.folder / name
    try:
        note = read_note(journal.note(name))
        whole = note.figures == _shapes(states) and note.files == {
            kind: _fill(folder / kind, one) for kind, one in states.items()
        }
    except (OSError, UserError, ValueError) as error:
        whole = False
        log.warning("cannot read %s: %s", folder, error)
    whole = broadcast(whole)
    if not whole and is_first_process():
        log.warning("%s is damaged; the hidden states are computed again", folder)
        journal.vacate(name)
    return whole


def _positions(journal: Journal, stage: str) -> list[int]:
    found = (
        path.name.partition(".")[2]
        for path in (journal.folder / stage).glob("states.*")
        if path.is_dir()
    )
    numbers = (int(number) for number in found if number.isdecimal())
    return [number for number in numbers if journal.note(f"{stage}/states.{number}").exists()]


def _shapes(states: Mapping[str, HiddenStates]) -> dict[str, Any]:
    """Returns what hidden states are, as JSON."""
    return {
        kind: {"dtype": one.dtype.name, "shape": list(one.shape)} for kind, one in states.items()
    }


def _write(path: Path, states: HiddenStates) -> str:
    """Writes states to a file; returns its digest."""
    whole = hashlib.sha256()
    with io.FileIO(path, "x") as file:
        for rows in states.slices():
            block = np.ascontiguousarray(states.read(rows)).reshape(-1).view(np.uint8).data
            if file.write(block) != len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            whole.update(block)
    ownership.remember(path, whole.hexdigest())
    return whole.hexdigest()


def _fill(path: Path, states: HiddenStates) -> str:
    """Fills states from a file; returns its digest. ValueError: the file is too short."""
    whole = hashlib.sha256()
    require_regular(path)
    with io.FileIO(path, "r") as file:
        for rows in states.slices():
            values = np.empty((rows.stop - rows.start, *states.shape[1:]), states.dtype)
            block = values.reshape(-1).view(np.uint8).data
            if file.readinto(block) != len(block):
                raise ValueError("it is too short")
            states.write(rows, values)
            whole.update(block)
    return whole.hexdigest()
