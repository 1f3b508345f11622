"""Documents as a tokenizer sees them: text as it is, conversations under the tokenizer's chat
template."""

import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Int

from jaxprune.calibration.documents import Conversations
from jaxprune.calibration.tokenization import ids_in_chunks, token_ids
from jaxprune.errors import InputError

JOIN = "\n\n"
"""Between documents that share a window, for calibration as for evaluation; conversations follow
each other at once."""
TODAY = datetime.datetime(2024, 7, 26, 12)
"""For templates that write the date: the same run gives the same windows on another day."""
_DATED = "".join(
    f".replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "aAbBdeHIjmMpSyY"
)
_NOW = f"{{% macro strftime_now(format) %}}{{{{ format{_DATED} }}}}{{% endmacro %}}"
"""Before a template: what writes the date there."""
_REFUSED = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)
"""What a template raises, beside jinja2's own errors, where it computes with what is not as it
expects."""


class Texts:
    """The documents of a source.

    Args:
        source: its name, for errors.
        documents: they; those of `Conversations` are rendered by the tokenizer's chat template.
        tokenizer: a transformers tokenizer.
        pack: whether documents are to be joined always.

    Attributes:
        source: as given.
        pack: as given; conversations always are.

    Raises:
        InputError: the tokenizer has no chat template for conversations.
    """

    def __init__(
        self, source: str, documents: Sequence[str], tokenizer: Any, *, pack: bool = False
    ) -> None:
        self.source, self._documents, self._tokenizer = source, documents, tokenizer
        self._chat = isinstance(documents, Conversations)
        self.pack = pack or self._chat
        self._template = ""
        if self._chat:
            try:
                self._template = _NOW + tokenizer.get_chat_template()
            except ValueError:  # there is none, or there are several and none is the default
                raise InputError(
                    f"{source} holds conversations, and the checkpoint's tokenizer has no chat "
                    "template",
                    wanted="rows with text, or a checkpoint that is tuned for chat",
                ) from None
        self._join = (
            np.zeros(0, np.int32) if self._chat else token_ids(tokenizer, JOIN, special=False)
        )

    def __len__(self) -> int:
        return len(self._documents)

    def ids(self, index: int) -> Int[np.ndarray, "_"]:
        """Returns a document's token ids. A template writes the special tokens itself."""
        return token_ids(self._tokenizer, self.text(index), special=not self._chat)

    def joined(self, index: int) -> Int[np.ndarray, "_"]:
        """Returns a document's token ids, and those of what is between it and the next."""
        return np.concatenate([self.ids(index), self._join])

    def whole(self) -> Iterator[Int[np.ndarray, "_"]]:
        """Yields the token ids of all documents as one text."""
        return ids_in_chunks(self._tokenizer, self._fragments(), special=not self._chat)

    def measure(self) -> tuple[str, int]:
        """Returns the SHA-256 of all of the text, and its characters.

        Raises:
            InputError: the template does not take a conversation.
        """
        whole, size = hashlib.sha256(), 0
        for index, document in enumerate(self._documents):
            if self._chat:
                self.text(index)
            content = document.encode()
            whole.update(len(content).to_bytes(8, "big") + content)
            size += len(document)
        return whole.hexdigest(), size

    def size_of(self, index: int) -> int:
        """Returns the characters of a document."""
        return len(self._documents[index])

    def _fragments(self) -> Iterator[str]:
        for index in range(len(self)):
            if index and not self._chat:
                yield JOIN
            yield self.text(index)

    def text(self, index: int, *, begins_answer: bool = False) -> str:
        """Returns a document, a conversation as the template writes it.

        Args:
            index: of the document.
            begins_answer: whether what begins the model's answer stands after a conversation.

        Raises:
            InputError: the template takes no such conversation.
        """
        document = self._documents[index]
        if not self._chat:
            return document
        messages, template = json.loads(document), self._template
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=begins_answer,
            )
        except (*_REFUSED, jinja2.TemplateError) as error:
            raise InputError(
                f"the checkpoint's chat template takes no such conversation ({error})",
                file=self.source,
                entry=f"conversation {index + 1}",
            ) from error
