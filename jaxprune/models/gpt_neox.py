"""GPT-NeoX and Pythia: LayerNorm, attention and feed-forward network side by side, one linear layer
for queries, keys and values (Hugging Face's GPTNeoXForCausalLM).

References:
    Black et al., "GPT-NeoX-20B" (arXiv 2204.06745); Biderman et al., "Pythia" (arXiv 2304.01373).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxprune.models.common import configuration, decoder
from jaxprune.models.common.activations import ACTIVATIONS
from jaxprune.models.common.configuration import Kind
from jaxprune.models.common.decoder import LayerNorm, Taps, fused, in_turn, linear
from jaxprune.models.common.matmul import times_embedding
from jaxprune.models.common.packed_windows import Layout

__all__ = ["Config", "DecoderLayer", "Embed", "Head", "inputs"]


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    use_parallel_residual: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Config):
    """See `configuration.Config`.

    Attributes:
        parallel: whether the feed-forward network reads the layer's input, and not what the
            attention made of it.
    """

    parallel: bool

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> configuration.Config:
        """Reads a transformers configuration; errors as for `configuration.Config.from_hf`."""
        read = configuration.entries(Entries, hf)
        rope = configuration.rope_of(read, partial=True)
        return cls.of(read, dtype, rope=lambda _: rope, parallel=read.use_parallel_residual)


def inputs(config: Config, kind: Kind) -> Mapping[str, tuple[str, ...]]:
    """Returns the linear layers to prune: tap -> those that read it."""
    return {
        "attention_input": ("attention.query_key_value",),
        "attention_output": ("attention.dense",),
        "mlp_input": ("mlp.dense_h_to_4h",),
        "mlp_hidden": ("mlp.dense_4h_to_h",),
    }


class Attention(nnx.Module):
    """Causal attention; returns its output and the input of `dense`. A head's query, key and value
    lie together."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        width, bias = config.hidden_size, config.qkv_bias
        sections = dict.fromkeys(("query", "key", "value"), width // config.num_heads)
        self.query_key_value = fused(
            config, width, sections, rngs, repeats=config.num_heads, bias=bias
        )
        self.dense = linear(config, width, width, rngs, bias=bias)
        self.config, self.kind = config, kind

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        heads = self.query_key_value(x).reshape(*x.shape[:2], self.config.num_heads, -1)
        query, key, value = jnp.split(heads, 3, axis=-1)
        y = decoder.attend(self.config, self.kind, query, key, value, layout)
        return self.dense(y), y


class MLP(nnx.Module):
    """Feed-forward network; returns its output and its tap."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.dense_h_to_4h = linear(
            config, config.hidden_size, config.intermediate_size, rngs, bias=True
        )
        self.dense_4h_to_h = linear(
            config, config.intermediate_size, config.hidden_size, rngs, bias=True
        )
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Taps]:
        y = ACTIVATIONS[self.activation](self.dense_h_to_4h(x))
        return self.dense_4h_to_h(y), {"mlp_hidden": y}


class DecoderLayer(nnx.Module):
    """A layer whose attention and feed-forward network have norms of their own, and mostly the same
    input."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.input_layernorm = LayerNorm(config, rngs)
        self.attention = Attention(config, kind, rngs)
        self.post_attention_layernorm = LayerNorm(config, rngs)
        self.mlp = MLP(config, rngs)
        self.parallel = config.parallel

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Taps]:
        before = self.input_layernorm, self.post_attention_layernorm
        return in_turn(x, layout, self.attention, self.mlp, before=before, parallel=self.parallel)


class Embed(nnx.Module):
    """Token ids [b, t] -> hidden states [b, t, hidden]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed_in = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=config.dtype, rngs=rngs
        )

    def __call__(
        self, tokens: Int[Array, "b t"], layout: Layout | None = None
    ) -> Float[Array, "b t d"]:
        return self.embed_in(tokens)


class Head(nnx.Module):
    """Hidden states [b, t, hidden] -> logits [b, t, vocabulary]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.final_layer_norm = LayerNorm(config, rngs)
        if config.tied:
            self.embed_in = Embed(config, rngs).embed_in
        else:
            self.embed_out = linear(config, config.hidden_size, config.vocab_size, rngs)
        self.tied = config.tied

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        x = self.final_layer_norm(x)
        return times_embedding(x, self.embed_in.embedding[...]) if self.tied else self.embed_out(x)
