"""GGUF files, written: what llama.cpp runs, with exact zeros where the checkpoint has them.

Names, orders and settings are those that llama.cpp's own converter gives a model, of those models
that `models` has. What the file would say otherwise than the checkpoint is refused.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from jaxtyping import Float

from convert import ownership
from convert.assets import load_config
from convert.checkpoint import Reader as AnyReader
from convert.checkpoint import Spec, require_written, transposed_shape
from convert.errors import Change, CheckpointError
from convert.gguf import models, reading, settings, tokenizers
from convert.names import split_expert
from convert.writing import failing, reserve, sync

FILES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
}
"""How weights can be stored -> what the file calls itself then."""
KINDS = {kind.name.lower(): kind for kind in FILES}
WIDER = GGMLQuantizationType.F16
"""For matrices whose rows are no whole blocks, as in llama.cpp."""
LEAST_OF_EMBEDDINGS = GGMLQuantizationType.Q8_0
"""Of the fewest bits that embedding and head are stored in. llama.cpp gives them six and a half."""


class _Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        paths: of the params in it: one, those of all experts in order, or none of the checkpoint's.
        shape: the fastest axis last.
        kind: how its elements are stored.
    """

    paths: list[str]
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        block, nbytes = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * nbytes


class Writer:
    """Writes a GGUF file: its header at once, and each tensor in its place when it comes.

    Args:
        place: the file to make.
        spec: the shapes and dtypes of what will be written.
        assets: the folder of the checkpoint's configuration and tokenizer.
        type: how matrices are stored: f32, f16, bf16, q8_0, q5_0, q5_1, q4_0 or q4_1; of embedding
            and head no smaller one than q8_0. Vectors are float32.

    Raises:
        CheckpointError: llama.cpp has no such model, or its file would be another model.
    """

    single_file = True

    def __init__(self, place: Path, spec: Spec, assets: Path, *, type: str = "f16") -> None:
        if (type := type.lower()) not in KINDS:
            problem = f"matrices cannot be stored as {type!r}: {', '.join(KINDS)} can"
            raise CheckpointError(problem, options={"type": Change.OTHER})
        self.files: set[str] = set()
        self.place, self._kind = place, KINDS[type]
        config = load_config(assets)
        self._model, self._config = models.of_type(config.model_type, assets), config
        self._tensors = _tensors_of(spec, self._model, self._kind)
        self._names = {path: name for name, one in self._tensors.items() for path in one.paths}
        self._missing = set(self._tensors)
        self._write_header(assets)
        self._require_same(spec)

    @staticmethod
    def require_suitable(reader: AnyReader) -> None:
        """Raises CheckpointError where llama.cpp has no such model."""
        models.of_type(load_config(reader.assets).model_type, reader.assets)

    def _write_header(self, assets: Path) -> None:
        prefix = gguf.MODEL_ARCH_NAMES[self._model.arch]
        writer = gguf.GGUFWriter(self.place, prefix)
        writer.add_string("jaxprune.checksum", ownership.EMPTY_CHECKSUM)  # near the start
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(FILES[self._kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, value in settings.fields_of(self._config).items():
            _add(writer, f"{prefix}.{name}", value)
        for name, value in tokenizers.fields_of(assets, self._config.vocab_size).items():
            _add(writer, f"tokenizer.{name}", value)
        factors = settings.rope_factors(self._config)
        if factors is not None:
            kind = GGMLQuantizationType.F32
            self._tensors[reading.ROPE_FACTORS] = _Tensor([], factors.shape, kind)
        for name, one in self._tensors.items():
            dtype = np.dtype(np.float32)
            writer.add_tensor_info(name, one.shape, dtype, one.nbytes, raw_dtype=one.kind)
        with failing(self.place):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            end = self.place.stat().st_size
        self._starts = {}
        for name, one in self._tensors.items():
            end = self._starts[name] = -(-end // writer.data_alignment) * writer.data_alignment
            end += one.nbytes
        reserve(self.place, -(-end // writer.data_alignment) * writer.data_alignment)
        if factors is not None:
            self._put(reading.ROPE_FACTORS, factors)

    def _require_same(self, spec: Spec) -> None:
        """Raises CheckpointError where what was written would be read as another model than the
        checkpoint's."""
        found = reading.Reader(self.place)
        if {path: t.shape for path, t in found.spec.items()} != {
            path: t.shape for path, t in spec.items()
        }:
            raise CheckpointError("a GGUF file of it would have other tensors")
        if different := sorted(settings.differences(found.config, self._config)):
            raise CheckpointError(
                f"a GGUF file of a {self._model.model_type} model cannot say these entries of "
                "config.json: " + ", ".join(different)
            )

    def write(self, params: Mapping[str, np.ndarray]) -> None:
        for name in dict.fromkeys(self._names[path] for path in params):
            paths = self._tensors[name].paths
            arrays = [self._in_file(path, params[path]) for path in paths]
            self._put(name, np.stack(arrays) if split_expert(paths[0]) else arrays[0])
            self._missing.discard(name)

    def _in_file(self, path: str, array: np.ndarray) -> Float[np.ndarray, "..."]:
        """Returns a param as llama.cpp has it, in float32."""
        return settings.permuted(
            self._model, self._config, path, reading.to_file(self._model, path, array)
        )

    def _put(self, name: str, array: Float[np.ndarray, "..."]) -> None:
        kind = self._tensors[name].kind
        if (
            kind == GGMLQuantizationType.F16
            and np.abs(array).max(initial=0) > np.finfo(np.float16).max
        ):
            raise CheckpointError(
                f"{name} has numbers that float16 cannot hold", options={"type": "bf16"}
            )
        content = gguf.quantize(np.ascontiguousarray(array), kind)
        with failing(self.place), self.place.open("r+b") as file:
            file.seek(self._starts[name])
            file.write(content.tobytes())

    def finish(self) -> None:
        require_written(self._missing, self.place)
        with failing(self.place):
            sync(self.place)


TOP = {path: name for name, path in reading.TOP.items()}


def tensor_bytes(spec: Spec, assets: Path, type: str) -> int:
    """Returns the bytes of all tensors of a file; its header, with the tokenizer, comes on top.

    Args:
        spec: the shapes and dtypes of what would be written.
        assets: the folder of the checkpoint's configuration.
        type: as for `Writer`.

    Raises:
        CheckpointError: llama.cpp has no such model.
    """
    model = models.of_type(load_config(assets).model_type, assets)
    return sum(one.nbytes for one in _tensors_of(spec, model, KINDS[type]).values())


def _tensors_of(
    spec: Spec, model: models.Model, wanted: GGMLQuantizationType
) -> dict[str, _Tensor]:
    """Returns the tensors of a file by name, whose matrices are stored as `wanted`."""
    modules = {module: name for name, module in model.names().items()}
    grouped: dict[str, list[str]] = {}
    for path in spec:
        grouped.setdefault(_name_of(path, model, modules), []).append(path)
    tensors = {}
    for name, paths in grouped.items():
        shape = transposed_shape(paths[0], spec[paths[0]].shape)
        if split_expert(paths[0]):
            shape = len(paths), *shape
        tensors[name] = _Tensor(paths, shape, _kind_of(name, paths[0], shape[-1], wanted))
    return tensors


def _name_of(path: str, model: models.Model, modules: Mapping[str, str]) -> str:
    """Returns the name of the tensor that holds a param."""
    if path in TOP:
        return TOP[path]
    expert = split_expert(path)
    layers, _, inside = (f"{expert[0]}.{expert[2]}" if expert else path).partition(".")
    index, _, inside = inside.partition(".")
    module, _, leaf = inside.rpartition(".")
    if layers != "layers" or module not in modules:
        raise CheckpointError(f"a GGUF file of a {model.model_type} model has no place for {path}")
    return f"blk.{index}.{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def _kind_of(name: str, path: str, row: int, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Returns how a tensor is stored, of the path of a param in it and the elements of a row."""
    if not path.endswith((".kernel", ".embedding")) or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    kind = max(wanted, LEAST_OF_EMBEDDINGS, key=_bits_of) if path in TOP else wanted
    return kind if row % gguf.GGML_QUANT_SIZES[kind][0] == 0 else WIDER


def _bits_of(kind: GGMLQuantizationType) -> float:
    """Returns the bits of a number."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return 8 * nbytes / block


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Adds a field; numbers are of 32 bits, as llama.cpp reads them."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
