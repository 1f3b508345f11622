"""Hugging Face folders: config.json, tokenizer, *.safetensors (one file, or shards with an index)."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  teaches numpy, and with it safetensors, bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.assets import check_files, read_config
from convert.checkpoint import Params, Spec, parts
from convert.consistency import check_paths
from convert.errors import CheckpointError, DamagedError, joined
from convert.files import read_bytes, require_inside, require_regular
from convert.names import Naming, flax_path, naming_of
from convert.safetensors_header import Stored, header
from convert.schema import Schema, check, decode
from convert.shards import DTYPES, INDEX, ShardWriter

INDEX_BYTES = 2**26
"""The most that an index may hold; those of the largest models have a third of it."""
# Older checkpoints store the rotary frequencies and causal masks; like transformers, the model computes them.
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


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
        check_files(path)
        self._files = _headers(path)
        naming = naming_of(config, self._files)
        problems = []
        self.spec: Spec = {}
        self._names: dict[str, str] = {}
        given: dict[str, str] = {}
        numpy_dtypes = {stored: np.dtype(name) for name, stored in DTYPES.items()}
        for name, (_, (dtype, shape)) in self._files.items():
            bare = naming.bare(name)
            if name.endswith(BUFFERS) or (bare == "lm_head.weight" and config.get("tie_word_embeddings")):
                continue
            flax = flax_path(bare, len(shape))
            others = {given.setdefault(bare, name), given.setdefault(flax, name)} - {name}
            problems += [f"{other} and {name} are two names for one param" for other in others]
            if dtype not in numpy_dtypes:
                problems.append(f"{name} is stored as {dtype}; only {', '.join(numpy_dtypes)} can be pruned")
                continue
            self._names[flax] = name
            self.spec[flax] = jax.ShapeDtypeStruct(
                shape[::-1] if flax.endswith(".kernel") else shape, numpy_dtypes[dtype]
            )
        if problems:
            raise CheckpointError(f"it cannot be used: {joined(problems)}", file=path)
        check_paths(self.spec, path)
        self.spec = {p: self.spec[p] for paths in parts(self.spec).values() for p in paths}

    @property
    def assets(self) -> Path:
        return self._folder

    @property
    def files(self) -> list[Path]:
        return sorted({file for file, *_ in self._files.values()})

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
            require_regular(file)
            try:
                # Opened anew for each part: a lasting memory map would count towards the process's memory.
                with safe_open(file, framework="numpy") as tensors:
                    for path in wanted:
                        array = tensors.get_tensor(self._names[path])
                        params[path] = array.T if path.endswith(".kernel") else array
            except (SafetensorError, OSError) as error:
                raise DamagedError(f"it cannot be read ({error})", file=file) from error
        return params


class Writer:
    """Writes safetensors with Hugging Face's names, one file up to 5 GB and shards with an index above."""

    def __init__(self, folder: Path, spec: Spec, naming: Naming) -> None:
        self.folder, self._naming = folder, naming
        self.files: set[str] = set()
        stored = {
            path: jax.ShapeDtypeStruct(t.shape[::-1] if path.endswith(".kernel") else t.shape, t.dtype)
            for path, t in spec.items()
        }
        self._shards = ShardWriter(folder, {naming.hf_name(path): t for path, t in stored.items()})

    def write(self, params: Mapping[str, np.ndarray]) -> None:
        for path, array in params.items():
            self._shards.write(self._naming.hf_name(path), array.T if path.endswith(".kernel") else array)

    def finish(self) -> None:
        self._shards.finish()


class _Index(Schema):
    """model.safetensors.index.json; the names of files are checked one by one, for there are many."""

    weight_map: dict[str, Any]


def _weight_map(path: Path) -> dict[str, str]:
    """Returns tensor name -> file name in the same folder."""
    index = check(_Index, decode(read_bytes(path, INDEX_BYTES), file=path), file=path)
    for name, file in index.weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", file):
            entry, wanted = f"weight_map.{name}", "the name of a safetensors file beside it, none outside the folder"
            raise DamagedError("a shard's name cannot be used", file=path, entry=entry, found=file, wanted=wanted)
    return index.weight_map


def _headers(folder: Path) -> dict[str, tuple[Path, Stored]]:
    """Returns tensor name -> file, and what its header says; every problem of the folder is in one error."""
    problems = []
    index, weight_map = folder / INDEX, {}
    if os.path.lexists(index):
        weight_map = _weight_map(index)
        files = [folder / file for file in sorted(set(weight_map.values()))]
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
    tensors: dict[str, tuple[Path, Stored]] = {}
    for file in files:
        try:
            require_inside(file, folder)
            for name, stored in header(file).items():
                if name in tensors:
                    problems.append(f"{name} is both in {tensors[name][0].name} and in {file.name}")
                tensors[name] = file, stored
        except CheckpointError as error:
            error.file = file.name  # the folder is named once, below
            problems.append(str(error))
    if not problems and weight_map:
        for name, shard in weight_map.items():
            if name not in tensors:
                problems.append(f"{name} is in the index but not in {shard}")
            elif tensors[name][0].name != shard:
                problems.append(f"{name} is in {tensors[name][0].name}, not in {shard} as the index says")
        problems += [f"{name} is not in the index" for name in tensors if name not in weight_map]
    if problems:
        raise DamagedError(f"it is incomplete or damaged: {joined(problems)}", file=folder)
    return tensors
