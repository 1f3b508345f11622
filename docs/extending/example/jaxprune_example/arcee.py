"""Arcee: LLaMA whose feed-forward network has no gate (Hugging Face's ArceeForCausalLM)."""

from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from jaxprune.models.common.activations import ACTIVATIONS
from jaxprune.models.common.configuration import Config
from jaxprune.models.common.decoder import ATTENTION_INPUTS, Captures, DecoderLayer, linear
from jaxprune.models.common.family import Family


class MLP(nnx.Module):
    """Feed-forward network; returns its output and its capture."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up_proj = linear(
            config, config.hidden_size, config.intermediate_size, rngs, bias=config.mlp_bias
        )
        self.down_proj = linear(
            config, config.intermediate_size, config.hidden_size, rngs, bias=config.mlp_bias
        )
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Captures]:
        hidden = ACTIVATIONS[self.activation](self.up_proj(x))
        return self.down_proj(hidden), {"mlp_hidden": hidden}


FAMILY = Family(
    inputs={**ATTENTION_INPUTS, "mlp_input": ("mlp.up_proj",), "mlp_hidden": ("mlp.down_proj",)},
    layer=partial(DecoderLayer, feed_forward=MLP),
)
