"""Text that a model writes itself, to prune it on where there is too little other text."""

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from convert.destination import Destination, destination, staged
from convert.writing import write_text
from jaxprune.calibration import open_source
from jaxprune.errors import Change, InputError
from jaxprune.evaluation.samples import CUT
from jaxprune.pruning import identity, publishing, resume
from jaxprune.pruning.journal import Journal
from jaxprune.streaming.generation import in_batches
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer

TEXTS = "texts"
"""The stage of a journal with whose name those of its entries begin."""


def generate(
    model: StreamedModel,
    tokens: int,
    out: str | Path | Destination | None = None,
    *,
    length: int = 256,
    prompts: str | None = None,
    prompt_tokens: int = 16,
    seed: int = 0,
    observer: Observer = SILENT,
) -> list[str]:
    """Returns texts drawn from a model's own distribution, of one length in tokens.

    Over such text the divergence that `jaxprune.prune` tunes by is the one between the two models' whole texts. See Liu
    et al., "LLM-QAT" (arXiv 2305.17888).

    Args:
        model: writes them. It does not end them: behind a text's end begins another.
        tokens: of all texts, at least.
        out: a .jsonl file to make of them. What is finished is kept in `OUT.unfinished` until then, and the same call
            goes on from there; None: no file is made.
        length: tokens of a text, those of its prompt among them.
        prompts: a source as for `calibration_windows`, with whose documents the texts begin, in an order that the seed
            fixes; None: they begin with the token that texts begin with.
        prompt_tokens: of a document.
        seed: of the tokens, which text by text it fixes.
        observer: is told each token of all texts.

    Raises:
        InputError: no such source, or the model was made for shorter texts.
        CheckpointError: the file cannot be made.
    """
    place = file_of(out) if out is not None else None
    beginning = 1 if prompts is None else prompt_tokens
    if not 0 < beginning < length:
        options = {"length": Change.RAISE} | ({} if prompts is None else {"prompt_tokens": Change.LOWER})
        raise InputError(f"texts of {length} tokens cannot begin with {beginning}", options=options)
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, not {tokens}")
    asked: dict[str, object] = {"tokens": tokens, "length": length}
    begun = [[model.first_token]] * -(-tokens // length)
    if prompts is not None:
        texts = open_source(prompts, "train", model.tokenizer)
        asked |= {"prompts": texts.digest(), "prompt_tokens": prompt_tokens}
        order = np.random.default_rng(seed).permutation(len(texts))[: len(begun)]
        beginnings = [texts.ids(int(document))[:prompt_tokens].tolist() or begun[0] for document in order]
        begun = [*islice(cycle(beginnings), len(begun))]
    if not place:
        return _texts(model, begun, length, seed, observer)
    reader = identity.checked(model.reader)
    wanted = identity.of_run(reader, model.hf_config, model.dtype, {TEXTS: asked}, seed)
    with resume.open_journal(place.path, wanted) as journal:
        weights = identity.KnownWeights(reader, journal)
        made = _texts(model, begun, length, seed, observer, journal)
        weights.require_unchanged()
        with staged(place) as file:
            write_text(file, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in made))
        publishing.remove(journal)
    return made


def file_of(out: str | Path | Destination) -> Destination:
    """Returns where texts are to be.

    Raises:
        InputError: calibration would not know what the file holds.
        CheckpointError: it cannot be made there.
    """
    place = destination(out, "out", folder=False)
    if place.path.suffix != ".jsonl":
        raise InputError("texts are rows of JSON, known by their file's name", file=place.path, wanted="FILE.jsonl")
    place.check()
    return place


def _texts(
    model: StreamedModel,
    begun: Sequence[Sequence[int]],
    length: int,
    seed: int,
    observer: Observer,
    journal: Journal | None = None,
) -> list[str]:
    """Returns texts that begin with these tokens; those that the journal has are not written again."""
    ids = np.zeros((len(begun), length), np.int32)
    made: set[int] = set()
    if journal:
        for entry in (journal.get(f"{TEXTS}/{name}") for name in journal.names(TEXTS)):
            if entry:
                ids[entry.arrays["numbers"]] = entry.arrays["ids"]
                made |= set(entry.arrays["numbers"].tolist())
    most = [length - len(one) for one in begun]
    for batch in in_batches(model, begun, most, lambda *_: False, observer, seed=seed, made=made):
        numbers = np.array([*batch], np.int32)
        ids[numbers] = [[*begun[number], *new] for number, new in batch.items()]
        if journal:
            journal.put(f"{TEXTS}/{numbers.min()}", {"numbers": numbers, "ids": ids[numbers]}, {})
    if journal:
        journal.wait()
    first = model.first_token  # a tokenizer writes it itself
    return [model.tokenizer.decode(row[int(row[0] == first) :].tolist()).rstrip(CUT) for row in ids]
