"""Text -> token ids, in chunks: memory that depends on the chunks' size, and the ids of the whole.

A tokenizer keeps some 100 bytes a character until it is done. Here it sees chunks of `CHUNK`
characters. Each begins `OVERLAP` characters before the place where the chunk before it ends, and
that place, a seam, is one at which both say the same: a token ends there, and the `AGREE` tokens
before it and after it are equal and lie at the same characters. What a tokenizer finds depends on
the text through the state at a token's end and a few characters ahead (pre-tokenizers match from
the left; a merge, or a path through a unigram lattice, cannot cross a place that no token crosses),
so that from a seam on both chunks and the whole text agree.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from convert.assets import encode
from jaxprune.errors import InputError

CHUNK = 2**18
"""Characters of a chunk; shorter texts are tokenized whole."""
LONGEST = 2**24
"""Characters of the longest chunk, where no seam is found before; it takes some 2 GB."""
OVERLAP = 1024
"""Characters that two chunks have in common before a seam, and at least so many after it."""
AGREE = 8
"""Tokens on either side of a seam that both chunks must have."""
TRIES = 8
"""Places that are tried as a seam before the chunk is enlarged."""
_PLACES = re.compile(r"(?<=[^\s])[ \n](?=[^\s])|(?<=\n)(?=[^\s])")
"""Where tokens usually end: before a single space or line break, and after line breaks."""


class _Tokens(NamedTuple):
    """The tokens of a chunk: ids, and the characters of the text at which each begins and ends."""

    ids: Int[np.ndarray, "n"]
    starts: Int[np.ndarray, "n"]
    ends: Int[np.ndarray, "n"]


def token_ids(tokenizer: Any, text: str, *, special: bool = True) -> Int[np.ndarray, "n"]:
    """Returns a text's token ids, int32.

    Takes memory for the ids and for one chunk's tokens, some 100 bytes a character. Where there is
    no seam the chunk grows, up to `LONGEST` characters; a tokenizer that does not say where tokens
    lie gets texts of so many at once.

    Args:
        tokenizer: a transformers tokenizer.
        text: to tokenize.
        special: add the tokens that the tokenizer puts around a text.

    Raises:
        InputError: the text is longer than that and cannot be cut.
    """
    return np.concatenate(list(ids_in_chunks(tokenizer, [text], special=special)))


def ids_in_chunks(
    tokenizer: Any, fragments: Iterable[str], *, special: bool = True
) -> Iterator[Int[np.ndarray, "_"]]:
    """Yields the token ids of the text that the fragments make together, from its beginning;
    arguments as for `token_ids`."""
    source = (text[at : at + CHUNK] for text in fragments for at in range(0, len(text), CHUNK))
    size = CHUNK
    text = _filled("", source, size)
    # it does not say where its tokens lie
    if len(text) > size and not getattr(tokenizer, "is_fast", False):
        text = _filled(text, source, LONGEST)
        if len(text) > LONGEST:
            raise _too_long("and its tokenizer cannot take it in chunks")
        size = len(text)
    if len(text) <= size:
        yield _whole(tokenizer, text, special)
        return
    begin, tokens = 0, _encode(tokenizer, text[:size], special)
    while len(text := _filled(text, source, size + CHUNK)) > size:
        seam = None
        for start in _starts(text, size):
            following = _encode(tokenizer, text[start : start + CHUNK], special)
            if seam := _seam(tokens, following, start):
                break
        if seam:
            yield tokens.ids[begin : seam[0]]
            begin, size, tokens, text = seam[1], CHUNK, following, text[start:]
        elif size < LONGEST:
            size *= 2
            text = _filled(text, source, size)
            tokens = _encode(tokenizer, text[:size], special)
        else:
            raise _too_long("and there is no white space at which it can be cut")
    yield tokens.ids[begin:]


def _filled(text: str, source: Iterator[str], size: int) -> str:
    """Returns the text with enough of the source after it to be longer than `size`, or all of
    it."""
    parts, length = [text], len(text)
    while length <= size and (part := next(source, None)) is not None:
        parts.append(part)
        length += len(part)
    return "".join(parts)


def _starts(text: str, size: int) -> Iterator[int]:
    """Yields beginnings of a following chunk, `OVERLAP` characters before a seam in the last
    quarter of a chunk."""
    found = [
        match.start()
        for match in _PLACES.finditer(text, max(OVERLAP, size * 3 // 4), size - OVERLAP)
    ]
    yield from (place - OVERLAP for place in found[: -TRIES - 1 : -1])


def _seam(tokens: _Tokens, following: _Tokens, start: int) -> tuple[int, int] | None:
    """Returns the numbers of the first tokens at or after a seam in two chunks that agree around
    it; None: they do not."""
    place = start + OVERLAP
    one, other = (
        int(np.argmax(t.starts >= at)) for t, at in ((tokens, place), (following, OVERLAP))
    )
    if min(one, other) < AGREE or tokens.ends[one - 1] > place:
        return None
    here, there = (slice(number - AGREE, number + AGREE) for number in (one, other))
    pairs = (
        (tokens.ids[here], following.ids[there]),
        (tokens.starts[here], following.starts[there] + start),
        (tokens.ends[here], following.ends[there] + start),
    )
    return (one, other) if all(np.array_equal(*pair) for pair in pairs) else None


def _whole(tokenizer: Any, text: str, special: bool) -> Int[np.ndarray, "n"]:
    return np.array(encode(tokenizer, text, add_special_tokens=special)["input_ids"], np.int32)


def _encode(tokenizer: Any, text: str, special: bool) -> _Tokens:
    made = encode(tokenizer, text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = np.array(made["offset_mapping"], np.int64).reshape(-1, 2)
    return _Tokens(np.array(made["input_ids"], np.int32), offsets[:, 0], offsets[:, 1])


def _too_long(why: str) -> InputError:
    return InputError(f"a text is too long {why}", wanted=f"at most {LONGEST} characters")
