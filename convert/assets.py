"""What a checkpoint holds besides weights: configuration, tokenizer, generation settings."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field

from convert import stored
from convert.errors import CheckpointError, DamagedError, is_panic, reason
from convert.files import leads_outside, require_inside, require_regular
from convert.names import INSIDE
from convert.schema import Schema, as_text, check, read_object
from convert.writing import failing, write_json

log = logging.getLogger(__name__)

SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Of the files that belong to a checkpoint besides its weights."""
NOT_COPIED = ("*.index.json", "params.json", "packed.json", "jaxprune.json", "lm-eval-*.json", ".*")
"""Patterns of names among those: lists of the weights, and what tools of ours or others wrote about
one folder."""
SETTINGS = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
}
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
DTYPE_ENTRIES = ("dtype", "torch_dtype")
"""Entries of config.json that name the weights' dtype; transformers 4 wrote the second."""
TEXT_INSIDE = ("gemma3", "qwen3_5")
"""Model types that hold a text model among others, which alone is pruned."""
CONFIG_BYTES, TOKENIZER_BYTES = 2**22, 2**26
"""The most that a configuration, and a file of a tokenizer, may hold; the largest vocabularies have
half of it."""

Size = Annotated[int, Field(ge=1, le=2**20)]
"""Features of a vector; the widest published models have a twentieth of it."""
Count = Annotated[int, Field(ge=1, le=2**12)]
"""Layers or heads; the deepest published models have a twentieth of it."""
Vocabulary = Annotated[int, Field(ge=1, le=2**22)]
Positions = Annotated[int, Field(ge=1, le=2**30)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=-1, lt=2**22)]


class DecoderConfig(Schema):
    """The entries of config.json that every decoder has; a family checks its own
    (`jaxprune.models`)."""

    model_type: str
    vocab_size: Vocabulary
    hidden_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    intermediate_size: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Positions = 2048
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    architectures: list[str] | None = None
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    torch_dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    quantization_config: dict[str, Any] | None = None
    # Both would make transformers see another configuration than the one that is checked here.
    configuration_files: None = None
    per_layer_config: None = None


class GenerationConfig(Schema):
    """The entries of generation_config.json that decide what is generated, and when it ends."""

    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | list[TokenId] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_length: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_new_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class TokenizerConfig(Schema):
    """The entries of tokenizer_config.json that are looked at whenever a text is tokenized."""

    model_max_length: Annotated[float, Field(gt=0)] | None = None


def read_config(assets: Path) -> dict[str, Any]:
    """Returns the content of config.json; entries are of the types and in the ranges of
    `DecoderConfig`.

    How its weights are quantized is left out: they are dequantized when they are read.

    Raises:
        CheckpointError: it is missing, damaged, no decoder's, or a quantized checkpoint's.
    """
    path = assets / "config.json"
    require_inside(path, assets)
    config = read_object(path, CONFIG_BYTES)
    config.pop(INSIDE, None)
    if config.get("model_type") in TEXT_INSIDE:
        config = _text_config(config, path)
    try:
        json.dumps(config, allow_nan=False)
    except ValueError:
        raise DamagedError("it holds a number that is too large", file=path) from None
    if missing := [
        name
        for name, field in DecoderConfig.model_fields.items()
        if field.is_required() and name not in config
    ]:
        found = f"model type {config.get('model_type')!r}"
        raise CheckpointError(
            "an entry that a decoder has is missing", file=path, entry=missing[0], found=found
        )
    checked = check(DecoderConfig, config, file=path)
    if checked.quantization_config is not None:
        stored.require_known(checked.quantization_config, path)
        del config["quantization_config"]
    return config


def quantization(assets: Path) -> stored.Fp8 | stored.MxFp4 | None:
    """Returns how the weights of a checkpoint are quantized; None: they are not. Errors as for
    `read_config`."""
    path = assets / "config.json"
    entry = read_object(path, CONFIG_BYTES).get("quantization_config")
    return stored.require_known(entry, path) if isinstance(entry, dict) else None


def _text_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the configuration of the text model inside another one, and that one's model type
    under `INSIDE`."""
    text = _checked_by_transformers(config, path).text_config.to_dict()
    given = {
        name: config[name] for name in (*DTYPE_ENTRIES, "tie_word_embeddings") if name in config
    }
    found = {name: value for name, value in (text | given).items() if value is not None}
    return found | {INSIDE: config["model_type"]}


def load_config(assets: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Returns the configuration as transformers' class for its model type, made of what
    `read_config` has checked.

    Args:
        assets: the folder of config.json.
        changes: entries that are taken to have other values.

    Raises:
        CheckpointError: as for `read_config`, or transformers refuses it.
    """
    return _checked_by_transformers(read_config(assets) | dict(changes), assets / "config.json")


def _checked_by_transformers(config: dict[str, Any], path: Path) -> Any:
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        raise CheckpointError("an unknown model type", file=path, found=config["model_type"])
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(config)
    except Exception as error:  # transformers validates with errors of many kinds
        raise CheckpointError(f"it cannot be used ({reason(error)})", file=path) from error


def check_files(assets: Path) -> None:
    """Looks at the files besides the weights that libraries open by name, so that none of them
    makes them wait.

    Raises:
        CheckpointError: one is no regular file or too large, or settings of the tokenizer or of
            generation cannot be used.
    """
    for path in _others(assets):
        if path.name == "config.json":
            continue
        size = require_regular(path).st_size
        named = path.name in SETTINGS | VOCABULARIES or path.suffix in (
            ".model",
            ".tiktoken",
            ".jinja",
        )
        if named and size > TOKENIZER_BYTES:
            raise CheckpointError(
                "it is too large", file=path, found=size, wanted=f"at most {TOKENIZER_BYTES} bytes"
            )
        if path.name in SETTINGS:
            settings = read_object(path, TOKENIZER_BYTES)
            if path.name == "tokenizer_config.json":
                check(TokenizerConfig, settings, file=path)
        if path.name == "generation_config.json":
            check(GenerationConfig, read_object(path, CONFIG_BYTES), file=path)


def copy_assets(
    source: Path, target: Path, changes: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Copies configuration and tokenizer files, but no weights, index or model card.

    In config.json the entries of `changes` get their values, and that on quantization is left out.
    Links to files outside the checkpoint are not followed, and files whose names are no text are
    not copied: a warning says so.

    Raises:
        CheckpointError: a file is no regular one, tokenizer.json is damaged, or nothing can be
            written.
    """
    for path in _others(source):
        if any(path.match(pattern) for pattern in NOT_COPIED):
            continue
        if leads_outside(path, source):
            log.warning(
                "%s was not copied: it is a link to %s, outside the checkpoint",
                path,
                path.resolve(),
            )
            continue
        if as_text(path.name) != path.name:
            log.warning("%s was not copied: its name is no UTF-8", as_text(str(path)))
            continue
        require_regular(path)
        if path.name == "tokenizer.json":
            read_object(path, TOKENIZER_BYTES)
        # Files in a hub cache are links to blobs; copyfile copies what they point to, with this
        # user's mode.
        with failing(target / path.name):
            shutil.copyfile(path, target / path.name)
    config = read_object(source / "config.json", CONFIG_BYTES)
    if config.pop("quantization_config", None) is not None or changes:
        write_json(target / "config.json", config | dict(changes))


def has_tokenizer(assets: Path) -> bool:
    """Returns whether a folder has what a tokenizer cannot do without."""
    return any(
        (assets / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )


def load_tokenizer(assets: Path) -> Any:
    """Returns the tokenizer of a checkpoint, by transformers; no code from the checkpoint is run.

    Raises:
        CheckpointError: there is none, it cannot be read, or its vocabulary is larger than the
            model's.
    """
    if not has_tokenizer(assets):
        raise CheckpointError(
            f"{assets} has no tokenizer: add the model's tokenizer files, or give the calibration "
            "text as token ids in a .npy file"
        )
    size = read_config(assets)["vocab_size"]
    check_files(assets)
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    # what it would say of a damaged file is in the error
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            assets, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a b")  # some settings are only looked at here
        vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    except BaseException as error:  # transformers and tokenizers raise anything
        raise _unusable_tokenizer(assets, reason(error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    token, most = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if most >= size and token not in added:
        wanted = f"ids below the model's vocabulary of {size}"
        raise CheckpointError(
            "the tokenizer is another model's", file=assets, entry=token, found=most, wanted=wanted
        )
    if most >= size:  # many fine-tuned models have a padding token that no text holds
        log.warning(
            "%s: the tokenizer adds tokens up to id %d; the model knows %d", assets, most, size
        )
    return tokenizer


def _unusable_tokenizer(assets: Path, problem: str) -> CheckpointError:
    """Returns the error of a tokenizer that transformers cannot make."""
    path, remedy = assets / "tokenizer.json", "take the one that the model's authors publish"
    if not path.exists():
        return CheckpointError(
            f"it is missing, and the other files make no tokenizer: {remedy}", file=path
        )
    try:
        read_object(path, TOKENIZER_BYTES)
    except CheckpointError as error:
        return error
    return CheckpointError(f"it makes no tokenizer ({problem}): {remedy}", file=path)


def encode(tokenizer: Any, text: str, **options: Any) -> Any:
    """Returns what a tokenizer makes of a text: a mapping with `input_ids`. All texts are tokenized
    here.

    Args:
        tokenizer: a transformers tokenizer.
        text: to tokenize. One that is longer than the model's context is no reason to warn: windows
            are cut later.
        options: of the tokenizer.

    Raises:
        CheckpointError: the tokenizer fails, as one whose regular expression needs too many steps
            for the text.
    """
    try:
        return tokenizer(text, verbose=False, **options)
    except BaseException as error:
        if not is_panic(error):
            raise
        begin = repr(text[:40])
        raise CheckpointError(
            f"its tokenizer fails at a text that begins with {begin} ({str(error)[:200]}): take "
            "the tokenizer files that the model's authors publish, or leave that text out",
            file=tokenizer.name_or_path,
        ) from error


def _others(folder: Path) -> Iterator[Path]:
    """Yields the files besides weights, and what stands in their place."""
    yield from (path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES)
