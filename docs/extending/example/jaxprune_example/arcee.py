"""Arcee: LLaMA whose feed-forward network has no gate (Hugging Face's ArceeForCausalLM)."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxprune.models import Layout
from jaxprune.models.llama import ACTIVATIONS, Attention, Config, Embed, Head, RMSNorm

__all__ = ["INPUTS", "Config", "DecoderLayer", "Embed", "Head"]

INPUTS = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.up_proj",),
    "mlp_hidden": ("mlp.down_proj",),
}


class MLP(nnx.Module):
    """Feed-forward network; returns its output and the input of down_proj."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        def linear(n_in: int, n_out: int) -> nnx.Linear:
            return nnx.Linear(n_in, n_out, use_bias=config.mlp_bias, dtype=config.dtype, rngs=rngs)

        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Float[Array, "b t h"]]:
        hidden = ACTIVATIONS[self.activation](self.up_proj(x))
        return self.down_proj(hidden), hidden


class DecoderLayer(nnx.Module):
    """One layer; returns its output and its taps, the inputs of its linear layers under the names of `INPUTS`."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, rngs)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
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
