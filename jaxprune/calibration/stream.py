"""A text as a stream of windows, in an order that a seed fixes: what a model is tuned on, however much that is."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from jaxprune.calibration import JOIN, open_source
from jaxprune.calibration.ids import load_windows
from jaxprune.calibration.tokens import token_ids
from jaxprune.errors import Change, InputError

AHEAD = 16
"""Windows that are made before they are asked for."""
log = logging.getLogger(__name__)


class TextStream:
    """Windows of token ids, made in the background as they are asked for.

    Documents are taken in an order drawn from the seed, joined, and cut into windows, so that all of the text comes
    before any of it comes again; then they are taken in another order, and so on. The last ones of the first order are
    held out: nothing of them is in a window.

    Args:
        source: a source's name, or a path; see `calibration_windows`. Of .npy, rows are what documents are of others.
        tokenizer: a transformers tokenizer; not used for .npy.
        length: tokens a window.
        seed: the seed of the orders.
        held_out: how many windows are held out.
        vocab_size: ids of .npy have to be below it; None: below 2^31.

    Attributes:
        length: as given.
        held_out: those windows, int32 [held_out, length].
        digest: SHA-256 of all of the text, or of its ids.

    Raises:
        InputError: no such source, or too little text: not one window beside those that are held out.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        length: int,
        seed: int = 0,
        *,
        held_out: int = 16,
        vocab_size: int | None = None,
    ) -> None:
        if held_out < 0 or length < 2:
            raise InputError(f"windows have at least 2 tokens and 0 or more are held out, not {length} and {held_out}")
        self.length, self._seed = length, seed
        self._documents: _Documents
        if source.endswith(".npy"):
            self._documents = _Rows(load_windows(source, length, vocab_size))
        else:
            self._documents = _Texts(open_source(source, "train")[0], tokenizer)
        self.digest = self._documents.digest()
        self._order = np.random.default_rng(seed).permutation(len(self._documents))
        ids = np.zeros(0, np.int32)
        while len(ids) < held_out * length and len(self._order):
            ids = np.concatenate([ids, self._documents[int(self._order[-1])]])
            self._order = self._order[:-1]
        if len(ids) < held_out * length or next(self._epoch(0), None) is None:
            raise InputError(
                f"{source} has too little text to be tuned on, of which {held_out} windows of {length} are held out",
                options={"seqlen": Change.LOWER, "tune_tokens": Change.OMIT},
            )
        self.held_out = ids[: held_out * length].reshape(held_out, length)

    def windows(self, begin: int = 0) -> Iterator[Int[np.ndarray, "t"]]:
        """Yields windows without end, from the one of a number on."""
        windows = islice(((epoch, window) for epoch in count() for window in self._epoch(epoch)), begin, None)
        with ThreadPoolExecutor(1, thread_name_prefix="text") as pool:
            ahead = [pool.submit(next, windows) for _ in range(AHEAD)]
            before = 0
            for number in count():
                epoch, window = ahead[number % AHEAD].result()
                ahead[number % AHEAD] = pool.submit(next, windows)
                if epoch > before:  # said when it is used, not when it is made
                    log.warning("the text is at its end: it is taken again, in another order")
                before = epoch
                yield window

    def _epoch(self, number: int) -> Iterator[Int[np.ndarray, "t"]]:
        """Yields the windows of all of the text; what is left at its end is left out."""
        order = np.random.default_rng([self._seed, number]).permutation(self._order) if number else self._order
        ids = np.zeros(0, np.int32)
        for document in order:
            ids = np.concatenate([ids, self._documents[int(document)]])
            whole = len(ids) // self.length * self.length
            yield from ids[:whole].reshape(-1, self.length)
            ids = ids[whole:]


class _Documents(Protocol):
    """Token ids by document."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Int[np.ndarray, "_"]: ...
    def digest(self) -> str: ...


class _Texts:
    """The token ids of texts, with what joins each to the next."""

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        self._texts, self._tokenizer = texts, tokenizer
        self._join = token_ids(tokenizer, JOIN, special=False)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Int[np.ndarray, "_"]:
        return np.concatenate([token_ids(self._tokenizer, self._texts[index]), self._join])

    def digest(self) -> str:
        whole = hashlib.sha256()
        for index in range(len(self._texts)):
            content = self._texts[index].encode()
            whole.update(len(content).to_bytes(8, "big") + content)
        return whole.hexdigest()


class _Rows:
    """The rows of a file of token ids."""

    def __init__(self, rows: Int[np.ndarray, "w t"]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Int[np.ndarray, "_"]:
        return self._rows[index].astype(np.int32)

    def digest(self) -> str:
        whole = hashlib.sha256()
        for row in self._rows:
            whole.update(row.astype(np.int32).tobytes())
        return whole.hexdigest()
