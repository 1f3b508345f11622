"""Generates text from a model, for pruning it where other text is scarce."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from convert.destination import Destination, destination, staged
from convert.files import read_bytes
from convert.writing import write_text
from jaxprune.calibration import open_source, sources_of
from jaxprune.calibration.source_weights import interleaved
from jaxprune.calibration.tokenized_texts import Texts
from jaxprune.errors import Change, InputError
from jaxprune.evaluation.samples import CUT
from jaxprune.run_store import identity, opening, publishing
from jaxprune.run_store.store import TEXTS, RunStore
from jaxprune.streaming.generation import in_batches
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnText:
    """The text that a model generates."""

    tokens: int = 1_100_000
    """Minimum number of tokens of all texts, such as 250k or 1M; the default suffices for the
    preset thorough, including held-out text."""
    length: int = 256
    """Tokens of a text, including its prompt."""
    prompts: str | None = None
    """A text whose documents give the prompts, named like calibration text (default: no
    prompts)."""
    prompt_tokens: int = 16
    """Tokens of a prompt."""
    seed: int = 0
    """Seed of the sampled tokens and of the order of the documents."""

    def check(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: no text can have them.
        """
        beginning = 1 if self.prompts is None else self.prompt_tokens
        if not 0 < beginning < self.length:
            given = {} if self.prompts is None else {"prompt_tokens": Change.LOWER}
            raise InputError(
                f"texts of {self.length} tokens cannot begin with {beginning}",
                options={"length": Change.RAISE} | given,
            )
        if self.tokens < 1:
            raise InputError(f"tokens must be at least 1, not {self.tokens}")


def generate(
    model: StreamedModel,
    text: OwnText,
    out: str | Path | Destination | None = None,
    observer: Observer = SILENT,
) -> list[str]:
    """Returns texts sampled from a model's own distribution, of equal length in tokens.

    Over such text, the divergence that the tuning of `jaxprune.prune` minimizes is the divergence
    between the two models' distributions of whole texts. See Liu et al., "LLM-QAT" (arXiv
    2305.17888).

    Args:
        model: the model that generates. After an end-of-text token it starts another text.
        text: the size and the prompts of the texts.
        out: a .jsonl file to create. Progress is saved in `OUT.unfinished`, and the same call
            resumes from there; None: no file.
        observer: is notified of each generated token.

    Raises:
        InputError: the source of prompts does not exist, or the model does not support this length.
        CheckpointError: the file cannot be created.
    """
    place = file_of(out) if out is not None else None
    text.check()
    begun = [[model.first_token]] * -(-text.tokens // text.length)
    if text.prompts is not None:
        weights = sources_of(text.prompts)
        beginnings = {
            name: _beginnings(_documents(name, model), begun[0], text.prompt_tokens, text.seed)
            for name in weights
        }
        begun = [next(beginnings[name]) for name in islice(interleaved(weights), len(begun))]
    if not place:
        return _decoded(model, _written(model, begun, {}, text, observer))
    reader = identity.checked(model.reader)
    asked = {
        "tokens": text.tokens,
        "length": text.length,
        "begun": hashlib.sha256(json.dumps(begun).encode()).hexdigest(),
    }
    wanted = identity.of_run(reader, model.hf_config, model.dtype, {TEXTS: asked}, text.seed)
    with opening.open_store(place.path, wanted) as store:
        known = identity.SavedDigests(reader, store)
        if len(saved := _saved(store)) < len(begun):
            place.check()
        made = _decoded(model, _written(model, begun, saved, text, observer, store))
        content = "".join(json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in made)
        if not _holds(place.path, content.encode()):  # else only the store is left to remove
            known.require_unchanged()
            with staged(place) as file:
                write_text(file, content)
        publishing.remove(store)
    return made


def _holds(path: Path, content: bytes) -> bool:
    """Returns whether a file with this content exists."""
    if not os.path.lexists(path) or path.lstat().st_size != len(content):
        return False
    return read_bytes(path, len(content)) == content


def _documents(source: str, model: StreamedModel) -> Texts:
    if source.endswith(".npy"):
        raise InputError("it has token ids, but prompts need documents of text", file=source)
    return open_source(source, "train", model.tokenizer)


def _beginnings(texts: Texts, empty: list[int], tokens: int, seed: int) -> Iterator[list[int]]:
    """Yields the first tokens of documents endlessly, each document once per cycle."""
    order = np.random.default_rng(seed).permutation(len(texts))
    return cycle(texts.ids(int(document))[:tokens].tolist() or empty for document in order)


def file_of(out: str | Path | Destination) -> Destination:
    """Returns where the texts are written.

    Raises:
        InputError: the file's suffix is not .jsonl, from which calibration infers the format.
        CheckpointError: the file cannot be created.
    """
    place = destination(out, "out", folder=False)
    if place.path.suffix != ".jsonl":
        raise InputError(
            "the name of a file of texts must end in .jsonl",
            file=place.path,
            wanted="FILE.jsonl",
        )
    if not (os.path.lexists(place.path) and os.path.lexists(opening.store_folder(place.path))):
        place.check()  # else a stopped run may have created the file
    return place


def _saved(store: RunStore) -> dict[int, list[int]]:
    """Returns the number of each saved text -> its tokens."""
    found = [saved for name in store.names(TEXTS) if (saved := store.get(f"{TEXTS}/{name}"))]
    return {
        int(number): row.tolist()
        for saved in found
        for number, row in zip(saved.arrays["numbers"], saved.arrays["ids"], strict=True)
    }


def _written(
    model: StreamedModel,
    begun: Sequence[Sequence[int]],
    texts: Mapping[int, list[int]],
    wanted: OwnText,
    observer: Observer,
    store: RunStore | None = None,
) -> list[list[int]]:
    """Returns the tokens of texts with these prompts; does not generate saved texts again."""
    texts = dict(texts)
    most = [wanted.length - len(one) for one in begun]
    for batch in in_batches(
        model, begun, most, lambda *_: False, observer, seed=wanted.seed, made=set(texts)
    ):
        texts |= (made := {number: [*begun[number], *new] for number, new in batch.items()})
        if store:
            numbers, ids = (
                np.array([*values], np.int32) for values in (made.keys(), made.values())
            )
            store.put(f"{TEXTS}/{numbers.min()}", {"numbers": numbers, "ids": ids}, {})
    if store:
        store.wait()
    return [texts[number] for number in range(len(begun))]


def _decoded(model: StreamedModel, texts: Sequence[Sequence[int]]) -> list[str]:
    first = model.first_token  # tokenizers add this token when they encode
    return [model.tokenizer.decode(ids[int(ids[0] == first) :]).rstrip(CUT) for ids in texts]
