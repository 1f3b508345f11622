"""Qwen 3 Next: the gated delta rule in three layers of four, attention with a gate in the others,
and experts beside one that all tokens take (Hugging Face's Qwen3NextForCausalLM).

References:
    Qwen Team, "Qwen3-Next", 2025, as released; Yang, Kautz and Hatamizadeh, "Gated Delta Networks"
    (arXiv 2412.06464).
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from convert.assets import Size
from jaxprune.models import qwen3_5_text, qwen3_moe
from jaxprune.models.common import shared_experts
from jaxprune.models.common.configuration import entries
from jaxprune.models.common.decoder import fused
from jaxprune.models.common.family import Family
from jaxprune.models.common.shared_experts import SharedMLP


class Entries(qwen3_moe.Entries, qwen3_5_text.Entries):
    """The entries of config.json that the family reads."""

    shared_expert_intermediate_size: Size


def config(hf: Any, dtype: DTypeLike) -> qwen3_5_text.Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    return qwen3_5_text.config_of(
        read,
        dtype,
        routing=read.routing(shared=read.shared_expert_intermediate_size),
        dense=read.dense_layers(),
    )


class DeltaNet(qwen3_5_text.DeltaNet):
    """The gated delta rule; what each key head and its value heads take lies together in two
    projections."""

    def projections(self, rngs: nnx.Rngs) -> None:
        """Makes the linear layers that read the hidden states."""
        config, width = self.config, self.config.hidden_size
        shared = config.value_heads // config.key_heads
        values = shared * config.value_size
        projections = {
            "query": config.key_size,
            "key": config.key_size,
            "value": values,
            "gate": values,
        }
        self.in_proj_qkvz = fused(config, width, projections, rngs, repeats=config.key_heads)
        self.in_proj_ba = fused(
            config, width, {"rate": shared, "decay": shared}, rngs, repeats=config.key_heads
        )

    def project(self, x: Float[Array, "b t d"]) -> tuple[Array, Array, Array, Array]:
        """Returns queries, keys and values side by side, the gate, and what rates and decays are
        made of."""
        config = self.config
        whole = self.in_proj_qkvz(x).reshape(*x.shape[:2], config.key_heads, -1)
        values = config.value_heads // config.key_heads * config.value_size
        sizes = config.key_size, 2 * config.key_size, 2 * config.key_size + values
        parts = [part.reshape(*x.shape[:2], -1) for part in jnp.split(whole, sizes, axis=-1)]
        rate, decay = jnp.split(
            self.in_proj_ba(x).reshape(*x.shape[:2], config.key_heads, -1), 2, axis=-1
        )
        flat = (*x.shape[:2], -1)
        return (
            jnp.concatenate(parts[:3], axis=-1),
            parts[3],
            rate.reshape(flat),
            decay.reshape(flat),
        )


FAMILY = Family(
    config,
    inputs=partial(
        qwen3_5_text.inputs,
        usual=shared_experts.inputs,
        projections=("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
    ),
    layer=partial(qwen3_5_text.layer, recurrence=DeltaNet, experts=SharedMLP),
)
