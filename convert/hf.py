"""Hugging Face folders: config.json, tokenizer, *.safetensors (one file, or shards with an index)."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  teaches numpy, and with it safetensors, bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from convert import CheckpointError, Params, Spec, parts
from convert.assets import read_config
from convert.shards import DTYPES, INDEX, ShardWriter

# Older LLaMA checkpoints store the rotary frequencies; like transformers, the model computes them.
BUFFERS = (".rotary_emb.inv_freq",)


class Reader:
    """Reads a Hugging Face folder; a file is open only while a part of it is read.

    Args:
        path: the folder.

    Raises:
        CheckpointError: all that is missing, damaged or unsupported, in one message.
    """

    def __init__(self, path: Path) -> None:
        self._folder = path
        config = read_config(path)
        self._files = _headers(path)
        problems = []
        self.spec: Spec = {}
        self._names: dict[str, str] = {}
        for name, (_, dtype, shape) in self._files.items():
            if name.endswith(BUFFERS) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                continue
            if dtype not in DTYPES.values():
                problems.append(f"{name} is stored as {dtype}; only {', '.join(DTYPES.values())} can be pruned")
                continue
            flax, is_kernel = _flax_path(name, len(shape))
            self._names[flax] = name
            dtype = next(numpy for numpy, stored in DTYPES.items() if stored == dtype)
            self.spec[flax] = jax.ShapeDtypeStruct(shape[::-1] if is_kernel else shape, np.dtype(dtype))
        if problems:
            raise CheckpointError(f"{path} cannot be used:\n  " + "\n  ".join(problems[:20]))
        self.spec = {p: self.spec[p] for paths in parts(self.spec).values() for p in paths}

    @property
    def assets(self) -> Path:
        return self._folder

    @staticmethod
    def accepts(path: Path) -> bool:
        weights = "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"
        return path.is_dir() and any(any(path.glob(kind)) for kind in weights)

    def read(self, paths: Iterable[str]) -> Params:
        by_file = defaultdict(list)
        for path in paths:
            by_file[self._files[self._names[path]][0]].append(path)
        params = {}
        for file, wanted in by_file.items():
            try:
                # Opened anew for each part: a lasting memory map would count towards the process's memory.
                with safe_open(file, framework="numpy") as tensors:
                    for path in wanted:
                        array = tensors.get_tensor(self._names[path])
                        params[path] = array.T if path.endswith(".kernel") else array
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"cannot read {file}: {error}; fetch it again") from error
        return params


class Writer:
    """Writes safetensors with Hugging Face's names, one file up to 5 GB and shards with an index above."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        self.folder = folder
        self.files: set[str] = set()
        self._shards = ShardWriter(
            folder,
            {
                hf_name(path): jax.ShapeDtypeStruct(t.shape[::-1] if path.endswith(".kernel") else t.shape, t.dtype)
                for path, t in spec.items()
            },
        )

    def write(self, params: Mapping[str, np.ndarray]) -> None:
        for path, array in params.items():
            self._shards.write(hf_name(path), array.T if path.endswith(".kernel") else array)

    def finish(self) -> None:
        self._shards.finish()


def hf_name(path: str) -> str:
    """`layers.0.mlp.up_proj.kernel` -> `model.layers.0.mlp.up_proj.weight`."""
    module, _, leaf = path.rpartition(".")
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return f"{module}.{leaf}" if module == "lm_head" else f"model.{module}.{leaf}"


def _flax_path(name: str, ndim: int) -> tuple[str, bool]:
    """A tensor's Flax path, and whether it is a kernel, which Flax holds transposed."""
    module, _, leaf = name.removeprefix("model.").rpartition(".")
    if leaf != "weight":
        return f"{module}.{leaf}", False
    if module == "embed_tokens":
        return f"{module}.embedding", False
    return (f"{module}.kernel", True) if ndim == 2 else (f"{module}.scale", False)


def _headers(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Tensor name -> file, stored dtype, stored shape; every problem of the folder is in one error."""
    problems = []
    index_path, weight_map = folder / INDEX, {}
    if index_path.exists():
        try:
            weight_map = json.loads(index_path.read_text())["weight_map"]
            files = sorted({folder / file for file in weight_map.values()})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index_path} is damaged: fetch it again") from None
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has only pickled weights, which can run code when loaded. Turn them into safetensors "
            "(torch loads them with weights_only):\n"
            '  pip install torch transformers && python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\"\n"
            "then copy the tokenizer files beside them"
        )

    tensors: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for file in files:
        if file.resolve().parent != folder.resolve() and not file.is_symlink():
            problems.append(f"{index_path.name} names {file.name} outside the folder")
            continue
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():
                    entry = opened.get_slice(name)
                    if name in tensors:
                        problems.append(f"{name} is both in {tensors[name][0].name} and in {file.name}")
                    tensors[name] = file, entry.get_dtype(), tuple(entry.get_shape())
        except FileNotFoundError:
            problems.append(f"{file.name} is missing")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name} is damaged or truncated ({error})")
    if not problems:
        for name, file in weight_map.items():
            if name not in tensors:
                problems.append(f"{name} is in the index but not in {file}")
            elif tensors[name][0].name != file:
                problems.append(f"{name} is in {tensors[name][0].name}, not in {file} as the index says")
        if weight_map:
            problems += [f"{name} is not in the index" for name in tensors if name not in weight_map]
    if problems:
        raise CheckpointError(f"{folder} is incomplete; fetch it again:\n  " + "\n  ".join(problems[:20]))
    return tensors
