"""What most decoders share: configuration, norms, attention, feed-forward networks, embedding and head.

A family composes these and says where it differs. Attributes of modules carry Hugging Face's names, so that a
parameter's path is its name in a checkpoint.

References:
    Touvron et al., arXiv 2302.13971 and 2307.09288; grouped-query attention: Ainslie et al., arXiv 2305.13245.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int
from pydantic import Field

from convert.assets import Count, Positions, Positive, Size, Vocabulary
from convert.errors import CheckpointError
from convert.schema import Schema, check
from jaxprune.errors import InputError
from jaxprune.models.attention import Layout, causal_attention
from jaxprune.models.rope import Rope

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
}
FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers, as configurations name them."""
Transform = Callable[[Array], Array]
Taps = dict[str, Array]


class Entries(Schema):
    """The entries of config.json that most families have, with transformers' defaults filled in."""

    vocab_size: Vocabulary
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Annotated[int, Field(ge=2, le=2**12, multiple_of=2)] | None = None
    max_position_embeddings: Positions
    rms_norm_eps: Positive | None = None
    layer_norm_eps: Positive | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool
    rope_parameters: dict[str, Any] = {}
    sliding_window: Positions | None = None
    layer_types: list[str] | None = None


E = TypeVar("E", bound=Schema)


def entries(schema: type[E], hf: Any) -> E:
    """Returns the entries of a transformers configuration that a schema names.

    Args:
        schema: the entries' types and ranges.
        hf: the configuration.

    Raises:
        CheckpointError: an entry is missing, of the wrong type, or out of range.
    """
    found = {name: value for name in schema.model_fields if (value := getattr(hf, name, None)) is not None}
    return check(schema, found, file="", error=CheckpointError)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tells a layer from the others of its model.

    Attributes:
        rope: the rotation of queries and keys; None: there is none.
        window: how many tokens a query sees at most, its own included; None: all before it.
    """

    rope: Rope | None
    window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the shared modules need of a checkpoint's configuration.

    Attributes:
        kinds: of the layers, from the first.
        max_positions: the longest window; None where there is no limit.
        qkv_bias, output_bias, mlp_bias: whether those linear layers have one.
        qk_norm: over what queries and keys are normalized: each head, all heads together, or None.
        attention_scale: of the scores; None: 1/√head_dim.
        attention_softcap, logit_softcap: c of c·tanh(x/c), for scores and logits; None: they are taken as they are.
        embedding_scale, residual_scale, logit_scale: factors of the embedding, of what is added to the hidden states,
            and of the logits.
        norm_offset: what is added to a norm's weight.
        dtype: the dtype of the computation; parameters may be stored in another.

    Those that have defaults are families' own.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    kinds: tuple[Kind, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    norm_eps: float
    activation: str
    tied: bool
    dtype: DTypeLike
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    norm_offset: float = 0.0

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> "Config":
        """Reads a transformers configuration, as LLaMA's is.

        Args:
            hf: the configuration.
            dtype: the dtype of the computation.

        Raises:
            CheckpointError: an entry is missing, of the wrong type, or out of range.
            InputError: something in it is not implemented.
        """
        return cls.of(entries(Entries, hf), dtype)

    @classmethod
    def of(
        cls,
        hf: Entries,
        dtype: DTypeLike,
        *,
        rope: Callable[[str], Rope | None] | None = None,
        **options: Any,
    ) -> "Config":
        """Makes a configuration of checked entries.

        Args:
            hf: the entries.
            dtype: the dtype of the computation.
            rope: a layer's type -> its rotation; None: `rope_parameters` are for all layers.
            options: attributes that differ from LLaMA's.

        Raises:
            InputError: something in it is not implemented.
        """
        activation, norm_eps = hf.hidden_activation or hf.hidden_act, hf.rms_norm_eps or hf.layer_norm_eps
        if activation not in ACTIVATIONS:
            raise InputError(f"activation {activation!r} is not implemented; {', '.join(ACTIVATIONS)} are")
        if norm_eps is None:
            raise InputError("rms_norm_eps is missing in the model's configuration")
        kv_heads = hf.num_key_value_heads or hf.num_attention_heads
        if hf.num_attention_heads % kv_heads:
            raise InputError(f"{hf.num_attention_heads} attention heads cannot share {kv_heads} key-value heads")
        if rope is None:
            every = rope_of(hf)
            rope = lambda _: every  # noqa: E731
        kinds = layer_kinds(hf, rope)
        stretches = any(kind.rope is not None and kind.rope.stretches for kind in kinds)
        usual = {
            "vocab_size": hf.vocab_size,
            "hidden_size": hf.hidden_size,
            "intermediate_size": hf.intermediate_size,
            "kinds": kinds,
            "num_heads": hf.num_attention_heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_size(hf),
            "max_positions": None if stretches else hf.max_position_embeddings,
            "norm_eps": norm_eps,
            "activation": activation,
            "tied": hf.tie_word_embeddings,
            "qkv_bias": hf.attention_bias,
            "output_bias": hf.attention_bias,
            "mlp_bias": hf.mlp_bias,
        }
        return cls(dtype=dtype, **usual | options)


C = TypeVar("C", bound=Config)


def head_size(hf: Entries) -> int:
    """Returns the features of a head.

    Raises:
        InputError: heads cannot have as many.
    """
    size, rest = divmod(hf.hidden_size, hf.num_attention_heads)
    if hf.head_dim is None and (rest or size % 2):
        raise InputError(f"{hf.hidden_size} features cannot be split into {hf.num_attention_heads} heads of even size")
    return hf.head_dim or size


def with_window(config: C, window: int | None) -> C:
    """Returns the configuration with one window for all layers."""
    kinds = tuple(dataclasses.replace(kind, window=window) for kind in config.kinds)
    return dataclasses.replace(config, kinds=kinds)


def layer_kinds(hf: Entries, rope: Callable[[str], Rope | None]) -> tuple[Kind, ...]:
    """Returns the kinds of all layers: their rotation, and their window where they attend to one.

    Args:
        hf: the entries.
        rope: a layer's type -> its rotation.

    Raises:
        InputError: a type of layer that is not implemented, or types of another number of layers.
    """
    types = hf.layer_types or [FULL] * hf.num_hidden_layers
    if len(types) != hf.num_hidden_layers:
        raise InputError(f"layer_types has {len(types)} entries for {hf.num_hidden_layers} layers")
    if unknown := sorted({*types} - {FULL, SLIDING}):
        raise InputError(f"layer type {unknown[0]!r} is not implemented; {FULL} and {SLIDING} are")
    if SLIDING in types and hf.sliding_window is None:
        raise InputError(f"layers of type {SLIDING} need sliding_window in the model's configuration")
    return tuple(Kind(rope(one), hf.sliding_window if one == SLIDING else None) for one in types)


def rope_by_type(hf: Entries) -> Callable[[str], Rope | None]:
    """Returns a layer's type -> its rotation, where `rope_parameters` has an entry for each type.

    Raises:
        InputError: a rotation that is not implemented, or a type without one.
    """
    ropes = {}
    for kind in sorted({*(hf.layer_types or [FULL])}):
        parameters = hf.rope_parameters.get(kind)
        if not isinstance(parameters, dict):
            raise InputError(f"rope_parameters has no entry for layers of type {kind!r}")
        ropes[kind] = Rope.from_hf(parameters, head_size(hf), hf.max_position_embeddings)
    return lambda kind: ropes[kind]


def rope_of(hf: Entries, **options: bool) -> Rope:
    """Returns the rotation of all layers; options and errors as for `Rope.from_hf`."""
    return Rope.from_hf(hf.rope_parameters, head_size(hf), hf.max_position_embeddings, **options)


class RMSNorm(nnx.Module):
    """Root mean square normalization in float32, whatever the dtype around it."""

    def __init__(self, config: Config, rngs: nnx.Rngs, width: int | None = None):
        self.scale = nnx.Param(jnp.ones((width or config.hidden_size,), jnp.float32))
        self.epsilon, self.offset = config.norm_eps, config.norm_offset
        del rngs  # unused

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        scale = scale + self.offset if self.offset else scale
        return (x32 * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalization to mean 0 and variance 1 in float32, whatever the dtype around it."""

    def __init__(self, config: Config, rngs: nnx.Rngs, *, use_bias: bool = True):
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((config.hidden_size,), jnp.float32)) if use_bias else None
        self.epsilon = config.norm_eps
        del rngs  # unused

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(jnp.float32)[None, None, :]
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[None, None, :]
        return y.astype(x.dtype)


def linear(config: Config, n_in: int, n_out: int, rngs: nnx.Rngs, *, bias: bool = False) -> nnx.Linear:
    """Makes a linear layer that computes in the configuration's dtype."""
    return nnx.Linear(n_in, n_out, use_bias=bias, dtype=config.dtype, rngs=rngs)


class Attention(nnx.Module):
    """Causal grouped-query attention; returns its output and the input of o_proj."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = linear(config, config.hidden_size, width, rngs, bias=config.qkv_bias)
        self.k_proj = linear(config, config.hidden_size, kv_width, rngs, bias=config.qkv_bias)
        self.v_proj = linear(config, config.hidden_size, kv_width, rngs, bias=config.qkv_bias)
        self.o_proj = linear(config, width, config.hidden_size, rngs, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config, rngs, width if config.qk_norm == "all" else config.head_dim)
            self.k_norm = RMSNorm(config, rngs, kv_width if config.qk_norm == "all" else config.head_dim)
        self.config, self.kind = config, kind

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        def heads(y: Float[Array, "b t h"]) -> Float[Array, "b t k d"]:
            return y.reshape(*y.shape[:2], -1, self.config.head_dim)

        query, key = self.q_proj(x), self.k_proj(x)
        if self.config.qk_norm == "all":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = heads(query), heads(key)
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        y = attend(self.config, self.kind, query, key, heads(self.v_proj(x)), layout)
        return self.o_proj(y), y


def attend(
    config: Config,
    kind: Kind,
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t k d"],
    value: Float[Array, "b t k d"],
    layout: Layout | None,
) -> Float[Array, "b t _"]:
    """Rotates queries and keys as the kind of layer wants, and attends; returns the heads side by side."""
    if kind.rope is not None:
        positions = layout.positions if layout else None
        query, key = kind.rope.rotate(query, positions), kind.rope.rotate(key, positions)
    y = causal_attention(
        query,
        key,
        value,
        layout,
        window=kind.window,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )
    return y.reshape(*y.shape[:2], -1)


class GatedMLP(nnx.Module):
    """Gated feed-forward network; returns its output and the input of down_proj."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate_proj = linear(config, config.hidden_size, config.intermediate_size, rngs, bias=config.mlp_bias)
        self.up_proj = linear(config, config.hidden_size, config.intermediate_size, rngs, bias=config.mlp_bias)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size, rngs, bias=config.mlp_bias)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        y = ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(y), y


class FusedMLP(nnx.Module):
    """A gated feed-forward network whose gate and up projections are one linear layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate_up_proj = linear(config, config.hidden_size, 2 * config.intermediate_size, rngs)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size, rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        y = ACTIVATIONS[self.activation](gate) * up
        return self.down_proj(y), y


ATTENTION_INPUTS: Mapping[str, tuple[str, ...]] = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
}
"""Tap -> the linear layers of `Attention` that read it."""


def inputs(config: Config, kind: Kind) -> Mapping[str, tuple[str, ...]]:
    """Returns the linear layers of `Attention` and `GatedMLP`: tap -> those that read it."""
    return {**ATTENTION_INPUTS, "mlp_input": ("mlp.gate_proj", "mlp.up_proj"), "mlp_hidden": ("mlp.down_proj",)}


def same(x: Array) -> Array:
    """Returns x."""
    return x


def in_turn(
    x: Float[Array, "b t d"],
    layout: Layout | None,
    attention: Callable[[Array, Layout | None], tuple[Array, Array]],
    mlp: Callable[[Array], tuple[Array, Array]],
    *,
    before: tuple[Transform, Transform] = (same, same),
    after: tuple[Transform, Transform] = (same, same),
    parallel: bool = False,
) -> tuple[Float[Array, "b t d"], Taps]:
    """Adds the attention's output to the hidden states, then the feed-forward network's.

    Args:
        x: hidden states.
        layout: of the window.
        attention, mlp: return their output and the input of their last linear layer.
        before: what their inputs go through, such as norms.
        after: what their outputs go through.
        parallel: whether the network reads the layer's input, too.

    Returns:
        The hidden states, and the taps of `inputs`.
    """
    attention_input = before[0](x)
    y, attention_output = attention(attention_input, layout)
    before_attention, x = x, x + after[0](y)
    mlp_input = before[1](before_attention if parallel else x)
    y, mlp_hidden = mlp(mlp_input)
    taps = {
        "attention_input": attention_input,
        "attention_output": attention_output,
        "mlp_input": mlp_input,
        "mlp_hidden": mlp_hidden,
    }
    return x + after[1](y), taps


class DecoderLayer(nnx.Module):
    """LLaMA's layer: a norm before the attention, and one before the feed-forward network."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, rngs)
        self.self_attn = Attention(config, kind, rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs)
        self.mlp = GatedMLP(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        before = self.input_layernorm, self.post_attention_layernorm
        return in_turn(x, layout, self.self_attn, self.mlp, before=before)


class Embed(nnx.Module):
    """Token ids [b, t] -> hidden states [b, t, hidden]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, dtype=config.dtype, rngs=rngs)
        self.scale = config.embedding_scale

    def __call__(self, tokens: Int[Array, "b t"], layout: Layout | None = None) -> Float[Array, "b t d"]:
        x = self.embed_tokens(tokens)
        return x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)


class Head(nnx.Module):
    """Hidden states [b, t, hidden] -> logits [b, t, vocabulary]; a tied head is the embedding, transposed."""

    def __init__(self, config: Config, rngs: nnx.Rngs, norm: nnx.Module | None = None):
        self.norm = norm or RMSNorm(config, rngs)
        if config.tied:
            self.embed_tokens = Embed(config, rngs).embed_tokens
        else:
            self.lm_head = linear(config, config.hidden_size, config.vocab_size, rngs)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        x = self.norm(x)
        logits = self.embed_tokens.attend(x) if self.config.tied else self.lm_head(x)
        return scaled_logits(self.config, logits)


def scaled_logits(config: Config, logits: Float[Array, "b t v"]) -> Float[Array, "b t v"]:
    """Returns the logits times their factor, capped."""
    if config.logit_scale != 1:
        logits = logits * jnp.asarray(config.logit_scale, logits.dtype)
    if config.logit_softcap is not None:
        cap = jnp.asarray(config.logit_softcap, logits.dtype)
        logits = jnp.tanh(logits / cap) * cap
    return logits
