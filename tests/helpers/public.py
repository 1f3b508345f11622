"""Configurations of public checkpoints: what their config.json says of shapes, of rope and of
windows."""

from collections.abc import Mapping
from typing import Any

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def sizes(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **others: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **others,
    }


def experts(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, expert: int, **others: Any
) -> dict[str, Any]:
    known = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    known |= {
        "moe_intermediate_size": expert,
        "max_position_embeddings": 40960,
        "sliding_window": None,
    }
    return sizes(hidden, inner, layers, heads, kv_heads, 151936, **known | others)


def shared(count: int, per_token: int, expert: int, every: int) -> dict[str, Any]:
    return {
        "num_experts": count,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": expert,
        "shared_expert_intermediate_size": every,
    }


def pythia(hidden: int, layers: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "rotary_pct": 0.25,
        "max_position_embeddings": 2048,
    }


def opt(hidden: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    inner, word = 4 * hidden, others.pop("word_embed_proj_dim", hidden)
    return {
        "hidden_size": hidden,
        "ffn_dim": inner,
        "vocab_size": 50272,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "word_embed_proj_dim": word,
        **others,
    }


PHI_LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GEMMA2, GEMMA3 = (
    {"head_dim": 256, "query_pre_attn_scalar": 256},
    {"head_dim": 256, "query_pre_attn_scalar": 256},
)
QWEN3, BIG = {"head_dim": 128}, {"head_dim": 128, **UNTIED}
PUBLIC: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "llama": {
        "LLaMA-7B": sizes(4096, 11008, 32, 32, 32, 32000),
        "Llama-2-70B": sizes(8192, 28672, 80, 64, 8, 32000),
        "Llama-3.1-8B": sizes(4096, 14336, 32, 32, 8, 128256, rope_theta=5e5, rope_scaling=LLAMA3),
        "Llama-3.2-1B": sizes(2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED),
        "SmolLM2-135M": sizes(576, 1536, 30, 9, 3, 49152, **TIED),
    },
    "mistral": {
        "Mistral-7B-v0.1": sizes(
            4096, 14336, 32, 32, 8, 32000, sliding_window=4096, rope_theta=1e4
        ),
        "Mistral-Nemo": sizes(
            5120, 14336, 40, 32, 8, 131072, head_dim=128, sliding_window=None, rope_theta=1e6
        ),
        "Mistral-Small-24B": sizes(
            5120, 32768, 40, 32, 8, 131072, head_dim=128, sliding_window=None, rope_theta=1e8
        ),
    },
    "ministral3": {
        "Ministral-3-8B": sizes(4096, 14336, 34, 32, 8, 131072, head_dim=128),
        "Ministral-3-14B": sizes(5120, 16384, 40, 32, 8, 131072, head_dim=128),
    },
    "qwen2": {
        "Qwen2.5-0.5B": sizes(896, 4864, 24, 14, 2, 151936, rope_theta=1e6, **TIED),
        "Qwen2.5-1.5B": sizes(1536, 8960, 28, 12, 2, 151936, rope_theta=1e6, **TIED),
        "Qwen2.5-3B": sizes(2048, 11008, 36, 16, 2, 151936, rope_theta=1e6, **TIED),
        "Qwen2.5-7B": sizes(3584, 18944, 28, 28, 4, 152064, rope_theta=1e6, sliding_window=131072),
        "Qwen2.5-14B": sizes(5120, 13824, 48, 40, 8, 152064, rope_theta=1e6),
        "Qwen2.5-32B": sizes(5120, 27648, 64, 40, 8, 152064, rope_theta=1e6),
        "Qwen2.5-72B": sizes(8192, 29568, 80, 64, 8, 152064, rope_theta=1e6),
    },
    "qwen3": {
        "Qwen3-0.6B": sizes(1024, 3072, 28, 16, 8, 151936, **QWEN3, **TIED),
        "Qwen3-1.7B": sizes(2048, 6144, 28, 16, 8, 151936, **QWEN3, **TIED),
        "Qwen3-4B": sizes(2560, 9728, 36, 32, 8, 151936, **QWEN3, **TIED),
        "Qwen3-8B": sizes(4096, 12288, 36, 32, 8, 151936, **BIG),
        "Qwen3-14B": sizes(5120, 17408, 40, 40, 8, 151936, **BIG),
        "Qwen3-32B": sizes(5120, 25600, 64, 64, 8, 151936, **BIG),
    },
    "gemma2": {
        "gemma-2-2b": sizes(2304, 9216, 26, 8, 4, 256000, **GEMMA2),
        "gemma-2-9b": sizes(3584, 14336, 42, 16, 8, 256000, **GEMMA2),
        "gemma-2-27b": sizes(
            4608, 36864, 46, 32, 16, 256000, head_dim=128, query_pre_attn_scalar=144
        ),
    },
    "gemma3_text": {
        "gemma-3-270m": sizes(640, 2048, 18, 4, 1, 262144, sliding_window=512, **GEMMA3),
        "gemma-3-1b": sizes(1152, 6912, 26, 4, 1, 262144, sliding_window=512, **GEMMA3),
        "gemma-3-4b, its text model": sizes(
            2560, 10240, 34, 8, 4, 262208, sliding_window=1024, **GEMMA3
        ),
        "gemma-3-12b, its text model": sizes(
            3840, 15360, 48, 16, 8, 262208, sliding_window=1024, **GEMMA3
        ),
        "gemma-3-27b, its text model": sizes(
            5376,
            21504,
            62,
            32,
            16,
            262208,
            head_dim=128,
            query_pre_attn_scalar=168,
            sliding_window=1024,
        ),
    },
    "phi3": {
        "Phi-3-mini-4k": sizes(3072, 8192, 32, 32, 32, 32064, sliding_window=2047),
        "Phi-3-mini-128k": sizes(
            3072,
            8192,
            32,
            32,
            32,
            32064,
            rope_scaling=PHI_LONG,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            sliding_window=262144,
        ),
        "Phi-3-medium-4k": sizes(5120, 17920, 40, 40, 10, 32064, sliding_window=2047),
        "phi-4": sizes(5120, 17920, 40, 40, 10, 100352, sliding_window=None),
        "Phi-4-mini": sizes(
            3072,
            8192,
            32,
            24,
            8,
            200064,
            rope_scaling=PHI_LONG,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
            sliding_window=262144,
            **TIED,
        ),
    },
    "olmo2": {
        "OLMo-2-1B": sizes(2048, 8192, 16, 16, 16, 100352),
        "OLMo-2-7B": sizes(4096, 11008, 32, 32, 32, 100352),
        "OLMo-2-13B": sizes(5120, 13824, 40, 40, 40, 100352),
        "OLMo-2-32B": sizes(5120, 27648, 64, 40, 8, 100352),
    },
    "olmo3": {
        "Olmo-3-7B": sizes(4096, 11008, 32, 32, 32, 100278, sliding_window=4096),
        "Olmo-3-32B": sizes(5120, 27648, 64, 40, 8, 100278, sliding_window=4096),
    },
    "smollm3": {"SmolLM3-3B": sizes(2048, 11008, 36, 16, 4, 128256, **TIED)},
    "granite": {
        "granite-3.3-2b": sizes(
            2048,
            8192,
            40,
            32,
            8,
            49159,
            embedding_multiplier=12.0,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=8.0,
            **TIED,
        ),
        "granite-3.3-8b": sizes(
            4096,
            12800,
            40,
            32,
            8,
            49159,
            embedding_multiplier=12.0,
            attention_multiplier=0.0078125,
            residual_multiplier=0.22,
            logits_scaling=16.0,
            **TIED,
        ),
    },
    "cohere2": {
        "c4ai-command-r7b": sizes(
            4096, 14336, 32, 32, 8, 256000, sliding_window=4096, logit_scale=0.25
        ),
        "c4ai-command-a": sizes(
            12288, 36864, 64, 96, 8, 256000, sliding_window=4096, logit_scale=0.25
        ),
    },
    "glm4": {
        "GLM-4-9B-0414": sizes(
            4096,
            13696,
            40,
            32,
            2,
            151552,
            head_dim=128,
            partial_rotary_factor=0.5,
            attention_bias=True,
        ),
        "GLM-4-32B-0414": sizes(
            6144,
            23040,
            61,
            48,
            2,
            151552,
            head_dim=128,
            partial_rotary_factor=0.5,
            attention_bias=False,
        ),
    },
    "mixtral": {
        "Mixtral-8x7B": sizes(4096, 14336, 32, 32, 8, 32000, sliding_window=None),
        "Mixtral-8x22B": sizes(6144, 16384, 56, 48, 8, 32768, sliding_window=None),
    },
    "qwen3_moe": {
        "Qwen3-30B-A3B": experts(2048, 6144, 48, 32, 4, 768),
        "Qwen3-Coder-30B-A3B": experts(2048, 6144, 48, 32, 4, 768, max_position_embeddings=262144),
        "Qwen3-235B-A22B": experts(4096, 12288, 94, 64, 4, 1536),
        "Qwen3-Coder-480B-A35B": experts(6144, 8192, 62, 96, 8, 2560, num_experts=160),
    },
    "olmoe": {
        "OLMoE-1B-7B": sizes(2048, 1024, 16, 16, 16, 50304, num_experts=64, num_experts_per_tok=8)
    },
    "gpt_oss": {
        "gpt-oss-20b": sizes(2880, 2880, 24, 64, 8, 201088, head_dim=64, num_local_experts=32),
        "gpt-oss-120b": sizes(2880, 2880, 36, 64, 8, 201088, head_dim=64, num_local_experts=128),
    },
    "qwen2_moe": {
        "Qwen1.5-MoE-A2.7B": sizes(2048, 5632, 24, 16, 16, 151936, **shared(60, 4, 1408, 5632)),
        "Qwen2-57B-A14B": sizes(3584, 18944, 28, 28, 4, 151936, **shared(64, 8, 2560, 20480)),
    },
    "qwen3_next": {
        "Qwen3-Next-80B-A3B": sizes(
            2048, 5120, 48, 16, 2, 151936, head_dim=256, **shared(512, 10, 512, 512)
        ),
    },
    "glm4_moe": {
        "GLM-4.5-Air": sizes(
            4096, 10944, 46, 96, 8, 151552, head_dim=128, attention_bias=True, n_routed_experts=128
        ),
        "GLM-4.5": sizes(
            5120,
            12288,
            92,
            96,
            8,
            151552,
            head_dim=128,
            attention_bias=True,
            use_qk_norm=True,
            n_routed_experts=160,
            moe_intermediate_size=1536,
            first_k_dense_replace=3,
            routed_scaling_factor=2.5,
        ),
    },
    "qwen3_5_text": {
        "Qwen3.5-9B, its text model": sizes(4096, 12288, 32, 16, 4, 248320, head_dim=256)
    },
    "seed_oss": {"Seed-OSS-36B": sizes(5120, 27648, 64, 80, 8, 155136, head_dim=128)},
    "exaone4": {
        "EXAONE-4.0-1.2B": sizes(
            2048,
            4096,
            30,
            32,
            8,
            102400,
            head_dim=64,
            sliding_window=None,
            layer_types=["full_attention"] * 30,
            **TIED,
        ),
        "EXAONE-4.0-32B": sizes(5120, 27392, 64, 40, 8, 102400, sliding_window=4096),
    },
    "apertus": {
        "Apertus-8B": sizes(4096, 21504, 32, 32, 8, 131072),
        "Apertus-70B": sizes(8192, 43008, 80, 64, 8, 131072),
    },
    "gpt_neox": {
        "pythia-70m": pythia(512, 6, 8),
        "pythia-160m": pythia(768, 12, 12),
        "pythia-410m": pythia(1024, 24, 16),
        "pythia-1b": pythia(2048, 16, 8),
        "pythia-1.4b": pythia(2048, 24, 16),
        "pythia-2.8b": pythia(2560, 32, 32),
        "pythia-6.9b": pythia(4096, 32, 32, 50432),
        "pythia-12b": pythia(5120, 36, 40, 50688),
        "gpt-neox-20b": pythia(6144, 44, 64, 50432),
    },
    "opt": {
        "opt-125m": opt(768, 12, 12),
        "opt-350m": opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
        "opt-1.3b": opt(2048, 24, 32),
        "opt-2.7b": opt(2560, 32, 32),
        "opt-6.7b": opt(4096, 32, 32),
        "opt-13b": opt(5120, 40, 40),
        "opt-30b": opt(7168, 48, 56),
        "opt-66b": opt(9216, 64, 72),
    },
}
"""Family -> checkpoint -> the entries of its config.json beside the class's defaults."""
CASES = [(family, name) for family, every in PUBLIC.items() for name in every]
