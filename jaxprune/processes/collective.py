"""What the processes of a run do together, by JAX's collectives: every process has to call these
functions.

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
"""The most that `broadcast` can send: an array of this size goes to all processes, whatever the
value's length."""


class FirstProcessError(RuntimeError):
    """What the first process did for all of them failed there, by no error of the user's."""


def is_first_process() -> bool:
    """Returns whether this process is the one that writes files."""
    return jax.process_index() == 0


def broadcast(value: Any) -> Any:
    """Returns the first process's value, JSON of up to `BROADCAST_BYTES`, on all processes."""
    if jax.process_count() == 1:
        return value
    return json.loads(_broadcast_bytes(json.dumps(value).encode() if is_first_process() else b""))


def barrier() -> None:
    """Returns when all processes have called it."""
    broadcast(None)


def on_first_process(action: Callable[[], Any]) -> Any:
    """Runs an action on the first process.

    Returns:
        Its value, JSON, on all processes.

    Raises:
        Exception: the action's error, on all processes. Where it is no `UserError`, the others
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
    """Compares what the processes work on.

    Args:
        inputs: returns it as JSON; called only where there are several processes.

    Raises:
        InputError: it is not the same on all processes, with the differences.
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
    """Returns where mappings, one a process, differ from the first one's, as clauses.

    Args:
        asked: what each process was asked, by its number; nested mappings are compared entry by
            entry.
    """
    return [
        f"{name}: {first} in process 0, {other} in process {number}"
        for number, one in enumerate(asked)
        for name, first, other in differing(asked[0], one)
    ]


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns where nested mappings differ: name, the one's value, the other's."""
    one, other = flat(one), flat(other)
    return [
        (name, one.get(name, "nothing"), other.get(name, "nothing"))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return found


def _short(value: Any) -> Any:
    """Returns a value as it is compared: a digest where it is long."""
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= 200 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _broadcast_bytes(content: bytes) -> bytes:
    """Returns the first process's bytes on all processes; a length precedes them in an array of
    fixed size."""
    if len(content) > BROADCAST_BYTES:
        raise ValueError(
            f"{len(content)} bytes cannot be sent to the other processes, at most {BROADCAST_BYTES}"
        )
    buffer = np.zeros(8 + BROADCAST_BYTES, np.uint8)
    buffer[:8] = np.frombuffer(len(content).to_bytes(8), np.uint8)
    buffer[8 : 8 + len(content)] = np.frombuffer(content, np.uint8)
    found = bytes(multihost_utils.broadcast_one_to_all(buffer))
    return found[8 : 8 + int.from_bytes(found[:8])]
