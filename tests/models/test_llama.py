"""The Flax model against transformers' LlamaForCausalLM, whole and by submodule, in float32."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import InputError, load
from jaxprune.models.common.attention import causal_attention
from jaxprune.models.common.rope import Rope
from tests.helpers import tiny
from tests.helpers.logits import logits
from tests.helpers.optional import needs_torch, torch

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 16},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "relu squared": {"hidden_act": "relu2"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "dynamic short": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {"rope_parameters": YARN},
    "yarn options": {
        "rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 0.8}
    },
    "yarn mscale": {
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}
    },
}


@needs_torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    config = tiny.config(**VARIANTS[variant])
    reference = tiny.model(config)
    tiny.save(tmp_path, config)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 100))
    with torch.no_grad():  # in float64, for both float32 results differ from it by rounding
        expected = reference.double()(torch.tensor(tokens), output_hidden_states=True)
    model = load(tmp_path)
    found, states = logits(model, tokens)
    for mine, theirs in zip(states[:-1], expected.hidden_states[:-1], strict=True):
        # States up to 134, by squared ReLU, are 1.5e-4 from float64's in torch's float32 too.
        atol = max(1e-4, 1.5e-6 * float(theirs.abs().max()))
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-5, atol=atol)
    assert np.abs(found - expected.logits.numpy()).max() < 1e-4


@needs_torch
def test_dynamic_rope_beyond_the_trained_context(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = tiny.config(max_position_embeddings=64, rope_parameters=rope)
    reference = tiny.model(config)
    tiny.save(tmp_path, config)
    tokens = np.random.default_rng(0).integers(0, 300, (1, 100))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    found, _ = logits(load(tmp_path), tokens)
    assert np.abs(found - expected).max() < 1e-4


def test_configurations_of_transformers_4_are_understood(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}
    tiny.save(tmp_path, tiny.config(rope_parameters=rope))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    old = {
        "rope_theta": 20000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "float32",
    }
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_bytes(
        (tmp_path / "model.safetensors").read_bytes()
    )
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | old))
    new, read = (load(p).architecture.config for p in (tmp_path, tmp_path / "old"))
    ropes = [config.kinds[0].rope for config in (new, read)]
    np.testing.assert_array_equal(*(rope.inverse_frequencies(8)[0] for rope in ropes))


@needs_torch
def test_submodules_and_captures_are_those_of_transformers(checkpoint: Path) -> None:
    streamed = load(checkpoint)
    part, reader = streamed.architecture.layers[1], streamed.reader
    reference = tiny.model(tiny.config())
    layer = reference.model.layers[1]
    inputs: dict[str, np.ndarray] = {}
    outputs: dict[str, np.ndarray] = {}
    for name, module in layer.named_modules():

        def hook(module: Any, args: tuple, kwargs: dict, result: Any, name: str = name) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            inputs[name] = value.detach().numpy()
            outputs[name] = (result[0] if isinstance(result, tuple) else result).detach().numpy()

        module.register_forward_hook(hook, with_kwargs=True)
    tokens = np.random.default_rng(1).integers(0, 300, (2, 50))
    with torch.no_grad():
        reference(torch.tensor(tokens))
    params = {p: reader.read([f"layers.1.{p}"])[f"layers.1.{p}"] for p in part.spec}
    _, captures = part(jax.device_put(params), jnp.asarray(inputs["input_layernorm"]))
    for capture, linears in part.inputs.items():
        for linear in linears:
            np.testing.assert_allclose(captures[capture], inputs[linear], atol=2e-5)
            np.testing.assert_allclose(
                captures[capture] @ params[f"{linear}.kernel"], outputs[linear], atol=1e-4
            )
    np.testing.assert_allclose(captures["attention_input"], outputs["input_layernorm"], atol=1e-5)
    np.testing.assert_allclose(
        captures["mlp_input"], outputs["post_attention_layernorm"], atol=1e-5
    )


# The last one has segments of several blocks.
@pytest.mark.parametrize("length", [64, 65, 256, 257, 300, 512, 700, 4200])
def test_attention_in_blocks_is_attention(length: int) -> None:
    generator = np.random.default_rng(0)
    # all pairs of tokens take 70 MB a head
    windows, heads = (1, (2, 1, 1)) if length > 1000 else (2, (4, 2, 2))
    q, k, v = (
        jnp.asarray(generator.normal(size=(windows, length, h, 8)), jnp.float32) for h in heads
    )
    expected = jax.jit(partial(jax.nn.dot_product_attention, is_causal=True))(q, k, v)
    np.testing.assert_allclose(jax.jit(causal_attention)(q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "window", "dtype", "atol"),
    [
        (64, None, jnp.float32, 2e-5),
        (65, 20, jnp.float32, 2e-5),
        (700, None, jnp.float32, 2e-5),
        (700, 100, jnp.float32, 2e-5),
        (4200, None, jnp.float32, 2e-5),
        (700, None, jnp.bfloat16, 0.05),
        (700, 100, jnp.float16, 0.008),
    ],
)
def test_attention_in_blocks_has_the_gradients_of_attention(
    length: int, window: int | None, dtype: type, atol: float
) -> None:
    generator = np.random.default_rng(0)
    heads = (2, 1, 1, 2) if length > 1000 else (4, 2, 2, 4)
    q, k, v, cotangent = (
        jnp.asarray(generator.normal(size=(1, length, h, 8)), dtype) for h in heads
    )
    local = None if window is None else (window - 1, 0)
    plain = partial(jax.nn.dot_product_attention, is_causal=True, local_window_size=local)
    exact = [x.astype(jnp.float32) for x in (q, k, v, cotangent)]
    expected = jax.jit(lambda *qkv: jax.vjp(plain, *qkv)[1](exact[3]))(*exact[:3])
    found = jax.jit(
        lambda: jax.vjp(partial(causal_attention, window=window), q, k, v)[1](cotangent)
    )()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=atol)


def test_attention_memory_grows_with_the_window_not_its_square() -> None:
    def bytes_at(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 8, 16), jnp.float32)
        return (
            jax.jit(causal_attention).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
        )

    assert bytes_at(8192) < 8 * 8192 * 8192 * 4 / 10
    assert bytes_at(8192) < 2.5 * bytes_at(4096)


def test_norms_are_float32_inside_a_16_bit_model(checkpoint: Path) -> None:
    model = load(checkpoint, dtype=jnp.bfloat16).architecture
    layer = model.layers[0]
    text = str(jax.make_jaxpr(layer)(layer.spec, jax.ShapeDtypeStruct((1, 8, 32), jnp.bfloat16)))
    assert text.count("rsqrt") == 2
    assert all(":f32[" in line for line in text.splitlines() if "rsqrt" in line)


def test_what_is_not_implemented_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'proportional' is not implemented"):
        Rope.from_hf({"rope_type": "proportional"}, 8, 64)
    with pytest.raises(InputError, match="short_factor must have 4 entries, not 1"):
        long = {
            "short_factor": [1.0],
            "long_factor": [1.0] * 4,
            "original_max_position_embeddings": 32,
        }
        Rope.from_hf({"rope_type": "longrope", "rope_theta": 1e4, **long}, 8, 64)
    with pytest.raises(InputError, match="needs factor"):
        Rope.from_hf({"rope_type": "linear", "rope_theta": 1e4}, 8, 64)
    with pytest.raises(InputError, match="partial_rotary_factor"):
        Rope.from_hf(
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, 8, 64
        )
    tiny.save(tmp_path, tiny.config(hidden_act="tanh"))
    with pytest.raises(InputError, match="activation 'tanh'"):
        load(tmp_path)
