"""Families that are LLaMA with other options: one row each.

A row is how a family reads its config.json (`configuration.reader`): what differs from LLaMA, each
option of `Config.of` as a value, or as an `Entry` of config.json that gives it. All else is
LLaMA's: the other entries, and the modules of `decoder`. A family that needs a rule or a module of
its own is a file.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import DTypeLike

from convert.assets import Positive
from jaxprune.models.common.configuration import (
    ROTATED,
    SLIDING,
    Config,
    Entry,
    LayerEntries,
    Rotation,
    reader,
)

NORMS_AFTER: dict[str, Any] = {
    "norms_before": None,
    "norms_after": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""Norms after the attention and the feed-forward network instead of before them."""

CONFIGS: Mapping[str, Callable[[Any, DTypeLike], Config]] = {
    # LLaMA 1, 2, 3 and the many models of their architecture.
    # Touvron et al., arXiv 2302.13971 and 2307.09288.
    "llama": reader(),
    # Mistral: tokens may see a window of the last ones only.
    # Jiang et al., "Mistral 7B" (arXiv 2310.06825).
    "mistral": reader(window=Entry("sliding_window")),
    # Qwen 2 and 2.5: biases of queries, keys and values.
    # Yang et al., "Qwen2 Technical Report" (arXiv 2407.10671).
    "qwen2": reader(LayerEntries, qkv_bias=True, output_bias=False),
    # Qwen 3: queries and keys are normalized within each head.
    # Yang et al., "Qwen3 Technical Report" (arXiv 2505.09388).
    "qwen3": reader(LayerEntries, qk_norm="head"),
    # Seed-OSS: biases of queries, keys and values. ByteDance Seed, 2025, as released.
    "seed_oss": reader(output_bias=Entry("attention_out_bias", bool)),
    # Granite 3: factors of the embedding, the scores, what each block adds, and the logits.
    # Granite Team, "Granite 3.0 Language Models", 2024; the factors: Yang et al. (arXiv
    # 2203.03466).
    "granite": reader(
        embedding_scale=Entry("embedding_multiplier", Positive),
        attention_scale=Entry("attention_multiplier", Positive),
        residual_scale=Entry("residual_multiplier", Positive),
        logit_scale=Entry("logits_scaling", Positive, lambda divisor: 1 / divisor),
    ),
    # OLMo 2: norms after the blocks, and of all queries and of all keys together.
    # Team OLMo, "2 OLMo 2 Furious" (arXiv 2501.00656).
    "olmo2": reader(qk_norm="all", **NORMS_AFTER),
    # OLMo 3: OLMo 2 with windows in three layers of four, and a rotation of their own for
    # these. Team OLMo, "Olmo 3" (arXiv 2512.13961).
    "olmo3": reader(LayerEntries, qk_norm="all", rope=Rotation(by_type=True), **NORMS_AFTER),
    # EXAONE 4: OLMo 2's norms, queries and keys normalized within each head; where some layers
    # attend to a window, the others have no rotation.
    # LG AI Research, "EXAONE 4.0" (arXiv 2507.11407).
    "exaone4": reader(
        LayerEntries,
        qk_norm="head",
        rope=Entry(
            "sliding_window",
            value=lambda window: ROTATED if window is None else Rotation((SLIDING,)),
        ),
        **NORMS_AFTER,
    ),
}
"""`model_type` -> how the family reads its configuration."""
