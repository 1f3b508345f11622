"""Tiny random checkpoints of every model family, with a variant for what its configurations can
say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.names import expert_path
from tests.helpers import tiny
from tests.helpers.optional import torch

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
WINDOW = {"sliding_window": 20}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
ALTERNATING = {**WINDOW, "layer_types": TYPES}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 4.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
STRETCHED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
EXPERTS = {
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
SCORED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.8,
    "head_dim": 8,
}
DELTA = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}
VARIANTS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "llama": {"plain": {}},
    "mistral": {
        "window": WINDOW,
        "full": {"sliding_window": None},
        "head_dim": {**WINDOW, "head_dim": 16},
    },
    "qwen2": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "window": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    },
    "qwen3": {"plain": {"head_dim": 16}, "bias": {"attention_bias": True, "head_dim": 8}},
    "gemma2": {
        "plain": {
            **ALTERNATING,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
        "no caps": {
            **ALTERNATING,
            "head_dim": 8,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
        },
    },
    "gemma3_text": {
        "plain": {
            **ALTERNATING,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
        "scaled": {
            **ALTERNATING,
            "head_dim": 8,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    },
    "phi3": {
        "window": WINDOW,
        "plain": {"sliding_window": None},
        "long": {**WINDOW, "rope_parameters": LONG, "original_max_position_embeddings": 64},
        "tied": {"tie_word_embeddings": True, "sliding_window": None},
    },
    "olmo2": {"plain": {}, "bias": {"attention_bias": True}},
    "olmo3": {"plain": ALTERNATING},
    "smollm3": {
        "plain": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
        "window": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, **WINDOW},
    },
    "granite": {
        "plain": {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        }
    },
    "cohere2": {
        "plain": {**ALTERNATING, "logit_scale": 0.5, "tie_word_embeddings": True},
        "bias": {**ALTERNATING, "attention_bias": True},
    },
    "gpt_neox": {
        "plain": {},
        "in turn": {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
        },
        "whole": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            }
        },
    },
    "opt": {
        "plain": {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
        "350m": {
            "ffn_dim": 48,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
            "tie_word_embeddings": True,
        },
        "no bias": {"ffn_dim": 48, "word_embed_proj_dim": 32, "enable_bias": False},
    },
    "seed_oss": {
        "plain": {"head_dim": 16},
        "output bias": {"head_dim": 8, "attention_out_bias": True},
    },
    "exaone4": {
        "plain": ALTERNATING,
        "whole": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    },
    "ministral3": {
        "plain": {"head_dim": 16, "rope_parameters": STRETCHED},
        "window": {**WINDOW, "head_dim": 8},
    },
    "apertus": {"plain": {}},
    "mixtral": {"plain": EXPERTS, "window": {**EXPERTS, **WINDOW, "num_local_experts": 3}},
    "qwen3_moe": {
        "mixed": {**EXPERTS, "head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
        "shares": {**EXPERTS, "head_dim": 8, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    },
    "qwen2_moe": {
        "mixed": {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
        "window": {
            **EXPERTS,
            "shared_expert_intermediate_size": 8,
            "use_sliding_window": True,
            **ALTERNATING,
        },
    },
    "glm4_moe": {
        "plain": {**SCORED, "use_qk_norm": True, "attention_bias": True},
        "two shared": {
            **SCORED,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
        },
    },
    "qwen3_next": {
        "plain": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 40, "norm_topk_prob": True}
    },
    "olmoe": {"plain": EXPERTS, "normalized": {**EXPERTS, "norm_topk_prob": True}},
    "gpt_oss": {"plain": {**EXPERTS, **ALTERNATING, "head_dim": 16, "rope_parameters": YARN}},
    "qwen3_5_text": {
        "tied": {**DELTA, "linear_num_value_heads": 2, "tie_word_embeddings": True},
        "shared heads": DELTA,
    },
    "glm4": {"plain": {"head_dim": 16, "attention_bias": True}, "no bias": {"head_dim": 8}},
}
"""Family -> variant -> what its configuration says beside `SIZES`."""
CASES = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]


def config(family: str, variant: str, **changes: Any) -> Any:
    """A configuration of transformers' class."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**SIZES, **VARIANTS[family][variant], **changes})


def model(config: Any, seed: int = 0) -> Any:
    """A random model of transformers', every parameter of which matters: norms and biases are not
    neutral."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        corrections = (
            buffer for name, buffer in made.named_buffers() if name.endswith("correction_bias")
        )
        for parameter in (*made.parameters(), *corrections):
            parameter.copy_(parameter * (parameter.dim() == 1) + 0.3 * torch.randn_like(parameter))
    return made


class Squares(torch.overrides.TorchFunctionMode if torch else object):  # type: ignore[misc]
    """While it is entered, watches the products with the kernels of a model's layers.

    Attributes:
        squares: of each linear layer, as jaxprune calls it, the squared gradients by its outputs,
            summed over tokens, once a backward pass is through.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.squares: dict[str, np.ndarray] = {}
        self._names: dict[int, list[str]] = {}
        self._cast: list[Any] = []
        for name, parameter in model.named_parameters():
            path = name.partition("layers.")[2].removesuffix(".weight")
            if parameter.dim() < 2 or not path:
                continue
            parts = linears(path, model.config.model_type)
            self._names[parameter.data_ptr()] = parts
            if parameter.dim() == 3:
                for expert, kernel in enumerate(parameter):
                    self._names[kernel.data_ptr()] = [expert_path(part, expert) for part in parts]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # a router's kernel, in float32
        if func is torch.Tensor.type and args[0].data_ptr() in self._names:
            self._cast.append(result)  # which keeps its place in memory
            self._names[result.data_ptr()] = self._names[args[0].data_ptr()]
        products = torch.nn.functional.linear, torch.Tensor.matmul, torch.Tensor.__matmul__
        if func in products and (names := self._names.get(args[1].data_ptr())):
            result.register_hook(lambda gradient: self._keep(names, gradient))
        return result

    def _keep(self, names: list[str], gradient: Any) -> None:
        square = gradient.square().flatten(0, -2).sum(0).numpy()
        self.squares.update(zip(names, np.split(square, len(names)), strict=True))


def linears(path: str, family: str) -> list[str]:
    """The linear layers of a kernel of transformers' module, as checkpoints call them."""
    fused = path.endswith("experts.gate_up_proj") and family != "gpt_oss"
    parts = (
        [path.replace("gate_up_proj", one) for one in ("gate_proj", "up_proj")] if fused else [path]
    )
    if family == "mixtral":
        for theirs, ours in {
            "mlp": "block_sparse_moe",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
        }.items():
            parts = [part.replace(theirs, ours) for part in parts]
    return parts


def save(folder: Path, config: Any, seed: int = 0, dtype: str = "float32") -> Any:
    """Saves such a model with a tokenizer; returns it."""
    made = model(config, seed).to(getattr(torch, dtype))
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return made
