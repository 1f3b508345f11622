"""GPT-NeoX and Pythia: LayerNorm, attention and feed-forward network side by side, one linear layer
for queries, keys and values (Hugging Face's GPTNeoXForCausalLM).

References:
    Black et al., "GPT-NeoX-20B" (arXiv 2204.06745); Biderman et al., "Pythia" (arXiv 2304.01373).
"""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.models.common.activations import ACTIVATIONS
from jaxprune.models.common.configuration import Config, Entry, Kind, Rotation, reader
from jaxprune.models.common.decoder import (
    Captures,
    DecoderLayer,
    LayerNorm,
    LinearInputs,
    attend,
    fused,
    linear,
)
from jaxprune.models.common.family import Family
from jaxprune.models.common.matmul import times_embedding
from jaxprune.models.common.packed_windows import Layout

INPUTS: LinearInputs = {
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
        projections = dict.fromkeys(("query", "key", "value"), width // config.num_heads)
        self.query_key_value = fused(
            config, width, projections, rngs, repeats=config.num_heads, bias=bias
        )
        self.dense = linear(config, width, width, rngs, bias=bias)
        self.config, self.kind = config, kind

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        heads = self.query_key_value(x).reshape(*x.shape[:2], self.config.num_heads, -1)
        query, key, value = jnp.split(heads, 3, axis=-1)
        y = attend(self.config, self.kind, query, key, value, layout)
        return self.dense(y), y


class MLP(nnx.Module):
    """Feed-forward network; returns its output and its capture."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.dense_h_to_4h = linear(
            config, config.hidden_size, config.intermediate_size, rngs, bias=True
        )
        self.dense_4h_to_h = linear(
            config, config.intermediate_size, config.hidden_size, rngs, bias=True
        )
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Captures]:
        y = ACTIVATIONS[self.activation](self.dense_h_to_4h(x))
        return self.dense_4h_to_h(y), {"mlp_hidden": y}


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


FAMILY = Family(
    reader(rope=Rotation(partial=True), parallel=Entry("use_parallel_residual", bool)),
    inputs=INPUTS,
    embed=Embed,
    layer=partial(
        DecoderLayer,
        attention=Attention,
        feed_forward=MLP,
        norm=LayerNorm,
        names=("attention", "mlp"),
    ),
    head=Head,
)
