"""Collective operations of the processes of a run: every process must call these functions.

Each process runs the same program on the same host arrays. The first one writes files.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from convert.errors import joined
from jaxprune.errors import InputError, UserError

BROADCAST_BYTES = 2**16
"""Maximum size of a value for `broadcast`. An array of this size goes to all processes, whatever
the value's length."""


class FirstProcessError(RuntimeError):
    """An action on the first process failed, for a reason that is not a `UserError`."""


def is_first_process() -> bool:
    """Returns whether this process is the first, which writes files."""
    return jax.process_index() == 0


def broadcast(value: Any) -> Any:
    """Returns the first process's value on all processes; JSON of at most `BROADCAST_BYTES`."""
    if jax.process_count() == 1:
        return value
    return json.loads(_broadcast_bytes(json.dumps(value).encode() if is_first_process() else b""))


def barrier() -> None:
    """Waits until all processes have called it."""
    broadcast(None)


def on_first_process(action: Callable[[], Any]) -> Any:
    """Runs an action on the first process.

    Returns:
        The action's value, JSON, on all processes.

    Raises:
        Exception: the action's error, on all processes. If it is not a `UserError`, the others
            raise `FirstProcessError`.
    """
    if jax.process_count() == 1:
        return action()
    value, fault = None, None
    if is_first_process():
        try:
            value = action()
        except Exception as error:
            fault = error
    shared = fault if isinstance(fault, UserError) else fault and FirstProcessError(repr(fault))
    if error_there := pickle.loads(_broadcast_bytes(pickle.dumps(shared))):
        raise fault or error_there
    return broadcast(value)


def require_same(inputs: Callable[[], Mapping[str, Any]]) -> None:
    """Checks that all processes have the same inputs.

    Args:
        inputs: returns the inputs as JSON; called only with several processes.

    Raises:
        InputError: the inputs differ; the message lists the differences.
    """
    if jax.process_count() == 1:
        return
    entries = {name: _short(value) for name, value in flat(inputs()).items()}
    text = json.dumps(entries, sort_keys=True).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    row = np.zeros(int(lengths.max()), np.uint8)
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(row)
    found = [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
    if different := differences(found):
        raise InputError(
            f"the processes of this run do not have the same inputs: {joined(different)}"
        )


def differences(asked: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the differences between each process's mapping and the first one's, as clauses.

    Args:
        asked: the options of each process, by its number; nested mappings are compared entry by
            entry.
    """
    return [
        f"{name}: {first} in process 0, {other} in process {number}"
        for number, one in enumerate(asked)
        for name, first, other in differing(asked[0], one)
    ]


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns the differences of two nested mappings: (name, value in `one`, value in `other`)."""
    one, other = flat(one), flat(other)
    return [
        (name, one.get(name, "nothing"), other.get(name, "nothing"))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings into one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return found


def _short(value: Any) -> Any:
    """Returns a value for comparison; a long one is replaced by its digest."""
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= 200 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _broadcast_bytes(content: bytes) -> bytes:
    """Returns the first process's bytes on all processes, in an array of fixed size that starts
    with their length."""
    if len(content) > BROADCAST_BYTES:
        raise ValueError(
            f"{len(content)} bytes cannot be sent to the other processes, at most {BROADCAST_BYTES}"
        )
    buffer = np.zeros(8 + BROADCAST_BYTES, np.uint8)
    buffer[:8] = np.frombuffer(len(content).to_bytes(8), np.uint8)
    buffer[8 : 8 + len(content)] = np.frombuffer(content, np.uint8)
    found = bytes(multihost_utils.broadcast_one_to_all(buffer))
    return found[8 : 8 + int.from_bytes(found[:8])]
