"""Prompts continued by models, for people to read: numbers do not tell whether a pruned model is of
use, text does."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.assets import encode
from convert.files import expand
from jaxprune.calibration.documents import Conversations
from jaxprune.calibration.text_files import documents, kind_of
from jaxprune.calibration.tokenized_texts import Texts
from jaxprune.errors import Change, InputError
from jaxprune.streaming.generation import generate
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colours are",
    "Once upon a time, in a village by the sea, there lived",
    "The best way to learn a new language is to",
    "To make a simple tomato soup, first",
    "def is_prime(n: int) -> bool:\n",
    "Question: If a train leaves at 3 pm and takes 2 hours, when does it arrive?\nAnswer:",
    "Photosynthesis is the process by which",
    "Dear Ms Miller,\n\nthank you for your letter of 3 May. I am writing to",
    "The main causes of the First World War were",
    "English: Good morning, how are you?\nFrench:",
)
"""Facts, stories, instructions, code, arithmetic, letters: a dozen ways to find out what is left of
a model."""
MOST = 1000
"""Prompts of a file."""
CUT = "\ufffd"
"""Stands for bytes that are no whole character yet."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and its continuation.

    Attributes:
        prompt: as the model was given it.
        tokens: the continuation, token by token; tokens that make one character together are one
            piece.
    """

    prompt: str
    tokens: tuple[str, ...]


class Prompts:
    """Prompts, of a file or the dozen that are always there.

    Args:
        path: .txt, a prompt a line, or a file of texts or conversations as for calibration; None:
            the dozen.

    Raises:
        InputError, CheckpointError: the file cannot be used.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = path
        self._prompts: Sequence[str] = PROMPTS
        if path is not None:
            path = expand(path)
            if os.path.isdir(path) or path.suffix == ".npy":
                raise InputError(
                    "it is no file of prompts", file=path, wanted=".txt, .jsonl, .json or .parquet"
                )
            found = documents(path, "test", MOST + 1)
            if kind_of(path) == ".txt":
                found = [line for line in found[0].splitlines() if line.strip()]
            if not found:
                raise InputError("it holds no text", file=path)
            if len(found) > MOST:
                raise InputError(f"it holds more than {MOST} prompts", file=path)
            self._prompts = found

    def texts(self, tokenizer: Any) -> list[str]:
        """Returns the prompts as a tokenizer's chat template writes them, where they are
        conversations.

        Raises:
            InputError: it has no chat template, or one that takes no such conversation.
        """
        texts = Texts(str(self._path), self._prompts, tokenizer)
        return [texts.text(index, begins_answer=True) for index in range(len(texts))]

    def ids(self, model: StreamedModel, count: int) -> list[list[int]]:
        """Returns the token ids of the prompts.

        Args:
            model: what continues them.
            count: by how many tokens.

        Raises:
            InputError: one is longer than the model was made for.
        """
        tokenizer, most = model.tokenizer, model.architecture.config.max_positions
        # a template writes the special tokens itself
        chat = isinstance(self._prompts, Conversations)
        found = []
        for number, text in enumerate(self.texts(tokenizer), 1):
            ids = encode(tokenizer, text, add_special_tokens=not chat)["input_ids"]
            if most is not None and len(ids) + count > most:
                raise InputError(
                    f"prompt {number} has {len(ids)} tokens, and the model only {most} positions",
                    file=self._path,
                    options={"sample_tokens": Change.LOWER} if len(ids) < most else {},
                )
            found.append(ids or [model.first_token])
        return found


def samples(
    model: StreamedModel, prompts: Prompts, count: int, observer: Observer = SILENT
) -> list[Sample]:
    """Returns greedy continuations of prompts.

    Args:
        model: continues them.
        prompts: they.
        count: tokens of a continuation, at most.
        observer: is notified of each token.
    """
    tokenizer, ids = model.tokenizer, prompts.ids(model, count)
    end = tokenizer.eos_token_id
    made = generate(
        model, ids, [count] * len(ids), lambda number, tokens: tokens[-1] == end, observer
    )
    return [
        Sample(text, tuple(_chunks(tokenizer, [token for token in tokens if token != end])))
        for text, tokens in zip(prompts.texts(tokenizer), made, strict=True)
    ]


def _chunks(tokenizer: Any, tokens: Sequence[int]) -> Iterator[str]:
    before = ""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        if not text.endswith(CUT) or count == len(tokens):
            yield text[len(before) :]
            before = text
