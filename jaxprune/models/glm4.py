"""GLM 4 (0414): norms before and after each block, and a rotation of half of a head's features, in
pairs side by side (Hugging Face's Glm4ForCausalLM).

References:
    Team GLM, "ChatGLM" (arXiv 2406.12793).
"""

from functools import partial

from jaxprune.models.common.configuration import Rotation, reader
from jaxprune.models.common.decoder import ATTENTION_INPUTS, DecoderLayer, FusedMLP
from jaxprune.models.common.family import Family

FAMILY = Family(
    reader(
        rope=Rotation(interleaved=True, partial=True),
        output_bias=False,
        # The second is before the feed-forward network, whatever its name.
        norms_before=("input_layernorm", "post_attention_layernorm"),
        norms_after=("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    inputs={
        **ATTENTION_INPUTS,
        "mlp_input": ("mlp.gate_up_proj",),
        "mlp_hidden": ("mlp.down_proj",),
    },
    layer=partial(DecoderLayer, feed_forward=FusedMLP),
)
