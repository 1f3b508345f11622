"""LLaMA 1, 2, 3 and the many models of their architecture (Hugging Face's LlamaForCausalLM).

Module attributes carry Hugging Face's names, so that a parameter's path is its name in a checkpoint.

References:
    Touvron et al., arXiv 2302.13971 and 2307.09288; grouped-query attention: Ainslie et al., arXiv 2305.13245.
"""

import dataclasses
from typing import Annotated, Any

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
}

INPUTS = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}


class Entries(Schema):
    """The entries of config.json that the family reads, with transformers' defaults filled in."""

    vocab_size: Vocabulary
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Annotated[int, Field(ge=2, le=2**12, multiple_of=2)]
    max_position_embeddings: Positions
    rms_norm_eps: Positive
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    rope_parameters: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What the modules need of a checkpoint's configuration.

    Attributes:
        max_positions: the longest window; None where there is no limit.
        dtype: the dtype of the computation; parameters may be stored in another.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    rms_norm_eps: float
    activation: str
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    rope: Rope
    dtype: DTypeLike

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> "Config":
        """Reads a transformers configuration.

        Raises:
            CheckpointError: an entry is of the wrong type, or out of range.
            InputError: something in it is not implemented.
        """
        entries = {name: getattr(hf, name, None) for name in Entries.model_fields}
        hf = check(Entries, entries, file="", error=CheckpointError)
        if hf.hidden_act not in ACTIVATIONS:
            raise InputError(f"activation {hf.hidden_act!r} is not implemented; {', '.join(ACTIVATIONS)} are")
        if hf.num_attention_heads % hf.num_key_value_heads:
            raise InputError(
                f"{hf.num_attention_heads} attention heads cannot share {hf.num_key_value_heads} key-value heads"
            )
        rope = Rope.from_hf(hf.rope_parameters, hf.head_dim, hf.max_position_embeddings)
        return cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=hf.head_dim,
            # Dynamic rope stretches to any length.
            max_positions=None if rope.kind == "dynamic" else hf.max_position_embeddings,
            rms_norm_eps=hf.rms_norm_eps,
            activation=hf.hidden_act,
            attention_bias=hf.attention_bias,
            mlp_bias=hf.mlp_bias,
            tied=hf.tie_word_embeddings,
            rope=rope,
            dtype=dtype,
        )


class Embed(nnx.Module):
    """Token ids [b, t] -> hidden states [b, t, hidden]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return self.embed_tokens(tokens)


class RMSNorm(nnx.Module):
    """Root mean square normalization in float32, whatever the dtype around it."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), jnp.float32))
        self.epsilon = config.rms_norm_eps
        del rngs  # unused

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32)[None, None, :]
        return (x32 * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention; returns its output and the input of o_proj."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        def linear(n_in: int, n_out: int) -> nnx.Linear:
            return nnx.Linear(n_in, n_out, use_bias=config.attention_bias, dtype=config.dtype, rngs=rngs)

        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, width)
        self.k_proj = linear(config.hidden_size, kv_width)
        self.v_proj = linear(config.hidden_size, kv_width)
        self.o_proj = linear(width, config.hidden_size)
        self.head_dim = config.head_dim
        self.rope = config.rope

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        positions = layout.positions if layout else None
        query = self.rope.rotate(heads(self.q_proj(x)), positions)
        key = self.rope.rotate(heads(self.k_proj(x)), positions)
        y = causal_attention(query, key, heads(self.v_proj(x)), layout)
        y = y.reshape(*x.shape[:2], -1)
        return self.o_proj(y), y


class MLP(nnx.Module):
    """Gated feed-forward network; returns its output and the input of down_proj."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        def linear(n_in: int, n_out: int) -> nnx.Linear:
            return nnx.Linear(n_in, n_out, use_bias=config.mlp_bias, dtype=config.dtype, rngs=rngs)

        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        y = ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(y), y


class DecoderLayer(nnx.Module):
    """One layer; returns its output and its taps, the inputs of its linear layers under the names of `INPUTS`."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, rngs)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        attention_input = self.input_layernorm(x)
        y, attention_output = self.self_attn(attention_input, layout)
        x = x + y
        mlp_input = self.post_attention_layernorm(x)
        y, mlp_hidden = self.mlp(mlp_input)
        return x + y, {
            "attention_input": attention_input,
            "attention_output": attention_output,
            "mlp_input": mlp_input,
            "mlp_hidden": mlp_hidden,
        }


class Head(nnx.Module):
    """Hidden states [b, t, hidden] -> logits [b, t, vocabulary]; a tied head is the embedding, transposed."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.norm = RMSNorm(config, rngs)
        if config.tied:
            self.embed_tokens = Embed(config, rngs).embed_tokens
        else:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, dtype=config.dtype, rngs=rngs
            )
        self.tied = config.tied

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        x = self.norm(x)
        return self.embed_tokens.attend(x) if self.tied else self.lm_head(x)
