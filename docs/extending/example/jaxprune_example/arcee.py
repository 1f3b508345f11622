"""Arcee: LLaMA whose feed-forward network has no gate (Hugging Face's ArceeForCausalLM)."""

from flax import nnx
from jaxtyping import Array, Float

from jaxprune.models import llama
from jaxprune.models.llama import ACTIVATIONS, Config, Embed, Head

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


class DecoderLayer(llama.DecoderLayer):
    """LLaMA's layer with that network; the names of its taps are LLaMA's."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.mlp = MLP(config, rngs)
