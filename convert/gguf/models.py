"""Which models GGUF files can hold, and how llama.cpp's converter changes their names, values and
settings.

Names of tensors are those of the gguf package's tables, of which a model takes those of its own
modules.

References:
    https://github.com/ggml-org/llama.cpp/blob/master/docs/development/HOWTO-add-model.md
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import gguf
from pydantic import Field

from convert.assets import Count, Positions, Positive, Size
from convert.errors import CheckpointError
from convert.schema import Schema


class Fields(Schema):
    """The fields that describe a model, in the order of llama.cpp's converter: under the names of
    config.json, where it has such an entry, and as aliases those of the file without the
    architecture's."""

    max_position_embeddings: Positions = Field(alias="context_length")
    hidden_size: Size = Field(alias="embedding_length")
    num_hidden_layers: Count = Field(alias="block_count")
    intermediate_size: Size | None = Field(None, alias="feed_forward_length")
    num_attention_heads: Count = Field(alias="attention.head_count")
    num_key_value_heads: Count | None = Field(None, alias="attention.head_count_kv")
    head_dim: Size | None = Field(None, alias="attention.key_length")
    value_size: Size | None = Field(None, alias="attention.value_length")
    rms_norm_eps: Positive = Field(alias="attention.layer_norm_rms_epsilon")
    rope_theta: Positive = Field(10000.0, alias="rope.freq_base")
    rope_size: Size | None = Field(None, alias="rope.dimension_count")
    rope_kind: Literal["none", "linear", "yarn"] = Field("none", alias="rope.scaling.type")
    rope_factor: Positive = Field(1.0, alias="rope.scaling.factor")
    original_context: Positions | None = Field(None, alias="rope.scaling.original_context_length")
    sliding_window: Positions | None = Field(None, alias="attention.sliding_window")
    attn_logit_softcapping: Positive | None = Field(None, alias="attn_logit_softcapping")
    final_logit_softcapping: Positive | None = Field(None, alias="final_logit_softcapping")
    attention_multiplier: Positive | None = Field(None, alias="attention.scale")
    embedding_multiplier: Positive | None = Field(None, alias="embedding_scale")
    residual_multiplier: Positive | None = Field(None, alias="residual_scale")
    logits_scaling: Positive | None = Field(None, alias="logit_scale")
    num_experts_per_tok: Count | None = Field(None, alias="expert_used_count")
    moe_intermediate_size: Size | None = Field(None, alias="expert_feed_forward_length")
    experts: Annotated[int, Field(ge=0, le=2**12)] = Field(0, alias="expert_count")

    @property
    def size_of_head(self) -> int:
        """Features of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


Entries = dict[str, Any]
ATTENTION = "input_layernorm", *(f"self_attn.{name}_proj" for name in "qkvo")
QK_NORMS = "self_attn.q_norm", "self_attn.k_norm"
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERTS = "mlp.gate", *(f"mlp.experts.{name}_proj" for name in ("gate", "up", "down"))
NORMS = tuple(
    f"{name}_layernorm" for name in ("post_attention", "pre_feedforward", "post_feedforward")
)


def _nothing(fields: Fields) -> Entries:
    return {}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that files of an architecture hold.

    Attributes:
        model_type, cls: Hugging Face's names of the model and of its class.
        arch: the gguf package's name of the architecture.
        modules: inside a layer, as in Hugging Face's checkpoints.
        entries: fields of the file -> entries of config.json that LLaMA's configuration lacks.
        permuted: whether the rows of queries and keys lie as llama.cpp rotates them, pairs side by
            side.
        offset: what is added to the weights of norms.
    """

    model_type: str
    cls: str
    arch: gguf.MODEL_ARCH
    modules: tuple[str, ...]
    entries: Callable[[Fields], Entries] = _nothing
    permuted: bool = False
    offset: float = 0.0

    def permutes(self, path: str) -> bool:
        """Returns whether the rows of a param lie as llama.cpp rotates them."""
        return self.permuted and re.search(r"\.(q|k)_proj\.", path) is not None

    def names(self) -> Mapping[str, str]:
        """Returns the name of a tensor inside a layer -> the module that it belongs to.

        A tensor's name ends in `_exps` where it holds those of all experts.
        """
        table = gguf.get_tensor_name_map(self.arch, 1)
        found = {}
        for module in self.modules:
            name = table.get_name(f"model.layers.0.{module}")
            assert name is not None, (self.arch, module)
            found[name.removeprefix("blk.0.")] = module
        return found


def _mixtral(fields: Fields) -> Entries:
    return {
        "num_local_experts": fields.experts,
        "num_experts_per_tok": fields.num_experts_per_tok,
        "sliding_window": fields.sliding_window,
    }


def _qwen3_moe(fields: Fields) -> Entries:
    return {
        "num_experts": fields.experts,
        "num_experts_per_tok": fields.num_experts_per_tok,
        "moe_intermediate_size": fields.moe_intermediate_size or fields.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(fields: Fields) -> Entries:
    """Of the largest of both families, llama.cpp takes the scale of scores from the width of a
    head's share."""
    width = fields.size_of_head
    if fields.num_hidden_layers in (46, 62):
        width = fields.hidden_size // fields.num_attention_heads
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": fields.sliding_window,
        "query_pre_attn_scalar": width,
        "attn_logit_softcapping": fields.attn_logit_softcapping,
        "final_logit_softcapping": fields.final_logit_softcapping,
    }


def _gemma3(fields: Fields) -> Entries:
    return _gemma(fields) | {"rope_local_base_freq": 10000.0}


def _phi3(fields: Fields) -> Entries:
    share = (fields.rope_size or fields.size_of_head) / fields.size_of_head
    return {
        "sliding_window": fields.sliding_window,
        "partial_rotary_factor": share,
        "pad_token_id": None,
    }


def _granite(fields: Fields) -> Entries:
    return {
        "attention_multiplier": fields.attention_multiplier or fields.size_of_head**-0.5,
        "embedding_multiplier": fields.embedding_multiplier or 1.0,
        "residual_multiplier": fields.residual_multiplier or 1.0,
        "logits_scaling": fields.logits_scaling or 1.0,
    }


ARCH = gguf.MODEL_ARCH
LLAMA = *ATTENTION, NORMS[0], *MLP
MODELS: Mapping[str, Model] = {
    "llama": Model("llama", "LlamaForCausalLM", ARCH.LLAMA, LLAMA, permuted=True),
    "qwen2": Model("qwen2", "Qwen2ForCausalLM", ARCH.QWEN2, LLAMA),
    "qwen3": Model("qwen3", "Qwen3ForCausalLM", ARCH.QWEN3, (*LLAMA, *QK_NORMS)),
    "qwen3moe": Model(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        ARCH.QWEN3MOE,
        (*ATTENTION, *QK_NORMS, NORMS[0], *EXPERTS),
        _qwen3_moe,
    ),
    "gemma2": Model(
        "gemma2", "Gemma2ForCausalLM", ARCH.GEMMA2, (*ATTENTION, *NORMS, *MLP), _gemma, offset=1.0
    ),
    "gemma3": Model(
        "gemma3_text",
        "Gemma3ForCausalLM",
        ARCH.GEMMA3,
        (*ATTENTION, *QK_NORMS, *NORMS, *MLP),
        _gemma3,
        offset=1.0,
    ),
    "phi3": Model(
        "phi3",
        "Phi3ForCausalLM",
        ARCH.PHI3,
        (
            "input_layernorm",
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            NORMS[0],
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ),
        _phi3,
    ),
    "olmo2": Model(
        "olmo2",
        "Olmo2ForCausalLM",
        ARCH.OLMO2,
        (*ATTENTION[1:], *QK_NORMS, NORMS[0], NORMS[2], *MLP),
    ),
    "granite": Model("granite", "GraniteForCausalLM", ARCH.GRANITE, LLAMA, _granite, permuted=True),
    "smollm3": Model("smollm3", "SmolLM3ForCausalLM", ARCH.SMOLLM3, LLAMA, permuted=True),
}
"""Architecture, as a file calls it -> its model."""
MIXTRAL = Model(
    "mixtral",
    "MixtralForCausalLM",
    ARCH.LLAMA,
    (
        *ATTENTION,
        NORMS[0],
        "block_sparse_moe.gate",
        *(f"block_sparse_moe.experts.w{number}" for number in (1, 2, 3)),
    ),
    _mixtral,
    permuted=True,
)
"""What a file of a llama model with experts holds."""


def model_of(architecture: object, experts: int | None, path: Any) -> Model:
    """Returns the model of a file's architecture.

    Raises:
        CheckpointError: none that can be read.
    """
    if architecture not in MODELS:
        known = f"one of {', '.join(MODELS)}"
        raise CheckpointError(
            "GGUF files of this architecture cannot be read",
            file=path,
            found=architecture,
            wanted=known,
        )
    model = MIXTRAL if architecture == "llama" and experts else MODELS[str(architecture)]
    if experts and "_exps" not in "".join(model.names()):
        raise CheckpointError(
            f"GGUF files of {architecture} with experts cannot be read", file=path
        )
    return model


def of_type(model_type: str, path: Any) -> Model:
    """Returns the model of a checkpoint's type.

    Raises:
        CheckpointError: none that can be written.
    """
    known = {model.model_type: model for model in (*MODELS.values(), MIXTRAL)}
    if model_type not in known:
        raise CheckpointError(
            "GGUF files of this model cannot be written",
            file=path,
            found=model_type,
            wanted=", ".join(known),
        )
    return known[model_type]
