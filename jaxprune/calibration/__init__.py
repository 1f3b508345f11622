"""Text for calibration and evaluation, one source a file.

A source file exposes `documents(split)`: the texts of its "train" split, which calibrates, or of
its "test" split, which evaluates; the two never share a document. Where the documents are usually
too short for a window, `PACK = True` joins them always.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from convert import plugins
from convert.files import expand
from convert.paths import paths_of
from jaxprune.calibration.source_weights import shares, weights_of
from jaxprune.calibration.token_id_files import load_windows
from jaxprune.calibration.token_id_files import require_ids as require_ids
from jaxprune.calibration.tokenized_texts import Texts
from jaxprune.errors import Change, InputError

HELPERS = (
    "documents",
    "hub_datasets",
    "row_files",
    "source_weights",
    "text_files",
    "text_stream",
    "token_id_files",
    "tokenization",
    "tokenized_texts",
)
"""Modules that hold no source."""


def default_text(ckpt: str) -> str | None:
    """Returns the text for a checkpoint that needs no hub: one that needs none either; None for
    other checkpoints."""
    return "wikipedia" if ckpt == "smollm2-135m" else None


def require_vocabulary(sources: Iterable[str], length: int, vocab_size: int) -> None:
    """Raises InputError for token ids of .npy files that are not below `vocab_size`.

    Args:
        sources: names and paths of sources.
        length: tokens of a window.
        vocab_size: tokens of the model's vocabulary.
    """
    for source in sources:
        if source.endswith(".npy"):
            load_windows(source, length, vocab_size)


def calibration_windows(
    source: str,
    tokenizer: Any,
    count: int = 128,
    length: int = 2048,
    seed: int = 0,
    *,
    pack: bool = False,
) -> Int[np.ndarray, "count length"]:
    """Samples calibration windows.

    Documents are taken in an order drawn from the seed. One that is longer than a window gives one
    window, at a place drawn from the seed; shorter ones are skipped, as Wanda and SparseGPT do on
    C4. Where `pack` is set (or the source always packs, as conversations do), documents are joined
    instead, and cut into windows.

    Args:
        source: a source's name, or a path that `text_files` can read; .npy holds windows of token
            ids. Several are separated by commas, and share the windows evenly or as they say:
            `c4:3,chats.jsonl:1`.
        tokenizer: a transformers tokenizer; not used for .npy.
        count: windows.
        length: tokens a window.
        seed: the seed of the order of documents and the places of windows.
        pack: join documents.

    Returns:
        int32[count, length].

    Raises:
        InputError: no such source, or too little text; the message says how many windows there are.
    """
    if count < 1 or length < 2:
        raise InputError(
            f"at least 1 window of at least 2 tokens is needed, not {count} of {length}"
        )
    weights = sources_of(source)
    counts = shares(weights, count)
    if none := [one for one, share in counts.items() if not share]:
        raise InputError(
            f"of {count} windows none is of {none[0]}", options={"nsamples": Change.RAISE}
        )
    found = {
        one: _windows_of(one, tokenizer, share, length, seed, pack=pack)
        for one, share in counts.items()
    }
    places = np.concatenate([(np.arange(share) + 0.5) / share for share in counts.values()])
    # sources take turns
    return np.concatenate([*found.values()])[np.argsort(places, kind="stable")]


def _windows_of(
    source: str,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    *,
    pack: bool,
) -> Int[np.ndarray, "count length"]:
    """Samples windows of one source; see `calibration_windows`."""
    generator = np.random.default_rng(seed)
    if source.endswith(".npy"):
        windows = load_windows(source, length)
        if len(windows) < count:
            raise InputError(
                f"{source} holds {len(windows)} windows, not {count}",
                options={"nsamples": len(windows)},
            )
        return windows[np.sort(generator.permutation(len(windows))[:count])].astype(np.int32)
    texts = open_source(source, "train", tokenizer)
    sample = _packed if pack or texts.pack else _one_a_document
    return sample(texts, count, length, generator)


def evaluation_windows(
    source: str,
    tokenizer: Any,
    length: int,
    limit: int | None = None,
) -> Int[np.ndarray, "windows length"]:
    """Returns consecutive windows of a source's test split: documents joined by a blank line,
    tokenized as one text.

    Args:
        source: see `calibration_windows`; a file is its own test split.
        tokenizer: a transformers tokenizer; not used for .npy.
        length: tokens a window; the remainder of the text is dropped.
        limit: the most windows.

    Raises:
        InputError: no such source, or not one window of text.
    """
    if source.endswith(".npy"):
        return load_windows(source, length)[:limit].astype(np.int32)
    found, total = [], 0
    for ids in open_source(source, "test", tokenizer).whole():
        found.append(ids)
        total += len(ids)
        if limit is not None and total >= limit * length:
            break
    if total < length:
        raise InputError(
            f"{source} has {total} tokens to evaluate on, less than one window",
            options={"eval_seqlen": Change.LOWER},
        )
    windows = np.concatenate(found)[: total // length * length].reshape(-1, length)
    return windows[:limit]


def open_source(source: str, split: str, tokenizer: Any) -> Texts:
    """Returns the documents of a source's split.

    Raises:
        InputError: no such source, or it cannot be read.
    """
    if path := path_of_source(source):
        from jaxprune.calibration import text_files

        return Texts(source, text_files.documents(path, split), tokenizer)
    module = plugins.load(sys.modules[__name__], source)
    return Texts(source, module.documents(split), tokenizer, pack=getattr(module, "PACK", False))


def path_of_source(source: str) -> Path | None:
    """Returns the path of a source that is a file or a folder; None of one that has a name.

    Raises:
        InputError: no such source.
    """
    names = plugins.names(sys.modules[__name__])
    if source in names:
        return None
    path = expand(source)
    if not os.path.exists(path):
        raise InputError(
            f"no text {source!r}", wanted=f"a file, a folder, or one of {', '.join(names)}"
        )
    return path


def sources_of(text: str) -> dict[str, float]:
    """Returns the sources that a text such as `c4:3,chats.jsonl:1` names, each with its weight.

    Raises:
        InputError: a weight is not positive, or a source is named twice.
    """
    return weights_of(
        text, lambda name: name in plugins.names(sys.modules[__name__]) or bool(paths_of(name))
    )


def _one_a_document(
    texts: Texts, count: int, length: int, generator: np.random.Generator
) -> np.ndarray:
    """Returns a window each of documents that are longer than one."""
    if count > len(texts):
        raise InputError(
            f"{texts.source} has {len(texts)} documents, but {count} windows are wanted, each from "
            "a document of its own",
            options={"nsamples": Change.LOWER, "pack": True},
        )
    windows: list[np.ndarray] = []
    for index in generator.permutation(len(texts)):
        ids = texts.ids(int(index))
        if len(ids) <= length:
            continue
        start = int(generator.integers(0, len(ids) - length))
        windows.append(ids[start : start + length].copy())
        if len(windows) == count:
            return np.stack(windows)
    raise InputError(
        f"{texts.source} has {len(windows)} documents longer than {length} tokens, but {count} "
        "windows are wanted",
        options=_fewer(len(windows)) | {"seqlen": Change.LOWER, "pack": True},
    )


def _fewer(windows: int) -> dict[str, Any]:
    """Returns the option that asks for as many windows as there are; none where there are none."""
    return {"nsamples": windows} if windows else {}


def _packed(texts: Texts, count: int, length: int, generator: np.random.Generator) -> np.ndarray:
    """Returns windows of documents that are joined."""
    found: list[np.ndarray] = []
    total = 0
    for index in generator.permutation(len(texts)):
        if total >= count * length:
            break
        found.append(texts.joined(int(index)))
        total += len(found[-1])
    available = total // length
    if available < count:
        raise InputError(
            f"{texts.source} gives {available} windows of {length} tokens, but {count} are wanted",
            options=_fewer(available) | {"seqlen": Change.LOWER},
        )
    windows = np.concatenate(found)[: available * length].reshape(available, length)
    return windows[np.sort(generator.permutation(available)[:count])]
