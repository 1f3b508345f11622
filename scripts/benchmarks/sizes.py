"""Models by size alone, for scripts that need shapes or random weights but no checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from jaxprune.models import Architecture, build
from jaxprune.models.common.configuration import Config, Kind
from jaxprune.models.common.rope import Rope


class Size(NamedTuple):
    """Of a LLaMA: features, inner features, layers, heads, key-value heads, vocabulary, longest
    window."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    positions: int = 4096


SIZES: Mapping[str, Size] = {
    "smollm2-135m": Size(576, 1536, 30, 9, 3, 49152, 8192),
    "llama-7b": Size(4096, 11008, 32, 32, 32),
    "llama2-70b": Size(8192, 28672, 80, 64, 8),
}


def model(size: Size, dtype: DTypeLike) -> Architecture:
    """The architecture of a size, computing in this dtype."""
    rope = Rope.from_hf({"rope_theta": 10000.0}, size.width // size.heads, size.positions)
    config = Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        kinds=(Kind(rope),) * size.layers,
        num_heads=size.heads,
        num_kv_heads=size.kv_heads,
        head_dim=size.width // size.heads,
        max_positions=size.positions,
        norm_eps=1e-5,
        activation="silu",
        tied=False,
        dtype=jnp.dtype(dtype),
    )
    return build("llama", config)


def write_checkpoint(folder: Path, size: Size, stored: str = "float32") -> int:
    """Writes a random LLaMA; returns the bytes of its params."""
    from convert import create_checkpoint, parts

    assets = folder.with_name(folder.name + "-assets")
    assets.mkdir()
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size.vocabulary,
        "hidden_size": size.width, "intermediate_size": size.inner,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads, "max_position_embeddings": size.positions,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": stored,
    }  # fmt: skip
    (assets / "config.json").write_text(json.dumps(hf))
    dtype = jnp.dtype(stored)
    spec = {
        path: jax.ShapeDtypeStruct(p.shape, dtype)
        for path, p in model(size, "float32").spec.items()
    }
    generator = np.random.default_rng(0)
    with create_checkpoint(folder, spec, assets) as out:
        for paths in parts(spec).values():
            out.write({p: _random(generator, spec[p].shape).astype(dtype) for p in paths})
    return sum(t.size * dtype.itemsize for t in spec.values())


def _random(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A kernel or embedding of standard deviation n^-½, so that activations keep their size; a
    norm's ones."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return generator.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
