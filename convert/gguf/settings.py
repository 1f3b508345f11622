"""What describes a model, of config.json for a GGUF file; and whether the file says the same."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from convert.errors import CheckpointError
from convert.gguf.models import Entries, Fields, Model
from convert.names import EXPERT_COUNTS


def fields_of(config: Any) -> Entries:
    """Returns the fields that describe a model, under their names without the architecture's.

    Args:
        config: of transformers.

    Raises:
        CheckpointError: its rotary embedding has no place in a GGUF file.
    """
    head, rope = _size_of_head(config), _rope_of(config)
    counts = [getattr(config, name, None) for name in EXPERT_COUNTS]
    own: Entries = {
        "num_key_value_heads": getattr(config, "num_key_value_heads", None)
        or config.num_attention_heads,
        "head_dim": head,
        "value_size": head,
        "rms_norm_eps": float(config.rms_norm_eps),
        "rope_theta": float(rope["rope_theta"]),
        "rope_size": int(head * rope.get("partial_rotary_factor", 1.0)),
        "experts": next(filter(None, counts), None),
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        own |= {"rope_kind": kind, "rope_factor": float(rope["factor"])}
        if kind == "yarn":
            own["original_context"] = rope["original_max_position_embeddings"]
    elif kind not in ("default", "llama3"):
        raise CheckpointError(f"a GGUF file has no place for a rotary embedding of the kind {kind}")
    values = {
        str(field.alias): own[name] if name in own else getattr(config, name, None)
        for name, field in Fields.model_fields.items()
    }
    given = {name: value for name, value in values.items() if value is not None}
    return {"vocab_size": config.vocab_size} | given


def _size_of_head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_of(config: Any) -> Entries:
    """Returns the rotary embedding of the layers that see all tokens."""
    rope = dict(config.rope_parameters)
    return dict(rope.get("full_attention", rope))


def rope_factors(config: Any) -> np.ndarray | None:
    """Returns what frequencies are divided by, of Llama 3's rotary embedding; None: nothing."""
    rope = _rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    return llama3_factors(_size_of_head(config) // 2, rope).astype(np.float32)


def permuted(model: Model, config: Any, path: str, array: np.ndarray) -> np.ndarray:
    """Returns a tensor with the rows of queries and keys as llama.cpp rotates them."""
    if not model.permutes(path):
        return array
    heads = config.num_attention_heads if ".q_proj." in path else config.num_key_value_heads
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


UNSAID = frozenset(
    "architectures dtype torch_dtype transformers_version initializer_range use_cache "
    "cache_implementation attention_dropout embd_pdrop resid_pdrop hidden_dropout pretraining_tp "
    "_name_or_path bos_token_id eos_token_id pad_token_id router_aux_loss_coef "
    "router_jitter_noise output_router_logits is_llama_config max_window_layers "
    "transformers.js_config id2label label2id chunk_size_feed_forward return_dict "
    "output_hidden_states output_attentions problem_type is_encoder_decoder".split()
)
"""Entries of config.json that say nothing of what a model computes."""


def differences(found: Entries, wanted: Any) -> Iterator[str]:
    """Yields the entries in which the content of a config.json differs from a configuration of
    transformers."""
    ours, theirs = type(wanted).from_dict(found).to_dict(), wanted.to_dict()
    for name in type(wanted)().to_dict().keys() - UNSAID:  # what its class knows
        if (
            name == "hidden_act"
            and "hidden_activation" in theirs
            or name == "head_dim"
            and theirs[name] is None
        ):
            continue  # another entry decides
        if not _equal(ours.get(name), theirs.get(name)):
            yield name


def _equal(a: Any, b: Any) -> bool:
    """Returns whether two values are equal up to float32's rounding; an entry that is None
    need not be there."""
    if isinstance(a, dict) and isinstance(b, dict):
        return all(_equal(a.get(name), b.get(name)) for name in a.keys() | b.keys())
    if isinstance(a, float | int) and isinstance(b, float | int) and not isinstance(a, bool):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def llama3_factors(count: int, rope: dict[str, Any]) -> np.ndarray:
    """Returns what llama.cpp divides the rotary frequencies by, for rope type llama3."""
    inverse = rope["rope_theta"] ** -(np.arange(count) / count)
    rotations = rope["original_max_position_embeddings"] * inverse / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return 1 / (keep + (1 - keep) / rope["factor"])
