"""Phi 3 and 4: LLaMA with one linear layer for queries, keys and values, and one for gate and up
projection (Hugging Face's Phi3ForCausalLM).

References:
    Abdin et al., "Phi-3 Technical Report" (arXiv 2404.14219).
"""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxprune.models.common.configuration import Config, Entry, Kind, Rotation, reader
from jaxprune.models.common.decoder import (
    DecoderLayer,
    FusedMLP,
    LinearInputs,
    attend,
    fused,
    linear,
)
from jaxprune.models.common.family import Family
from jaxprune.models.common.packed_windows import Layout

INPUTS: LinearInputs = {
    "attention_input": ("self_attn.qkv_proj",),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_up_proj",),
    "mlp_hidden": ("mlp.down_proj",),
}


class Attention(nnx.Module):
    """Causal grouped-query attention; returns its output and the input of o_proj."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.width, self.kv_width = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        projections = {"query": self.width, "key": self.kv_width, "value": self.kv_width}
        self.qkv_proj = fused(config, config.hidden_size, projections, rngs)
        self.o_proj = linear(config, self.width, config.hidden_size, rngs)
        self.config, self.kind = config, kind

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        parts = jnp.split(self.qkv_proj(x), [self.width, self.width + self.kv_width], axis=-1)
        query, key, value = (part.reshape(*x.shape[:2], -1, self.config.head_dim) for part in parts)
        y = attend(self.config, self.kind, query, key, value, layout)
        return self.o_proj(y), y


FAMILY = Family(
    reader(window=Entry("sliding_window"), rope=Rotation(partial=True)),
    inputs=INPUTS,
    layer=partial(DecoderLayer, attention=Attention, feed_forward=FusedMLP),
)
