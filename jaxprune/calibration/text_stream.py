"""A text for tuning, as an endless stream of windows in an order that a seed determines."""

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np
from jaxtyping import Int

from convert.schema import Count
from jaxprune.calibration import open_source, sources_of
from jaxprune.calibration.source_weights import interleaved, shares
from jaxprune.calibration.token_id_files import load_windows
from jaxprune.calibration.tokenized_texts import Texts
from jaxprune.errors import Change, InputError

HELD_OUT = 16
"""Windows that are held out, of up to 512 tokens."""
LEAST_HELD_OUT = 4
"""Of longer ones fewer, for as many tokens, down to so many."""
AHEAD = 16
"""Windows that are made before they are asked for."""
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TuningText:
    """A text that is tuned on, and what decides which windows it gives.

    Attributes:
        sha256: of the text.
        length: tokens of a window.
        seed: of the windows' order.
        held_out: windows that are not tuned on.
        held_out_sha256: of those.
    """

    sha256: str
    length: Count
    seed: int
    held_out: Count
    held_out_sha256: str


class TextStream:
    """Windows of token ids, made in the background as they are asked for.

    Documents are taken in an order drawn from the seed, joined, and cut into windows, so that all
    of a source comes before any of it comes again; then they are taken in another order, and so on.
    The first order begins at the end of that by which `calibration_windows` takes documents, so
    that those of the calibration come last; what comes before all is held out: nothing of these
    documents is in a window, unless what they leave is more than what is held out, as of a book, or
    there is no other document: that comes first, its windows in an order of the seed's, too.
    Several sources take turns.

    Args:
        source: sources; see `calibration_windows`. Of .npy, rows are what documents are of others.
        tokenizer: a transformers tokenizer; not used for .npy.
        length: tokens a window.
        seed: the seed of the orders.
        held_out: how many windows are held out; None: by their length, see `windows_held_out`.
        vocab_size: ids of .npy have to be below it; None: below 2^31.

    Attributes:
        length: as given.
        held_out: those windows, int32 [held_out, length].
        digest: SHA-256 of all of the text, or of its ids.
        tokens: about how many come before any text comes again, by how long the tokens of the
            held-out documents are.

    Raises:
        InputError: no such source, or too little text: not one window beside those that are held
            out.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        length: int,
        seed: int = 0,
        *,
        held_out: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        held_out = windows_held_out(length) if held_out is None else held_out
        if held_out < 0 or length < 2:
            raise InputError(
                f"windows have at least 2 tokens and 0 or more are held out, not {length} and "
                f"{held_out}"
            )
        self.length, self._seed = length, seed
        self._weights = sources_of(source)
        counts = shares(self._weights, held_out)
        self._sources = {
            name: _Source(name, _documents(name, tokenizer, vocab_size), length, seed, counts[name])
            for name in self._weights
        }
        self.held_out = np.concatenate([one.held_out for one in self._sources.values()])
        digests = [one.digest for one in self._sources.values()]
        together = repr([*zip(self._weights.values(), digests, strict=True)])
        self.digest = (
            digests[0] if len(digests) == 1 else hashlib.sha256(together.encode()).hexdigest()
        )
        whole = sum(self._weights.values())
        self.tokens = min(
            int(self._sources[name].tokens * whole / share) for name, share in self._weights.items()
        )

    @property
    def identity(self) -> TuningText:
        """All that decides the windows."""
        held_out = np.ascontiguousarray(self.held_out, np.int32)
        return TuningText(
            self.digest,
            self.length,
            self._seed,
            len(held_out),
            hashlib.sha256(held_out.tobytes()).hexdigest(),
        )

    def windows(self, begin: int = 0) -> Iterator[Int[np.ndarray, "t"]]:
        """Yields windows without end, from the one of a number on."""
        stopped = threading.Event()
        windows = self._windows(begin, stopped)
        pool = ThreadPoolExecutor(1, thread_name_prefix="text")
        try:
            ahead = [pool.submit(next, windows) for _ in range(AHEAD)]
            ended = set()
            for number in count():
                name, epoch, window = ahead[number % AHEAD].result()
                ahead[number % AHEAD] = pool.submit(next, windows)
                if epoch and name not in ended:  # at use, not at prefetch
                    log.warning(
                        "the text %s is used up: the tuning repeats it as often as needed", name
                    )
                    ended.add(name)
                yield window
        finally:
            stopped.set()  # what is before the first window may be long
            pool.shutdown(cancel_futures=True)

    def _windows(
        self, begin: int, stopped: threading.Event
    ) -> Iterator[tuple[str, int, Int[np.ndarray, "t"]]]:
        """Yields the source and the epoch of each window with it, from the one of a number on."""
        streams = {name: one.windows() for name, one in self._sources.items()}
        for number, name in enumerate(interleaved(self._weights)):
            if stopped.is_set():
                return
            window = next(streams[name])
            if number >= begin:
                yield name, *window


def windows_held_out(length: int) -> int:
    """Returns the number of held-out windows of a length."""
    return max(LEAST_HELD_OUT, min(HELD_OUT, HELD_OUT * 512 // length))


class _Source:
    """One source of a stream; arguments and errors as for `TextStream`."""

    def __init__(
        self, name: str, documents: "Texts | _Rows", length: int, seed: int, held_out: int
    ) -> None:
        self._documents, self._length, self._seed = documents, length, seed
        self.digest, size = documents.measure()
        self._order = np.random.default_rng(seed).permutation(len(documents))[::-1]
        ids, taken = np.zeros(0, np.int32), 0
        while len(self._order) and (not taken or len(ids) < held_out * length):
            document, self._order = int(self._order[0]), self._order[1:]
            ids = np.concatenate([ids, documents.joined(document)])
            taken += documents.size_of(document)
        # What the last of them leaves is tuned on where it is a book, or all that there is, as of a
        # .txt file.
        rest = ids[held_out * length :]
        self._rest = rest if len(rest) > held_out * length else rest[:0]
        if next(self._epoch(0), None) is None:
            self._rest = rest
        if next(self._epoch(0), None) is None:
            least = (held_out + 1) * length
            raise InputError(
                f"{name} has less than the {least} tokens that a tuning needs: {held_out} windows "
                f"of {length} that are held out, and one to tune on",
                options={"tune_text": Change.OTHER, "seqlen": Change.LOWER},
            )
        self.held_out = ids[: held_out * length].reshape(held_out, length)
        self.tokens = round(size * len(ids) / max(1, taken)) - len(ids) + len(self._rest)

    def windows(self) -> Iterator[tuple[int, Int[np.ndarray, "t"]]]:
        """Yields windows without end, each with the number of its epoch."""
        return ((epoch, window) for epoch in count() for window in self._epoch(epoch))

    def _epoch(self, number: int) -> Iterator[Int[np.ndarray, "t"]]:
        """Yields the windows of the whole text, without the incomplete one at its end."""
        generator = np.random.default_rng([self._seed, number])
        order = generator.permutation(self._order) if number else self._order
        rest, ids = self._cut(self._rest)
        yield from (rest[row] for row in generator.permutation(len(rest)))
        for document in order:
            windows, ids = self._cut(np.concatenate([ids, self._documents.joined(int(document))]))
            yield from windows

    def _cut(
        self, ids: Int[np.ndarray, "_"]
    ) -> tuple[Int[np.ndarray, "w t"], Int[np.ndarray, "_"]]:
        """Returns the windows of ids, and what is left of them."""
        whole = len(ids) // self._length * self._length
        return ids[:whole].reshape(-1, self._length), ids[whole:]


def _documents(source: str, tokenizer: Any, vocab_size: int | None) -> "Texts | _Rows":
    if source.endswith(".npy"):
        return _Rows(load_windows(source, None, vocab_size))
    return open_source(source, "train", tokenizer)


class _Rows:
    """The rows of a file of token ids."""

    def __init__(self, rows: Int[np.ndarray, "w t"]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def joined(self, index: int) -> Int[np.ndarray, "_"]:
        return self._rows[index].astype(np.int32)

    def measure(self) -> tuple[str, int]:
        whole = hashlib.sha256()
        for row in self._rows:
            whole.update(row.astype(np.int32).tobytes())
        return whole.hexdigest(), self._rows.size

    def size_of(self, index: int) -> int:
        return self._rows.shape[1]
