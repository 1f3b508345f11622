"""OPT: LayerNorm, learned positions, a feed-forward network without a gate (Hugging Face's
OPTForCausalLM).

References:
    Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (arXiv 2205.01068).
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int
from pydantic import Field

from convert.assets import Count, Positions, Size, Vocabulary
from convert.schema import Schema
from jaxprune.errors import InputError
from jaxprune.models.common import configuration
from jaxprune.models.common.activations import ACTIVATIONS, require_activation
from jaxprune.models.common.configuration import Kind, entries
from jaxprune.models.common.decoder import ATTENTION_INPUTS, Captures, LayerNorm, attend, linear
from jaxprune.models.common.family import Family
from jaxprune.models.common.matmul import times_embedding
from jaxprune.models.common.packed_windows import Layout

OFFSET = 2
"""Rows of the table of positions before the first position's."""


class Entries(Schema):
    """The entries of config.json that the family reads."""

    vocab_size: Vocabulary
    hidden_size: Size
    num_hidden_layers: Count
    ffn_dim: Size
    max_position_embeddings: Positions
    do_layer_norm_before: bool
    removed_norm: bool = Field(default=False, alias="_remove_final_layer_norm")
    word_embed_proj_dim: Size
    num_attention_heads: Count
    activation_function: str
    enable_bias: bool
    layer_norm_elementwise_affine: Literal[True]
    tie_word_embeddings: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Config):
    """See `configuration.Config`.

    Attributes:
        embedding_size: features of the embedding and of the head, which others are made of by a
            projection.
        norm_before: whether norms come before the blocks, and not after them.
        final_norm: whether there is one before the head.
    """

    embedding_size: int
    norm_before: bool
    final_norm: bool


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration.

    Raises:
        CheckpointError: an entry is missing, of the wrong type, or out of range.
        InputError: something in it is not implemented.
    """
    read = entries(Entries, hf)
    head_dim, rest = divmod(read.hidden_size, read.num_attention_heads)
    if rest:
        raise InputError(
            f"{read.hidden_size} features cannot be split into {read.num_attention_heads} heads"
        )
    require_activation(read.activation_function)
    return Config(
        vocab_size=read.vocab_size,
        hidden_size=read.hidden_size,
        intermediate_size=read.ffn_dim,
        kinds=(Kind(None),) * read.num_hidden_layers,
        num_heads=read.num_attention_heads,
        num_kv_heads=read.num_attention_heads,
        head_dim=head_dim,
        max_positions=read.max_position_embeddings,
        norm_eps=1e-5,
        activation=read.activation_function,
        tied=read.tie_word_embeddings,
        dtype=dtype,
        qkv_bias=read.enable_bias,
        output_bias=read.enable_bias,
        mlp_bias=read.enable_bias,
        embedding_size=read.word_embed_proj_dim,
        norm_before=read.do_layer_norm_before,
        final_norm=read.do_layer_norm_before and not read.removed_norm,
    )


class Attention(nnx.Module):
    """Causal attention; returns its output and the input of out_proj."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = linear(config, width, width, rngs, bias=bias)
        self.k_proj = linear(config, width, width, rngs, bias=bias)
        self.v_proj = linear(config, width, width, rngs, bias=bias)
        self.out_proj = linear(config, width, width, rngs, bias=bias)
        self.config, self.kind = config, kind

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        projected = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in projected)
        y = attend(self.config, self.kind, query, key, value, layout)
        return self.out_proj(y), y


class DecoderLayer(nnx.Module):
    """A layer with norms before its blocks, or, in the model of 350 million weights, after
    them."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.self_attn = Attention(config, kind, rngs)
        self.self_attn_layer_norm = LayerNorm(config, rngs)
        self.fc1 = linear(
            config, config.hidden_size, config.intermediate_size, rngs, bias=config.mlp_bias
        )
        self.fc2 = linear(
            config, config.intermediate_size, config.hidden_size, rngs, bias=config.mlp_bias
        )
        self.final_layer_norm = LayerNorm(config, rngs)
        self.norm_before, self.activation = config.norm_before, config.activation

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Captures]:
        attention_input = self.self_attn_layer_norm(x) if self.norm_before else x
        y, attention_output = self.self_attn(attention_input, layout)
        x = x + y if self.norm_before else self.self_attn_layer_norm(x + y)
        mlp_input = self.final_layer_norm(x) if self.norm_before else x
        mlp_hidden = ACTIVATIONS[self.activation](self.fc1(mlp_input))
        x = x + self.fc2(mlp_hidden)
        return x if self.norm_before else self.final_layer_norm(x), {
            "attention_input": attention_input,
            "attention_output": attention_output,
            "mlp_input": mlp_input,
            "mlp_hidden": mlp_hidden,
        }


class Embed(nnx.Module):
    """Token ids [b, t] -> hidden states [b, t, hidden]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        positions = config.max_positions or 0
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.embedding_size, dtype=config.dtype, rngs=rngs
        )
        self.embed_positions = nnx.Embed(
            positions + OFFSET, config.hidden_size, dtype=config.dtype, rngs=rngs
        )
        self.projected = config.embedding_size != config.hidden_size
        if self.projected:
            self.project_in = linear(config, config.embedding_size, config.hidden_size, rngs)

    def __call__(
        self, tokens: Int[Array, "b t"], layout: Layout | None = None
    ) -> Float[Array, "b t d"]:
        x = self.embed_tokens(tokens)
        positions = (
            layout.positions if layout else jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        )
        # beyond it are padding's, of which NaN would come
        last = self.embed_positions.num_embeddings - 1
        places = self.embed_positions(jnp.minimum(jnp.asarray(positions) + OFFSET, last))
        return (self.project_in(x) if self.projected else x) + places


class Head(nnx.Module):
    """Hidden states [b, t, hidden] -> logits [b, t, vocabulary]; a tied head is the embedding,
    transposed."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        if config.final_norm:
            self.final_layer_norm = LayerNorm(config, rngs)
        if config.embedding_size != config.hidden_size:
            self.project_out = linear(config, config.hidden_size, config.embedding_size, rngs)
        if config.tied:
            self.embed_tokens = nnx.Embed(
                config.vocab_size, config.embedding_size, dtype=config.dtype, rngs=rngs
            )
        else:
            self.lm_head = linear(config, config.embedding_size, config.vocab_size, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        if self.config.final_norm:
            x = self.final_layer_norm(x)
        if self.config.embedding_size != self.config.hidden_size:
            x = self.project_out(x)
        return (
            times_embedding(x, self.embed_tokens.embedding[...])
            if self.config.tied
            else self.lm_head(x)
        )


FAMILY = Family(
    config,
    inputs={
        **ATTENTION_INPUTS,
        "attention_output": ("self_attn.out_proj",),
        "mlp_input": ("fc1",),
        "mlp_hidden": ("fc2",),
    },
    embed=Embed,
    layer=DecoderLayer,
    head=Head,
)
