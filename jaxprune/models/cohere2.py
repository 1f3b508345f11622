"""Command R7B and its kin: attention and feed-forward network side by side, windows in three layers
of four, and a rotation in these only (Hugging Face's Cohere2ForCausalLM).

References:
    Cohere, "Command A" (arXiv 2504.00698).
"""

from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from convert.assets import Positive
from jaxprune.models.common.configuration import (
    SLIDING,
    Config,
    Entry,
    Kind,
    LayerEntries,
    Rotation,
    reader,
)
from jaxprune.models.common.decoder import (
    Attention,
    Captures,
    GatedMLP,
    Head,
    LayerNorm,
    LinearInputs,
)
from jaxprune.models.common.family import Family
from jaxprune.models.common.packed_windows import Layout

NORM = partial(LayerNorm, use_bias=False)
INPUTS: LinearInputs = {
    "input": (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ),
    "attention_output": ("self_attn.o_proj",),
    "mlp_hidden": ("mlp.down_proj",),
}


class DecoderLayer(nnx.Module):
    """A layer whose attention and feed-forward network read the same norm."""

    def __init__(self, config: Config, kind: Kind, rngs: nnx.Rngs):
        self.input_layernorm = NORM(config, rngs)
        self.self_attn = Attention(config, kind, rngs)
        self.mlp = GatedMLP(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout | None = None
    ) -> tuple[Float[Array, "b t d"], Captures]:
        y = self.input_layernorm(x)
        attended, attention_output = self.self_attn(y, layout)
        fed, own = self.mlp(y)
        return x + attended + fed, {"input": y, "attention_output": attention_output, **own}


FAMILY = Family(
    reader(
        LayerEntries,
        rope=Rotation((SLIDING,), interleaved=True),
        logit_scale=Entry("logit_scale", Positive),
    ),
    inputs=INPUTS,
    layer=DecoderLayer,
    head=partial(Head, norm=NORM),
)
