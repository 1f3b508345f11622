"""Packs many short texts into few windows. Requests with the same context share it.

A multiple-choice question asks for the probability of each answer after the same context. Scoring
each answer separately computes the context once per answer, and pads short rows to the longest.
Here a context is followed by all its answers, and several such groups fill one window.
`models.Layout` tells the attention which tokens see which.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxprune.errors import InputError
from jaxprune.models import Layout

SHORTEST = 256
"""Tokens of the shortest windows; longer ones are this times a power of two."""


class Request(NamedTuple):
    """A text whose end is scored.

    Attributes:
        context: at least one token.
        continuation: at least one token, scored given all before it.
    """

    context: Sequence[int]
    continuation: Sequence[int]


class Group(NamedTuple):
    """Requests with one context.

    Attributes:
        context: the common tokens.
        branches: continuations without their last token, which predicts nothing -> requests, by
            number.
        size: tokens of it all.
    """

    context: tuple[int, ...]
    branches: dict[tuple[int, ...], list[int]]
    size: int


class Packed(NamedTuple):
    """Windows of one length, and where in them tokens are predicted.

    Attributes:
        tokens: [windows, length] token ids; 0 where there is no text.
        layout: the layout of the windows.
        request: number of the request that each predicted token belongs to.
        rows, columns: where it is predicted.
        targets: its id.
    """

    tokens: Int[np.ndarray, "w t"]
    layout: Layout
    request: Int[np.ndarray, "n"]
    rows: Int[np.ndarray, "n"]
    columns: Int[np.ndarray, "n"]
    targets: Int[np.ndarray, "n"]


def group(requests: Sequence[Request], longest: int) -> list[Group]:
    """Returns the requests by context.

    Args:
        requests: the requests to be scored.
        longest: tokens of the longest window; of longer texts the beginning is dropped, as lm-eval
            does.

    Raises:
        InputError: a continuation that does not fit, or is empty.
    """
    contexts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= longest:
            raise InputError(
                f"a text cannot be scored, its context has {len(context)} tokens and what follows "
                f"{len(continuation)}",
                wanted=f"at least 1, and at most {longest} that follow",
            )
        kept = tuple(context)[-(longest + 1 - len(continuation)) :]
        contexts.setdefault(kept, {}).setdefault(tuple(continuation[:-1]), []).append(number)
    groups = []
    for context, branches in contexts.items():
        taken: dict[tuple[int, ...], list[int]] = {}
        size = len(context)
        for branch, numbers in branches.items():
            if taken and size + len(branch) > longest:
                groups.append(Group(context, taken, size))
                taken, size = {}, len(context)
            taken[branch] = numbers
            size += len(branch)
        groups.append(Group(context, taken, size))
    return groups


def batches(groups: Sequence[Group], most: int) -> Iterator[list[Group]]:
    """Cuts groups into batches of at most so many tokens (or a single group)."""
    batch: list[Group] = []
    tokens = 0
    for one in groups:
        if batch and tokens + one.size > most:
            yield batch
            batch, tokens = [], 0
        batch.append(one)
        tokens += one.size
    if batch:
        yield batch


def pack(
    requests: Sequence[Request], groups: Sequence[Group], longest: int, tokens_per_batch: int
) -> list[Packed]:
    """Lays groups into windows, the largest first, each where it leaves the least room.

    Args:
        requests: all requests, by number.
        groups: the groups to be laid down.
        longest: tokens of the longest window.
        tokens_per_batch: windows come in batches of one size, of at most so many tokens; empty ones
            fill the last.

    Returns:
        One `Packed` a length of window, the shortest first.
    """
    lengths = [SHORTEST]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    lengths = [min(length, longest) for length in lengths]
    content: dict[int, list[list[Group]]] = {length: [] for length in lengths}
    room: list[tuple[int, int, int]] = []  # free tokens, length and number of each window
    for one in sorted(groups, key=lambda g: -g.size):
        place = bisect.bisect_left(room, (one.size, 0, 0))
        if place < len(room):
            free, length, number = room.pop(place)
        else:
            length = next(length for length in lengths if length >= one.size)
            free, number = length, len(content[length])
            content[length].append([])
        content[length][number].append(one)
        bisect.insort(room, (free - one.size, length, number))
    return [
        _fill(requests, windows, length, max(1, tokens_per_batch // length))
        for length, windows in content.items()
        if windows
    ]


def _fill(
    requests: Sequence[Request], windows: Sequence[Sequence[Group]], length: int, batch: int
) -> Packed:
    # Few empty windows and few distinct shapes: batches of one size, which is a multiple of an
    # eighth of the largest.
    step, batches = max(1, batch // 8), -(-len(windows) // batch)
    count = batches * -(-len(windows) // (batches * step)) * step
    tokens = np.zeros((count, length), np.int32)
    layout = Layout(np.zeros_like(tokens), np.full_like(tokens, -1), np.zeros_like(tokens))
    places: list[tuple[int, int, int, int]] = []
    for row, groups in enumerate(windows):
        flat: list[tuple[int, int, int, int]] = []
        for number, (context, branches, _) in enumerate(groups):
            flat += [(token, at, number, 0) for at, token in enumerate(context)]
            last = len(flat) - 1
            for which, (branch, askers) in enumerate(branches.items(), 1):
                columns = [last, *range(len(flat), len(flat) + len(branch))]
                flat += [
                    (token, at, number, which) for at, token in enumerate(branch, len(context))
                ]
                for asker in askers:
                    targets = requests[asker].continuation
                    places += [
                        (asker, row, c, target) for c, target in zip(columns, targets, strict=True)
                    ]
        fields = tokens, layout.positions, layout.group, layout.branch
        for field, values in zip(fields, np.array(flat, np.int32).T, strict=True):
            field[row, : len(flat)] = values
    request, rows, columns, targets = np.array(places, np.int64).T
    return Packed(tokens, layout, request, rows, columns, targets.astype(np.int32))
