"""GGUF files, the format of llama.cpp, read: dequantized to float32 by the gguf package, without
torch.

The tensors are those that transformers loads from the same file, bit for bit.

References:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from jaxtyping import Float
from pydantic import Field, model_validator

from convert.assets import DecoderConfig
from convert.checkpoint import Params, Spec, transposed
from convert.consistency import ordered
from convert.errors import CheckpointError, DamagedError, joined, reason
from convert.gguf import models, settings
from convert.gguf.header import Header, Tensor
from convert.gguf.models import Fields
from convert.names import expert_path
from convert.schema import Schema, check
from convert.writing import write_json

TOP = {
    "token_embd.weight": "embed_tokens.embedding",
    "output_norm.weight": "norm.scale",
    "output.weight": "lm_head.kernel",
}
# llama.cpp stores the frequency factors of Llama 3's rope, which the configuration of the model
# describes.
ROPE_FACTORS = "rope_freqs.weight"
PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(jnp.bfloat16),
}
"""Types whose numbers are those of a dtype."""
S = TypeVar("S", bound=Schema)
TokenId = Annotated[int, Field(ge=0, lt=2**22)]


class _Tokenizer(Schema):
    """The fields of the tokenizer, without `tokenizer.ggml.`; arrays that go with the tokens have
    their length."""

    model: str
    pre: str | None = None
    tokens: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(min_length=1)]
    scores: list[float] | None = None
    token_type: list[int] | None = None
    merges: list[Annotated[str, Field(max_length=2048)]] | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None
    unknown_token_id: TokenId | None = None
    padding_token_id: TokenId | None = None
    add_space_prefix: bool | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> "_Tokenizer":
        for name in ("scores", "token_type"):
            found = getattr(self, name)
            if found is not None and len(found) != len(self.tokens):
                raise ValueError(f"as many {name} as tokens, {len(self.tokens)}")
        if self.scores is None and self.merges is None:
            raise ValueError("scores or merges")
        for name in ("bos", "eos", "unknown", "padding"):
            found = getattr(self, f"{name}_token_id")
            if found is not None and found >= len(self.tokens):
                raise ValueError(f"{name}_token_id to be one of {len(self.tokens)} tokens")
        return self


RENAMED = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
    "add_space_prefix": "add_prefix_space",
}
"""Fields that transformers' own reader calls otherwise."""


class Reader:
    """Reads a GGUF file; every parameter comes as float32.

    Args:
        path: the .gguf file.

    Attributes:
        config: the content of a config.json that says what the file says.

    Raises:
        CheckpointError: the file is damaged, or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.files, self._header = path, [path], Header(path)
        architecture = self._header.get("general.architecture")
        prefix = f"{architecture}."
        experts = self._header.get(f"{prefix}expert_count")
        self._model = models.model_of(architecture, experts, path)
        self._of = self._fields(Fields, prefix)
        self._names = self._model.names()
        self._tensors: dict[str, tuple[Tensor, int | None]] = {}
        self._factors: Tensor | None = None
        spec: Spec = {}
        unknown = []
        for tensor in self._header.tensors:
            if tensor.name == ROPE_FACTORS and self._model.model_type == "llama":
                self._factors = tensor
                continue
            found = list(self._paths(tensor))
            if not found:
                unknown.append(tensor.name)
            for flax, expert in found:
                self._tensors[flax] = tensor, expert
                spec[flax] = jax.ShapeDtypeStruct(self._shape(flax, tensor, expert), np.float32)
        if unknown:
            raise CheckpointError(
                f"no {self._model.model_type} model has such tensors: {joined(unknown)}", file=path
            )
        if "embed_tokens.embedding" not in spec:
            raise DamagedError("a tensor is missing", file=path, entry="token_embd.weight")
        self.spec = ordered(spec, path)
        self.config = self._config()
        self._tokenizer = (
            self._tokenizer_fields() if "tokenizer.ggml.model" in self._header else None
        )

    @staticmethod
    def accepts(path: Path) -> bool:
        return path.suffix == ".gguf" and not path.is_dir()

    def read(self, paths: Iterable[str]) -> Params:
        params: Params = {}
        # those of all experts, of which each is dequantized once
        tensors: dict[str, np.ndarray] = {}
        for path in paths:
            tensor, expert = self._tensors[path]
            if expert is None:
                array = self._dequantized(tensor)
            else:
                if tensor.name not in tensors:
                    tensors[tensor.name] = self._dequantized(tensor)
                array = tensors[tensor.name][expert]
            if self._model.permutes(path):
                # from llama.cpp's order of a head's rows, pairs side by side, to halves
                pairs = array.reshape(self._heads(path), -1, 2, *array.shape[1:])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
            params[path] = from_file(self._model, path, array)
        return params

    def held(self, path: str, array: np.ndarray) -> Float[np.ndarray, "..."]:
        """Returns what the file would hold of a param, in the type that it has for it.

        Raises:
            CheckpointError: only llama.cpp rounds to that type.
        """
        tensor = self._tensors[path][0]
        rows = np.ascontiguousarray(to_file(self._model, path, array))
        try:
            rounded = gguf.dequantize(gguf.quantize(rows, tensor.kind), tensor.kind).reshape(
                rows.shape
            )
        except NotImplementedError as error:
            raise CheckpointError(
                f"nothing but llama.cpp rounds to {tensor.kind.name}, so it cannot be compared",
                file=self._path,
                entry=tensor.name,
            ) from error
        return from_file(self._model, path, rounded)

    @property
    def save_dtype(self) -> np.dtype:
        """The dtype of most weights, in which results are stored; float16 for quantized weights."""
        sizes: Counter[GGMLQuantizationType] = Counter()
        for tensor in self._header.tensors:
            sizes[tensor.kind] += math.prod(tensor.shape)
        return PLAIN.get(max(sizes, key=lambda kind: sizes[kind]), np.dtype(np.float16))

    def _paths(self, tensor: Tensor) -> Iterator[tuple[str, int | None]]:
        """Yields the params that a tensor holds, with the index of the expert; none where no model
        has it."""
        if tensor.name in TOP:
            yield TOP[tensor.name], None
            return
        match = re.fullmatch(r"blk\.([0-9]{1,4})\.(\w+)\.(weight|bias)", tensor.name)
        module = self._names.get(match[2]) if match else None
        if match is None or module is None:
            return
        if match[2].endswith("_exps"):
            for expert in range(self._of.experts if match[3] == "weight" else 0):
                yield f"layers.{match[1]}.{expert_path(module, expert)}.kernel", expert
        elif match[3] == "weight":
            leaf = "scale" if module.endswith("norm") else "kernel"
            yield f"layers.{match[1]}.{module}.{leaf}", None
        elif not module.endswith("norm"):
            yield f"layers.{match[1]}.{module}.bias", None

    def _dequantized(self, tensor: Tensor) -> np.ndarray:
        try:
            return tensor.dequantize(self._path)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{tensor.kind.name} cannot be dequantized by the gguf package: take a file of "
                "another quantization",
                file=self._path,
                entry=tensor.name,
            ) from error
        except OSError as error:
            raise DamagedError(f"it cannot be read ({error.strerror})", file=self._path) from error

    def _shape(self, flax: str, tensor: Tensor, expert: int | None) -> tuple[int, ...]:
        """Returns the shape that a param has: of kernels and embeddings two axes, of all else
        one."""
        shape = tensor.shape  # ggml lists the fastest axis first: [in, out], or [in, out, experts]
        if expert is not None:
            if len(shape) != 3 or shape[2] != self._of.experts:
                problem = f"a tensor of {self._of.experts} experts has another shape"
                raise DamagedError(problem, file=self._path, entry=tensor.name, found=list(shape))
            shape = shape[:2]
        wanted = 2 if flax.endswith((".kernel", ".embedding")) else 1
        if len(shape) != wanted:
            problem = f"a tensor of {wanted} axes has {len(shape)}"
            raise DamagedError(problem, file=self._path, entry=tensor.name, found=list(shape))
        if self._model.permutes(flax) and shape[-1] % (2 * self._heads(flax)):
            raise DamagedError(
                "its rows are not whole heads",
                file=self._path,
                entry=tensor.name,
                found=list(shape),
                wanted=f"a multiple of {2 * self._heads(flax)} rows",
            )
        return shape[::-1] if flax.endswith(".embedding") else shape

    @cached_property
    def assets(self) -> Path:
        """A temporary folder with the configuration and the tokenizer that the file holds."""
        folder = Path(tempfile.mkdtemp(prefix="jaxprune-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        write_json(folder / "config.json", self.config)
        if self._tokenizer is not None:
            self._save_tokenizer(folder, self._tokenizer)
        return folder

    def _tokenizer_fields(self) -> _Tokenizer:
        found = self._fields(_Tokenizer, "tokenizer.ggml.")
        if len(found.tokens) > (size := self.spec["embed_tokens.embedding"].shape[0]):
            entry, wanted = "tokenizer.ggml.tokens", f"at most the model's vocabulary of {size}"
            raise DamagedError(
                "more tokens than embeddings", file=self._path, entry=entry, wanted=wanted
            )
        return found

    def _save_tokenizer(self, folder: Path, found: _Tokenizer) -> None:
        """Builds the tokenizer as transformers does, but from fields read here: its own reader of
        GGUF needs torch."""
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf import convert_gguf_tokenizer

        fields = {RENAMED.get(name, name): value for name, value in found if value is not None}
        special = {
            f"{name}_token": found.tokens[fields[f"{name}_token_id"]]
            for name in ("bos", "eos", "unk", "pad")
            if f"{name}_token_id" in fields
        }
        add_bos, add_eos = (fields.pop(f"add_{name}_token", None) for name in ("bos", "eos"))
        try:
            backend, _ = convert_gguf_tokenizer("llama", fields)
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=backend,
                chat_template=self._header.get("tokenizer.chat_template"),
                # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
                add_bos_token=found.model == "llama" if add_bos is None else add_bos,
                add_eos_token=bool(add_eos),
                **special,
            )
            tokenizer.save_pretrained(folder)
        except BaseException as error:  # tokenizers raises anything
            problem = f"its tokenizer cannot be read ({reason(error)})"
            raise DamagedError(problem, file=self._path) from error
        # transformers 4 does not know the class name that transformers 5 writes; both know this
        # one. By default that class has token types in transformers 4.
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
        }
        write_json(file, settings)

    def _fields(self, schema: type[S], prefix: str) -> S:
        """Returns the fields of a schema that are there, under their names after the prefix."""
        names = [field.alias or name for name, field in schema.model_fields.items()]
        found = {
            name: self._header.get(prefix + name) for name in names if prefix + name in self._header
        }
        return check(schema, found, file=self._path, entry=prefix.rstrip("."))

    def _heads(self, path: str) -> int:
        of = self._of
        grouped = None if ".q_proj." in path else of.num_key_value_heads
        return grouped or of.num_attention_heads

    def _config(self) -> dict[str, Any]:
        of = self._of
        config = {
            "architectures": [self._model.cls],
            "model_type": self._model.model_type,
            "dtype": "float32",
            "vocab_size": self.spec["embed_tokens.embedding"].shape[0],
            "hidden_size": of.hidden_size,
            "intermediate_size": of.intermediate_size or of.moe_intermediate_size,
            "num_hidden_layers": of.num_hidden_layers,
            "num_attention_heads": of.num_attention_heads,
            "num_key_value_heads": of.num_key_value_heads or of.num_attention_heads,
            "head_dim": of.size_of_head,
            "max_position_embeddings": of.max_position_embeddings,
            # Stored as float32; the shortest decimal that rounds to it is what the model's authors
            # wrote.
            "rms_norm_eps": float(str(np.float32(of.rms_norm_eps))),
            "hidden_act": "silu",
            "attention_bias": "layers.0.self_attn.q_proj.bias" in self.spec,
            "mlp_bias": "layers.0.mlp.up_proj.bias" in self.spec,
            "tie_word_embeddings": "lm_head.kernel" not in self.spec,
            # transformers 4 knows these two entries alone, and transformers 5 too
            "rope_theta": of.rope_theta,
            "rope_scaling": self._rope_scaling(),
        } | self._model.entries(of)
        for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            config[f"{name}_token_id"] = self._header.get(f"tokenizer.ggml.{field}_token_id")
        check(DecoderConfig, config, file=self._path)
        return config

    def _rope_scaling(self) -> dict[str, Any] | None:
        of = self._of
        if self._factors is not None:
            factors = self._dequantized(self._factors).reshape(-1)
            # The file has the outcome, not the recipe: all published Llama 3 models use this one
            # but for its factor.
            rope = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            # no number of such a formula is near what is not finite
            with np.errstate(all="ignore"):
                wanted = settings.llama3_factors(len(factors), rope | {"rope_theta": of.rope_theta})
                known = np.allclose(factors, wanted, rtol=1e-3)
            if not known:
                raise CheckpointError(
                    "its rope factors are not Llama 3's; use the original checkpoint",
                    file=self._path,
                    entry=ROPE_FACTORS,
                )
            return rope
        if of.rope_kind == "none":
            return None
        rope = {"rope_type": of.rope_kind, "factor": of.rope_factor}
        if of.rope_kind == "yarn":
            rope["original_max_position_embeddings"] = of.original_context
        return rope


def to_file(model: models.Model, path: str, array: np.ndarray) -> Float[np.ndarray, "..."]:
    """Returns a param as llama.cpp has it, in float32, but for the order of its rows."""
    array = transposed(path, array).astype(np.float32)
    return array + np.float32(model.offset) if model.offset and path.endswith(".scale") else array


def from_file(
    model: models.Model, path: str, array: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Returns the param that `to_file` made so."""
    if model.offset and path.endswith(".scale"):
        array = array - np.float32(model.offset)
    return transposed(path, array)
