"""Qwen 3.5, its text model: the gated delta rule in three layers of four, attention with a gate in
the others (Hugging Face's Qwen3_5ForCausalLM, and inside Qwen3_5ForConditionalGeneration).

References:
    Qwen Team, "Qwen3.5", 2026, as released; Yang, Kautz and Hatamizadeh, "Gated Delta Networks"
    (arXiv 2412.06464).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from convert.assets import Count, Size
from jaxprune.errors import InputError
from jaxprune.models.common import configuration, decoder
from jaxprune.models.common.activations import ACTIVATIONS
from jaxprune.models.common.configuration import FULL, Kind, LayerEntries, Rotation, entries
from jaxprune.models.common.decoder import DecoderLayer, LinearInputs, fused, linear
from jaxprune.models.common.experts import SparseMLP
from jaxprune.models.common.family import Family
from jaxprune.models.common.gated_delta_rule import Inputs, convolve, gated_delta_rule
from jaxprune.models.common.packed_windows import Layout

RECURRENT = "linear_attention"
"""The type of layers with the delta rule."""
PROJECTIONS = tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a"))


class Entries(LayerEntries):
    """The entries of config.json that the family reads."""

    TYPES = (FULL, RECURRENT)
    linear_conv_kernel_dim: Count
    linear_key_head_dim: Size
    linear_value_head_dim: Size
    linear_num_key_heads: Count
    linear_num_value_heads: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Config):
    """See `configuration.Config`.

    Attributes:
        key_heads, key_size: of the delta rule, heads of queries and keys, and their features.
        value_heads, value_size: those of values.
        convolved: tokens that the convolution sees.
    """

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int
    convolved: int


def config(hf: Any, dtype: DTypeLike) -> Config:
    """Reads a transformers configuration; errors as for `Config.of`."""
    return config_of(entries(Entries, hf), dtype)


def config_of(read: Entries, dtype: DTypeLike, **options: Any) -> Config:
    """Makes a configuration of checked entries; options and errors as for `Config.of`."""
    if read.linear_num_value_heads % read.linear_num_key_heads:
        raise InputError(
            f"{read.linear_num_key_heads} key heads cannot serve {read.linear_num_value_heads} "
            "value heads"
        )
    # Of text alone, the three rotations of images are one.
    rope = {
        name: value for name, value in read.rope_parameters.items() if not name.startswith("mrope")
    }
    return Config.of(
        read.model_copy(update={"rope_parameters": rope}),
        dtype,
        rope=Rotation((FULL,), partial=True),
        qk_norm="head",
        norm_offset=1.0,
        key_heads=read.linear_num_key_heads,
        key_size=read.linear_key_head_dim,
        value_heads=read.linear_num_value_heads,
        value_size=read.linear_value_head_dim,
        convolved=read.linear_conv_kernel_dim,
        **options,
    )


def inputs(
    config: Config,
    kind: Kind,
    usual: Callable[[Config, Kind], LinearInputs] = decoder.inputs,
    projections: tuple[str, ...] = PROJECTIONS,
) -> LinearInputs:
    """Returns the inputs of a layer: those of one with attention, and the projections of the delta
    rule in its place."""
    if kind.rope is not None:
        return usual(config, kind)
    return {
        **usual(config, kind),
        "attention_input": projections,
        "attention_output": ("linear_attn.out_proj",),
    }


class Attention(decoder.Attention):
    """Causal grouped-query attention whose output is gated; returns its output and the input of
    o_proj."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        super().__init__(config, kind, rngs)
        projections = {"query": config.head_dim, "gate": config.head_dim}
        self.q_proj = fused(
            config,
            config.hidden_size,
            projections,
            rngs,
            repeats=config.num_heads,
            bias=config.qkv_bias,
        )

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        def heads(y: Float[Array, "b t h"], size: int) -> Float[Array, "b t k d"]:
            return y.reshape(*y.shape[:2], -1, size)

        size = self.config.head_dim
        query, gate = jnp.split(heads(self.q_proj(x), 2 * size), 2, axis=-1)
        query, key = self.q_norm(query), self.k_norm(heads(self.k_proj(x), size))
        y = decoder.attend(self.config, self.kind, query, key, heads(self.v_proj(x), size), layout)
        y = y * jax.nn.sigmoid(gate.reshape(y.shape))
        return self.o_proj(y), y


class Convolution(nnx.Module):
    """A causal convolution of each feature with itself."""

    def __init__(self, features: int, width: int):
        self.scale = nnx.Param(jnp.zeros((features, 1, width), jnp.float32))

    def __call__(self, x: Float[Array, "b t c"], layout: Layout | None) -> Float[Array, "b t c"]:
        return convolve(x, self.scale[...][:, 0], layout)


class GatedNorm(nnx.Module):
    """Root mean square normalization, then a gate."""

    def __init__(self, width: int, epsilon: float):
        self.scale, self.epsilon = nnx.Param(jnp.ones((width,), jnp.float32)), epsilon

    def __call__(
        self, x: Float[Array, "b t m v"], gate: Float[Array, "b t m v"]
    ) -> Float[Array, "b t m v"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        y = self.scale[...].astype(jnp.float32)[None, None, None] * x32
        return (y * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class DeltaNet(nnx.Module):
    """The gated delta rule with its projections; returns its output and the input of out_proj."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        keys, values = config.key_heads * config.key_size, config.value_heads * config.value_size
        self.config, self.keys, self.values = config, keys, values
        self.projections(rngs)
        self.conv1d = Convolution(2 * keys + values, config.convolved)
        self.dt_bias = nnx.Param(jnp.zeros((config.value_heads,), jnp.float32))
        self.A_log = nnx.Param(jnp.zeros((config.value_heads,), jnp.float32))
        self.norm = GatedNorm(config.value_size, config.norm_eps)
        self.out_proj = linear(config, values, config.hidden_size, rngs)

    def projections(self, rngs: nnx.Rngs) -> None:
        """Makes the linear layers that read the hidden states."""
        config, width = self.config, self.config.hidden_size
        projections = {"query": self.keys, "key": self.keys, "value": self.values}
        self.in_proj_qkv = fused(config, width, projections, rngs)
        self.in_proj_z = linear(config, width, self.values, rngs)
        self.in_proj_b = linear(config, width, config.value_heads, rngs)
        self.in_proj_a = linear(config, width, config.value_heads, rngs)

    def project(self, x: Float[Array, "b t d"]) -> tuple[Array, Array, Array, Array]:
        """Returns queries, keys and values side by side, the gate, and what rates and decays are
        made of."""
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        config = self.config
        mixed, gate, rate, decay = self.project(x)
        mixed = ACTIVATIONS[config.activation](self.conv1d(mixed, layout))
        query, key, value = (
            part.reshape(*x.shape[:2], -1, size).astype(jnp.float32)
            for part, size in zip(
                jnp.split(mixed, [self.keys, 2 * self.keys], axis=-1),
                (config.key_size, config.key_size, config.value_size),
                strict=True,
            )
        )
        speed = jnp.exp(self.A_log[...].astype(jnp.float32))[None, None]
        shift = self.dt_bias[...].astype(jnp.float32)[None, None]
        decay = -speed * jax.nn.softplus(decay.astype(jnp.float32) + shift)
        rate = jax.nn.sigmoid(rate).astype(jnp.float32)
        query = _normalized(query) * jnp.float32(config.key_size**-0.5)
        y = gated_delta_rule(Inputs(query, _normalized(key), value, decay, rate), layout).astype(
            x.dtype
        )
        y = self.norm(y, gate.reshape(y.shape)).reshape(*x.shape[:2], -1)
        return self.out_proj(y), y


def _normalized(x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + jnp.float32(1e-6))


def layer(
    config: Config,
    kind: Kind,
    rngs: nnx.Rngs,
    *,
    recurrence: type = DeltaNet,
    experts: type = SparseMLP,
) -> DecoderLayer:
    """Makes LLaMA's layer, with the delta rule or attention."""
    if kind.rope is not None:
        return DecoderLayer(config, kind, rngs, attention=Attention, experts=experts)
    names = "linear_attn", "mlp"
    return DecoderLayer(config, kind, rngs, attention=recurrence, experts=experts, names=names)


FAMILY = Family(config, inputs=inputs, layer=layer)
