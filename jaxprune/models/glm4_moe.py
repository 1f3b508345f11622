"""GLM 4.5 to 4.7: many experts, scored one by one, and one that all tokens take (Hugging Face's
Glm4MoeForCausalLM).

References:
    GLM-4.5 Team, "GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models" (arXiv
    2508.06471); the router: DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), section
    2.1.2.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from convert import schema
from convert.assets import Count, Positive, Size
from jaxprune.errors import InputError
from jaxprune.models.common import configuration, decoder
from jaxprune.models.common.configuration import Config, Kind, Rotation, Routing, entries
from jaxprune.models.common.decoder import (
    Captures,
    DecoderLayer,
    GatedMLP,
    LinearInputs,
    gated_inputs,
)
from jaxprune.models.common.experts import GatedExperts, mixture, routing_of
from jaxprune.models.common.family import Family


class Entries(configuration.Entries):
    """The entries of config.json that the family reads."""

    n_routed_experts: Count
    n_shared_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Size
    routed_scaling_factor: Positive
    norm_topk_prob: bool
    first_k_dense_replace: schema.Count
    n_group: Count
    topk_group: Count
    use_qk_norm: bool


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    read = entries(Entries, hf)
    for name, value in (("n_group", read.n_group), ("topk_group", read.topk_group)):
        if value != 1:
            raise InputError(f"{name} {value} is not implemented; experts in one group are")
    routing = Routing(
        read.n_routed_experts,
        read.num_experts_per_tok,
        read.moe_intermediate_size,
        read.norm_topk_prob,
        shared=read.n_shared_experts * read.moe_intermediate_size,
        sigmoid=True,
        scale=read.routed_scaling_factor,
    )
    return Config.of(
        read,
        dtype,
        rope=Rotation(partial=True),
        qk_norm="head" if read.use_qk_norm else None,
        output_bias=False,
        routing=routing,
        dense=range(read.first_k_dense_replace),
    )


def inputs(config: Config, kind: Kind) -> LinearInputs:
    """Returns the inputs of `Attention`, and of `GatedMLP` or `MLP`."""
    usual = decoder.inputs(config, kind)
    return {**usual, **gated_inputs("mlp.shared_experts")} if kind.experts else usual


class Router(nnx.Linear):
    """Scores of experts, in float32, and what is added to them where experts are chosen."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        experts = routing_of(config).experts
        exact = {"dtype": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
        super().__init__(config.hidden_size, experts, use_bias=False, rngs=rngs, **exact)
        self.e_score_correction_bias = nnx.Param(jnp.zeros((experts,), jnp.float32))


class MLP(nnx.Module):
    """Experts of which each token takes a few, beside one that all take; returns its output and its
    captures."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate, self.experts = Router(config, rngs), GatedExperts(config)
        self.shared_experts = GatedMLP(config, rngs, routing_of(config).shared)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Captures]:
        correction = self.gate.e_score_correction_bias[...]
        y, captures = mixture(self.config, self.gate, self.experts, x, correction)
        shared, own = self.shared_experts(x)
        return y + shared, captures | own


FAMILY = Family(config, inputs=inputs, layer=partial(DecoderLayer, experts=MLP))
