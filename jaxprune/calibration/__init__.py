"""Text for calibration and evaluation, one source a file.

A source file exposes `documents(split)`: the texts of its "train" split, which calibrates, or of its "test"
split, which evaluates; the two never share a document. Where the documents are usually too short for a window,
`PACK = True` joins them always.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxprune import plugins
from jaxprune.errors import InputError

JOIN = "\n\n"
"""Between documents that share a window, for calibration as for evaluation."""


def default_text(ckpt: str) -> str | None:
    """The text for a checkpoint that needs no hub: one that needs none either; None for other checkpoints."""
    return "wikipedia" if ckpt == "smollm2-135m" else None


def sample(
    source: str,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    *,
    pack: bool = False,
) -> Int[np.ndarray, "count length"]:
    """Calibration windows.

    Documents are taken in an order drawn from the seed. One that is longer than a window gives one window, at a
    place drawn from the seed; shorter ones are skipped, as Wanda and SparseGPT do on C4. Where `pack` is set (or
    the source always packs), documents are joined instead, and cut into windows.

    Args:
        source: a source's name, or a path that `textfile` can read; .npy holds windows of token ids.
        tokenizer: a transformers tokenizer; not used for .npy.
        count: windows.
        length: tokens a window.
        seed: of the order of documents and the places of windows.
        pack: join documents.

    Returns:
        int32[count, length].

    Raises:
        InputError: no such source, or too little text; the message says how many windows there are.
    """
    if count < 1 or length < 2:
        raise InputError(f"at least 1 window of at least 2 tokens is needed, not {count} of {length}")
    generator = np.random.default_rng(seed)
    if source.endswith(".npy"):
        windows = _load_windows(source, length)
        if len(windows) < count:
            raise InputError(f"{source} holds {len(windows)} windows, not {count}: pass --nsamples {len(windows)}")
        return windows[np.sort(generator.permutation(len(windows))[:count])]
    texts, always_pack = _open(source, "train")
    order = generator.permutation(len(texts))
    if pack or always_pack:
        return _packed(source, texts, order, tokenizer, count, length, generator)
    return _one_a_document(source, texts, order, tokenizer, count, length, generator)


def evaluation_windows(
    source: str, tokenizer: Any, length: int, limit: int | None = None
) -> Int[np.ndarray, "windows length"]:
    """Consecutive windows of a source's test split: documents joined by a blank line and tokenized once.

    Args:
        source: as for `sample`; a file is its own test split.
        tokenizer: a transformers tokenizer; not used for .npy.
        length: tokens a window; the remainder of the text is dropped.
        limit: the most windows.

    Raises:
        InputError: no such source, or not one window of text.
    """
    if source.endswith(".npy"):
        return _load_windows(source, length)[:limit]
    texts, _ = _open(source, "test")
    ids = _tokenize(tokenizer, JOIN.join(texts))
    if len(ids) < length:
        raise InputError(f"{source} has {len(ids)} tokens to evaluate on, less than one window: lower --eval-seqlen")
    windows = np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
    return windows[:limit]


def _open(source: str, split: str) -> tuple[Sequence[str], bool]:
    package = sys.modules[__name__]
    path = Path(source).expanduser()
    if source not in plugins.names(package) or source == "textfile":
        if not path.exists():
            named = [name for name in plugins.names(package) if name != "textfile"]
            raise InputError(f"no text {source!r}: give a file, a folder, or one of {', '.join(named)}")
        return plugins.load(package, "textfile").documents(path, split), False
    module = plugins.load(package, source)
    return module.documents(split), getattr(module, "PACK", False)


def _tokenize(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    # verbose=False: windows are cut later, so a text longer than the model's context is no reason to warn.
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _one_a_document(
    source: str,
    texts: Sequence[str],
    order: np.ndarray,
    tokenizer: Any,
    count: int,
    length: int,
    generator: np.random.Generator,
) -> np.ndarray:
    windows: list[list[int]] = []
    for index in order:
        ids = _tokenize(tokenizer, texts[int(index)])
        if len(ids) <= length:
            continue
        start = int(generator.integers(0, len(ids) - length))
        windows.append(ids[start : start + length])
        if len(windows) == count:
            return np.array(windows, np.int32)
    fewer = f"--nsamples {len(windows)}, " if windows else ""
    raise InputError(
        f"{source} has {len(windows)} documents longer than {length} tokens, but {count} windows are wanted: pass "
        f"{fewer}a smaller --seqlen, or --pack to join documents"
    )


def _packed(
    source: str,
    texts: Sequence[str],
    order: np.ndarray,
    tokenizer: Any,
    count: int,
    length: int,
    generator: np.random.Generator,
) -> np.ndarray:
    join = _tokenize(tokenizer, JOIN, special=False)
    ids: list[int] = []
    for index in order:
        if len(ids) >= count * length:
            break
        ids += _tokenize(tokenizer, texts[int(index)]) + join
    available = len(ids) // length
    if available < count:
        advice = f"--nsamples {available} or a smaller --seqlen" if available else "a smaller --seqlen, or more text"
        raise InputError(
            f"{source} gives {available} windows of {length} tokens, but {count} are wanted: pass {advice}"
        )
    windows = np.array(ids[: available * length], np.int32).reshape(available, length)
    return windows[np.sort(generator.permutation(available)[:count])]


def _load_windows(source: str, length: int) -> np.ndarray:
    try:
        windows = np.load(Path(source).expanduser(), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read token ids from {source}: {error}") from error
    if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer):
        raise InputError(f"{source} must hold integers [windows, length], not {windows.dtype}{list(windows.shape)}")
    if windows.shape[1] < length:
        raise InputError(f"{source} holds windows of {windows.shape[1]} tokens, shorter than {length}: lower --seqlen")
    return windows[:, :length].astype(np.int32)
