"""Names and sizes of the small model that tests prune."""

import numpy as np

INPUTS = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}
LINEARS = [path for paths in INPUTS.values() for path in paths]


def windows(count: int = 12, length: int = 64, seed: int = 0) -> np.ndarray:
    """Random token ids of the small model's vocabulary."""
    return np.random.default_rng(seed).integers(0, 300, (count, length)).astype(np.int32)
