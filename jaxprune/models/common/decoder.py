"""What most decoders share: norms, attention, feed-forward networks, embedding and head.

A family composes these and says where it differs. Attributes of modules carry Hugging Face's names,
so that a parameter's path is its name in a checkpoint.

References:
    Touvron et al., arXiv 2302.13971 and 2307.09288; grouped-query attention: Ainslie et al., arXiv
    2305.13245.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.models.common.activations import gated
from jaxprune.models.common.attention import causal_attention
from jaxprune.models.common.configuration import Config, Kind
from jaxprune.models.common.experts import EXPERT_INPUTS, SparseMLP
from jaxprune.models.common.matmul import all_but_kernels, times_embedding, times_kernel
from jaxprune.models.common.packed_windows import Layout

Captures = dict[str, Any]
"""Capture -> what it captures: an array, or that of experts (`expert_dispatch.Routed`)."""
LinearInputs = Mapping[str, tuple[str, ...]]
"""Capture -> the linear layers that read it."""


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
        y = (
            centred
            * jax.lax.rsqrt(variance + self.epsilon)
            * self.scale[...].astype(jnp.float32)[None, None, :]
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[None, None, :]
        return y.astype(x.dtype)


def linear(
    config: Config, n_in: int, n_out: int, rngs: nnx.Rngs, *, bias: bool = False
) -> nnx.Linear:
    """Makes a linear layer that computes in the configuration's dtype."""
    return nnx.Linear(
        n_in,
        n_out,
        use_bias=bias,
        dtype=config.dtype,
        promote_dtype=all_but_kernels,
        dot_general=times_kernel,
        rngs=rngs,
    )


def fused(
    config: Config,
    n_in: int,
    projections: Mapping[str, int],
    rngs: nnx.Rngs,
    *,
    repeats: int = 1,
    bias: bool = False,
) -> nnx.Linear:
    """Makes a linear layer that is several side by side.

    Args:
        config: of the model.
        n_in: the inputs.
        projections: name -> outputs of each.
        rngs: for the parameters' values.
        repeats: how many times the projections come, one after the other, as where a head's lie
            together.
        bias: whether it has one.
    """
    module = linear(config, n_in, repeats * sum(projections.values()), rngs, bias=bias)
    module.projections = tuple(projections.items())
    return module


class Attention(nnx.Module):
    """Causal grouped-query attention; returns its output and the input of o_proj."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = linear(config, config.hidden_size, width, rngs, bias=config.qkv_bias)
        self.k_proj = linear(config, config.hidden_size, kv_width, rngs, bias=config.qkv_bias)
        self.v_proj = linear(config, config.hidden_size, kv_width, rngs, bias=config.qkv_bias)
        self.o_proj = linear(config, width, config.hidden_size, rngs, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(
                config, rngs, width if config.qk_norm == "all" else config.head_dim
            )
            self.k_norm = RMSNorm(
                config, rngs, kv_width if config.qk_norm == "all" else config.head_dim
            )
        self.sinks = (
            nnx.Param(jnp.zeros((config.num_heads,), jnp.float32)) if config.sinks else None
        )
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
        sinks = self.sinks[...] if self.sinks is not None else None
        y = attend(self.config, self.kind, query, key, heads(self.v_proj(x)), layout, sinks)
        return self.o_proj(y), y


def attend(
    config: Config,
    kind: Kind,
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t k d"],
    value: Float[Array, "b t k d"],
    layout: Layout | None,
    sinks: Float[Array, "h"] | None = None,
) -> Float[Array, "b t _"]:
    """Rotates queries and keys as the kind of layer wants, and attends; returns the heads side by
    side."""
    if kind.rope is not None:
        where = (layout.positions, layout.capacity) if layout else ()
        query, key = kind.rope.rotate(query, *where), kind.rope.rotate(key, *where)
    y = causal_attention(
        query,
        key,
        value,
        layout,
        window=kind.window,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        sinks=sinks,
    )
    return y.reshape(*y.shape[:2], -1)


class GatedMLP(nnx.Module):
    """Gated feed-forward network; returns its output and its capture."""

    def __init__(self, config: Config, rngs: nnx.Rngs, size: int | None = None):
        size = config.intermediate_size if size is None else size
        self.gate_proj = linear(config, config.hidden_size, size, rngs, bias=config.mlp_bias)
        self.up_proj = linear(config, config.hidden_size, size, rngs, bias=config.mlp_bias)
        self.down_proj = linear(config, size, config.hidden_size, rngs, bias=config.mlp_bias)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Captures]:
        y = gated(self.activation, self.gate_proj(x), self.up_proj(x))
        return self.down_proj(y), {"mlp_hidden": y}


class FusedMLP(nnx.Module):
    """A gated feed-forward network whose gate and up projections are one linear layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.intermediate_size
        self.gate_up_proj = fused(config, config.hidden_size, {"gate": width, "up": width}, rngs)
        self.down_proj = linear(config, config.intermediate_size, config.hidden_size, rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Captures]:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        y = gated(self.activation, gate, up)
        return self.down_proj(y), {"mlp_hidden": y}


ATTENTION_INPUTS: LinearInputs = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
}
"""Of `Attention`."""


def gated_inputs(path: str = "mlp") -> LinearInputs:
    """Returns the inputs of a `GatedMLP` at a path."""
    return {
        "mlp_input": (f"{path}.gate_proj", f"{path}.up_proj"),
        "mlp_hidden": (f"{path}.down_proj",),
    }


def inputs(config: Config, kind: Kind) -> LinearInputs:
    """Returns the inputs of `Attention`, and of `GatedMLP` or `SparseMLP`."""
    return {**ATTENTION_INPUTS, **(EXPERT_INPUTS if kind.experts else gated_inputs())}


class DecoderLayer(nnx.Module):
    """LLaMA's layer: adds the attention's output to the hidden states, then that of the
    feed-forward network or the experts, with norms where the configuration has them.

    Args:
        config: of the model.
        kind: of the layer.
        rngs: for the parameters' values.
        attention: class of the attention, made from `(config, kind, rngs)`; returns its output and
            the input of its last linear layer.
        feed_forward: class of the feed-forward network, made from `(config, rngs)`; returns its
            output and its own captures.
        experts: the same of layers with experts.
        norm: class of the norms.
        names: a checkpoint's names of the attention and of what comes after it.
    """

    def __init__(
        self,
        config: Config,
        kind: Kind,
        rngs: nnx.Rngs,
        *,
        attention: Callable[..., Any] = Attention,
        feed_forward: Callable[..., Any] = GatedMLP,
        experts: Callable[..., Any] = SparseMLP,
        norm: Callable[..., Any] = RMSNorm,
        names: tuple[str, str] = ("self_attn", "mlp"),
    ):
        for name in (*(config.norms_before or ()), *(config.norms_after or ())):
            setattr(self, name, norm(config, rngs))
        setattr(self, names[0], attention(config, kind, rngs))
        setattr(self, names[1], (experts if kind.experts else feed_forward)(config, rngs))
        self.config, self.names = config, names

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Captures]:
        attention, mlp = self._modules(self.names)
        before_attention, before_mlp = self._modules(self.config.norms_before)
        after_attention, after_mlp = self._modules(self.config.norms_after)
        attention_input = before_attention(x)
        y, attention_output = attention(attention_input, layout)
        attended = x + self._scaled(after_attention(y))
        mlp_input = before_mlp(x if self.config.parallel else attended)
        y, own = mlp(mlp_input)
        captures = {
            "attention_input": attention_input,
            "attention_output": attention_output,
            "mlp_input": mlp_input,
        }
        return attended + self._scaled(after_mlp(y)), captures | own

    def _modules(self, names: tuple[str, str] | None) -> tuple[Any, Any]:
        """Returns the modules of these names; without names, functions that return what they
        take."""
        if names is None:
            return _same, _same
        return getattr(self, names[0]), getattr(self, names[1])

    def _scaled(self, y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        scale = self.config.residual_scale
        return y if scale == 1 else y * y.dtype.type(scale)


def _same(x: Array) -> Array:
    return x


class Embed(nnx.Module):
    """Token ids [b, t] -> hidden states [b, t, hidden]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=config.dtype, rngs=rngs
        )
        self.scale = config.embedding_scale

    def __call__(
        self, tokens: Int[Array, "b t"], layout: Layout | None = None
    ) -> Float[Array, "b t d"]:
        x = self.embed_tokens(tokens)
        return x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)


class Head(nnx.Module):
    """Hidden states [b, t, hidden] -> logits [b, t, vocabulary]; a tied head is the embedding,
    transposed."""

    def __init__(
        self, config: Config, rngs: nnx.Rngs, norm: Callable[[Config, nnx.Rngs], Any] = RMSNorm
    ):
        self.norm = norm(config, rngs)
        if config.tied:
            self.embed_tokens = Embed(config, rngs).embed_tokens
        else:
            self.lm_head = linear(config, config.hidden_size, config.vocab_size, rngs)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        x = self.norm(x)
        logits = (
            times_embedding(x, self.embed_tokens.embedding[...])
            if self.config.tied
            else self.lm_head(x)
        )
        return scaled_logits(self.config, logits)


def scaled_logits(config: Config, logits: Float[Array, "b t v"]) -> Float[Array, "b t v"]:
    """Returns the logits times their factor, capped."""
    if config.logit_scale != 1:
        logits = logits * jnp.asarray(config.logit_scale, logits.dtype)
    if config.logit_softcap is not None:
        cap = jnp.asarray(config.logit_softcap, logits.dtype)
        logits = jnp.tanh(logits / cap) * cap
    return logits
