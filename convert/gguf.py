"""GGUF files, the format of llama.cpp: read only, dequantized to float32 by the gguf package, without torch.

The tensors are those that transformers loads from the same file, bit for bit.

References:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from convert import CheckpointError, Params, Spec, parts

MODULES = {
    "attn_norm": "input_layernorm.scale",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm.scale",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {
    "token_embd.weight": "embed_tokens.embedding",
    "output_norm.weight": "norm.scale",
    "output.weight": "lm_head.kernel",
}
TOKENIZER_FIELDS = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
    "add_prefix_space": "add_space_prefix",
}
MOST = 2**22
"""Elements of an array in a header; vocabularies and their merges have a tenth of it."""
# llama.cpp stores the frequency factors of Llama 3's rope, which the configuration of the model describes.
ROPE_FACTORS = "rope_freqs.weight"


class Reader:
    """Reads a GGUF file of a LLaMA model; every parameter comes as float32.

    Args:
        path: the .gguf file.

    Raises:
        CheckpointError: the file is damaged, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _refusing(path):
            self._open(path)

    def _open(self, path: Path) -> None:
        reader = _Bounded(path)
        self._fields = reader.fields
        self._tensors: dict[str, Any] = {}
        self.spec: Spec = {}
        if (architecture := self._field("general.architecture")) != "llama":
            raise CheckpointError(f"{path} holds a {architecture!r} model; only GGUF files of llama models can be read")
        unknown = []
        for tensor in reader.tensors:
            if tensor.name == ROPE_FACTORS:
                self._tensors[ROPE_FACTORS] = tensor
                continue
            flax = _flax_path(tensor.name)
            if flax is None:
                unknown.append(tensor.name)
                continue
            shape = tuple(int(size) for size in tensor.shape)  # ggml lists the fastest axis first: [in, out]
            self._tensors[flax] = tensor
            self.spec[flax] = jax.ShapeDtypeStruct(shape[::-1] if flax.endswith(".embedding") else shape, np.float32)
        if unknown:
            raise CheckpointError(f"{path} has tensors that no llama model has: {', '.join(unknown[:8])}")
        self.spec = {p: self.spec[p] for paths in parts(self.spec).values() for p in paths}
        self._hf_config = self._config()

    @staticmethod
    def accepts(path: Path) -> bool:
        return path.is_file() and path.suffix == ".gguf"

    def read(self, paths: Iterable[str]) -> Params:
        with _refusing(self._path):
            return self._read(paths)

    def _read(self, paths: Iterable[str]) -> Params:
        params = {}
        for path in paths:
            tensor = self._tensors[path]
            try:
                array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
            except NotImplementedError as error:
                kind = tensor.tensor_type.name
                raise CheckpointError(
                    f"{self._path} stores {tensor.name} as {kind}, which the gguf package cannot dequantize: take a "
                    "file of another quantization"
                ) from error
            array = array.reshape([int(size) for size in tensor.shape[::-1]])
            if re.search(r"\.(q|k)_proj\.", path):
                array = _unpermute(array, self._heads(path))
            params[path] = array.T if path.endswith(".kernel") else array
        return params

    @property
    def files(self) -> list[Path]:
        return [self._path]

    @cached_property
    def assets(self) -> Path:
        """A temporary folder with the configuration and the tokenizer that the file holds."""
        folder = Path(tempfile.mkdtemp(prefix="jaxprune-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        (folder / "config.json").write_text(json.dumps(self._hf_config, indent=2) + "\n")
        if "tokenizer.ggml.model" in self._fields:
            with _refusing(self._path):
                self._save_tokenizer(folder)
        return folder

    def _save_tokenizer(self, folder: Path) -> None:
        """Builds the tokenizer as transformers does, but from fields read here: its own reader of GGUF needs torch."""
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf import convert_gguf_tokenizer

        found = {name: self._field(f"tokenizer.ggml.{field}") for name, field in TOKENIZER_FIELDS.items()}
        fields = {name: value for name, value in found.items() if value is not None}
        special = {
            f"{name}_token": fields["tokens"][fields[f"{name}_token_id"]]
            for name in ("bos", "eos", "unk", "pad")
            if f"{name}_token_id" in fields
        }
        backend, _ = convert_gguf_tokenizer("llama", fields)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=self._field("tokenizer.chat_template"),
            # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
            add_bos_token=self._field("tokenizer.ggml.add_bos_token", fields["tokenizer_type"] == "llama"),
            add_eos_token=self._field("tokenizer.ggml.add_eos_token", False),
            **special,
        )
        tokenizer.save_pretrained(folder)
        # transformers 4 does not know the class name that transformers 5 writes; both know this one.
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        file.write_text(json.dumps(settings, indent=2) + "\n")

    def _field(self, name: str, default: Any = None) -> Any:
        return self._fields[name].contents() if name in self._fields else default

    def _heads(self, path: str) -> int:
        heads = self._field("llama.attention.head_count")
        return heads if ".q_proj." in path else self._field("llama.attention.head_count_kv", heads)

    def _config(self) -> dict[str, Any]:
        def need(name: str) -> Any:
            value = self._field(f"llama.{name}")
            if value is None:
                raise CheckpointError(f"{self._path} lacks llama.{name}: fetch it again")
            return value

        hidden, heads = need("embedding_length"), need("attention.head_count")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "vocab_size": self.spec["embed_tokens.embedding"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": need("feed_forward_length"),
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv", heads),
            "head_dim": self._field("llama.attention.key_length", hidden // heads),
            "max_position_embeddings": need("context_length"),
            # Stored as float32; the shortest decimal that rounds to it is what the model's authors wrote.
            "rms_norm_eps": float(str(np.float32(need("attention.layer_norm_rms_epsilon")))),
            "hidden_act": "silu",
            "attention_bias": "layers.0.self_attn.q_proj.bias" in self.spec,
            "mlp_bias": "layers.0.mlp.up_proj.bias" in self.spec,
            "tie_word_embeddings": "lm_head.kernel" not in self.spec,
            "rope_parameters": self._rope(),
        }
        for name in ("bos", "eos"):
            config[f"{name}_token_id"] = self._field(f"tokenizer.ggml.{name}_token_id")
        config["pad_token_id"] = self._field("tokenizer.ggml.padding_token_id")
        return config

    def _rope(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": self._field("llama.rope.freq_base", 10000.0), "rope_type": "default"}
        kind = self._field("llama.rope.scaling.type", "none")
        if ROPE_FACTORS in self._tensors:
            factors = np.asarray(self._tensors[ROPE_FACTORS].data, np.float32).reshape(-1)
            # The file has the outcome, not the recipe: all published Llama 3 models use this one but for its factor.
            rope |= {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            if not np.allclose(factors, _llama3_factors(len(factors), rope), rtol=1e-3):
                raise CheckpointError(
                    f"{self._path} has rope factors that are not Llama 3's; use the original checkpoint"
                )
        elif kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": self._field("llama.rope.scaling.factor", 1.0)}
            if kind == "yarn":
                rope["original_max_position_embeddings"] = self._field("llama.rope.scaling.original_context_length")
        elif kind != "none":
            raise CheckpointError(f"{self._path} scales its rope by {kind!r}, which is not implemented")
        return rope


class _Bounded(gguf.GGUFReader):
    """The package's reader, which believes any length that a damaged file gives: it would loop for days."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, *args: Any, **options: Any) -> Any:
        if not 0 <= offset <= offset + int(count) * np.dtype(dtype).itemsize <= len(self.data):
            raise ValueError("it ends too early")
        return super()._get(offset, dtype, count, *args, **options)

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY and (length := int(self._get(orig_offs + 4, np.uint64)[0])) > MOST:
            raise ValueError(f"an array of {length} elements")
        return super()._get_field_parts(orig_offs, raw_type)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file makes the gguf and tokenizers packages raise into one kind of error."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error)[:200] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no GGUF file ({reason}): fetch it again") from error


def _flax_path(name: str) -> str | None:
    if name in TOP:
        return TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in MODULES:
        return None
    module = MODULES[match[2]]
    if module.endswith(".scale"):
        return f"layers.{match[1]}.{module}" if match[3] == "weight" else None
    return f"layers.{match[1]}.{module}." + ("kernel" if match[3] == "weight" else "bias")


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from llama.cpp's order (pairs side by side) to Hugging Face's (halves)."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _llama3_factors(count: int, rope: dict[str, Any]) -> np.ndarray:
    """What llama.cpp divides the rotary frequencies by, for rope type llama3."""
    inverse = rope["rope_theta"] ** -(np.arange(count) / count)
    rotations = rope["original_max_position_embeddings"] * inverse / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return 1 / (keep + (1 - keep) / rope["factor"])
