"""A checkpoint's tokenizer, as the fields of a GGUF file.

A vocabulary of bytes with merges is llama.cpp's `gpt2`; one with SentencePiece's space and bytes as
tokens is its `llama`, which merges by the scores of tokens instead of an order of pairs. How a text
is cut before it is merged has a name in llama.cpp, not a rule.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import TokenType

from convert.assets import encode, has_tokenizer, load_tokenizer
from convert.errors import CheckpointError

log = logging.getLogger(__name__)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, "only bytes"): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST, "only bytes"): "qwen2",
}
"""How a text is cut, step by step -> llama.cpp's name for that."""
UNKNOWN_CUT = "default"


def fields_of(assets: Path, size: int) -> dict[str, Any]:
    """Returns the fields of a checkpoint's tokenizer, without `tokenizer.`.

    Args:
        assets: the folder that holds it.
        size: tokens that the model knows.

    Raises:
        CheckpointError: there is none, or llama.cpp has none of its kind.
    """
    if not has_tokenizer(assets):
        raise CheckpointError("there is no tokenizer, which a GGUF file holds", file=assets)
    tokenizer = load_tokenizer(assets)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"llama.cpp has no tokenizer of the kind {type(tokenizer).__name__}", file=assets
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise CheckpointError(
            f"llama.cpp has no tokenizer of the kind {model['type']}", file=assets
        )
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = {number: token for token, number in model["vocab"].items()}
    tokens |= {number: token["content"] for number, token in added.items()}
    listed = [tokens.get(number, f"[PAD{number}]") for number in range(size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    types = list(
        map(
            int, _types(listed, tokens, added, tokenizer.unk_token_id, bool(model["byte_fallback"]))
        )
    )
    fields: dict[str, Any] = {"ggml.tokens": listed, "ggml.token_type": types}
    if model["byte_fallback"]:
        fields |= {"ggml.model": "llama", "ggml.scores": _scores(listed, merges)}
        fields["ggml.add_space_prefix"] = tokenizer.tokenize("a")[:1] == ["▁a"]
    else:
        fields |= {
            "ggml.model": "gpt2",
            "ggml.pre": _cut(content["pre_tokenizer"]),
            "ggml.merges": merges,
        }
    for name, number in {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }.items():
        if number is not None and number < size:
            fields[f"ggml.{name}_token_id"] = number
    ids = encode(tokenizer, "a")["input_ids"]
    fields["ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    fields["ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        fields["chat_template"] = template
    return fields


def _types(
    listed: list[str],
    known: dict[int, str],
    added: dict[int, dict[str, Any]],
    unknown: int | None,
    as_bytes: bool,
) -> Iterator[TokenType]:
    for number, token in enumerate(listed):
        if number not in known:
            yield TokenType.UNUSED
        elif number in added:
            yield TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        elif number == unknown:
            yield TokenType.UNKNOWN
        elif as_bytes and len(token) == 6 and token.startswith("<0x"):
            yield TokenType.BYTE
        else:
            yield TokenType.NORMAL


def _scores(listed: list[str], merges: list[str]) -> list[float]:
    """Returns a score for each token, so that merging the best first is merging in the order of the
    pairs."""
    order: dict[str, int] = {}
    for number, pair in enumerate(merges):
        order.setdefault(pair.replace(" ", ""), number)
    return [-float(order.get(token, len(merges))) for token in listed]


def _cut(rule: dict[str, Any] | None) -> str:
    """Returns llama.cpp's name of how a text is cut."""
    steps = rule["pretokenizers"] if rule and rule["type"] == "Sequence" else [rule] if rule else []
    found = []
    for step in steps:
        if step["type"] == "ByteLevel":
            found.append("bytes" if step["use_regex"] else "only bytes")
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated":
            found.append(step["pattern"].get("Regex", ""))
        else:
            found.append(step["type"])
    name = CUTS.get(tuple(found))
    if name is None:
        log.warning(
            "llama.cpp's name for how this tokenizer cuts a text is not known here: numbers and "
            "signs may differ"
        )
    return name or UNKNOWN_CUT
