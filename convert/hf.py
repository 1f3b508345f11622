"""Hugging Face folders: config.json, tokenizer, *.safetensors (one file, or shards with an
index)."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  teaches numpy, and with it safetensors, bfloat16
import numpy as np

from convert import stored
from convert.assets import check_files, quantization, read_config
from convert.checkpoint import Params, Spec, transposed_shape
from convert.consistency import ordered
from convert.errors import CheckpointError, DamagedError, joined
from convert.files import require_inside
from convert.names import Naming, flax_path, naming_in, naming_of
from convert.safetensors_header import Stored, header
from convert.schema import Schema, check, read_object
from convert.shards import INDEX, ShardWriter

log = logging.getLogger(__name__)

INDEX_BYTES = 2**26
"""The most that an index may hold; those of the largest models have a third of it."""
# Older checkpoints store the rotary frequencies and causal masks; like transformers, the model
# computes them.
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


class Reader:
    """Reads a Hugging Face folder; a file is open only while a part of it is read.

    Args:
        path: the folder.

    Raises:
        CheckpointError: all that is missing, damaged or unsupported, in one message.
    """

    def __init__(self, path: Path) -> None:
        self.assets = path
        config = read_config(path)
        check_files(path)
        self._files = _headers(path)
        naming, quantized = naming_of(config, self._files), quantization(path)
        if quantized is not None:
            log.warning(
                "%s is in %s: it is read as bfloat16, and so are results written",
                path,
                quantized.quant_method,
            )
        problems = []
        self._params: dict[str, stored.Param] = {}
        given: dict[str, str] = {}
        for name in self._files:
            bare = naming.bare(name)
            if name.endswith(BUFFERS) or (
                bare == "lm_head.weight" and config.get("tie_word_embeddings")
            ):
                continue
            try:
                found = list(self._params_of(name, bare, naming, quantized))
            except CheckpointError as error:
                problems.append(error.problem)
                continue
            for flax, param in found:
                others = {given.setdefault(bare, name), given.setdefault(flax, name)} - {name}
                problems += [f"{other} and {name} are two names for one param" for other in others]
                self._params[flax] = param
        if problems:
            raise CheckpointError(f"it cannot be used: {joined(problems)}", file=path)
        self.spec = ordered({name: param.spec for name, param in self._params.items()}, path)
        self.files = sorted({file for file, _ in self._files.values()})

    def _params_of(
        self, name: str, bare: str, naming: Naming, quantized: stored.Fp8 | stored.MxFp4 | None
    ) -> Iterator[tuple[str, stored.Param]]:
        """Yields path and param of all that a tensor holds; nothing of one that only belongs to
        another."""
        _, tensor = self._files[name]
        if naming.stacked and (match := stored.STACKED.fullmatch(bare)):
            if match.group(3) != stored.EXPONENTS:
                yield from stored.stacked(bare, name, self._files)
        elif isinstance(quantized, stored.Fp8) and name.endswith(stored.SCALES):
            return
        elif isinstance(quantized, stored.Fp8) and tensor.dtype == "F8_E4M3":
            _, scales = self._files.get(name + stored.SCALES, (None, None))
            path = flax_path(bare, 2)
            yield path, stored.fp8(path, name, tensor, scales, quantized.weight_block_size)
        else:
            path = flax_path(bare, len(tensor.shape))
            yield path, stored.plain(path, name, tensor)

    @staticmethod
    def accepts(path: Path) -> bool:
        weights = "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"
        return path.is_dir() and any(any(path.glob(kind)) for kind in weights)

    def read(self, paths: Iterable[str]) -> Params:
        return stored.read_all(self._params, paths, self._files)


class Writer:
    """Writes safetensors with Hugging Face's names, one file up to 5 GB and shards with an index
    above."""

    def __init__(self, folder: Path, spec: Spec, assets: Path) -> None:
        self.place = folder
        self._naming = naming = naming_in(read_config(assets), spec)
        self.files: set[str] = set()
        shapes = {}
        for name, paths in stored.tensors_of(spec, naming).items():
            one = spec[paths[0]]
            if naming.hf_name(paths[0]) == name:
                shape = transposed_shape(paths[0], one.shape)
            else:
                shape = len(paths), *one.shape
            shapes[name] = jax.ShapeDtypeStruct(shape, one.dtype)
        self._shards = ShardWriter(folder, shapes)

    def write(self, params: Mapping[str, np.ndarray]) -> None:
        for name, paths in stored.tensors_of(params, self._naming).items():
            self._shards.write(name, stored.to_tensor(paths, params, self._naming))

    def finish(self) -> None:
        self._shards.finish()


class _Index(Schema):
    """model.safetensors.index.json; the names of files are checked one by one, for there are
    many."""

    weight_map: dict[str, Any]


def _weight_map(path: Path) -> dict[str, str]:
    """Returns tensor name -> file name in the same folder."""
    index = check(_Index, read_object(path, INDEX_BYTES), file=path)
    for name, file in index.weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", file):
            raise DamagedError(
                "a shard's name cannot be used",
                file=path,
                entry=f"weight_map.{name}",
                found=file,
                wanted="the name of a safetensors file beside it, none outside the folder",
            )
    return index.weight_map


def _headers(folder: Path) -> dict[str, tuple[Path, Stored]]:
    """Returns tensor name -> file, and what its header says; every problem of the folder is in one
    error."""
    problems = []
    index, weight_map = folder / INDEX, {}
    if os.path.lexists(index):
        weight_map = _weight_map(index)
        files = [folder / file for file in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has only pickled weights, which can run code when loaded. Turn them into "
            "safetensors "
            "(torch loads them with weights_only):\n"
            '  pip install torch transformers && python -c "from transformers import '
            "AutoModelForCausalLM as M; "
            f"M.from_pretrained('{folder}', "
            f"dtype='auto').save_pretrained('{folder}-safetensors')\"\n"
            "then copy the tokenizer files beside them"
        )
    tensors: dict[str, tuple[Path, Stored]] = {}
    for file in files:
        try:
            require_inside(file, folder)
            for name, tensor in header(file).items():
                if name in tensors:
                    problems.append(f"{name} is both in {tensors[name][0].name} and in {file.name}")
                tensors[name] = file, tensor
        except CheckpointError as error:
            error.file = file.name  # the folder is named once, below
            problems.append(str(error))
    if not problems and weight_map:
        for name, shard in weight_map.items():
            if name not in tensors:
                problems.append(f"{name} is in the index but not in {shard}")
            elif tensors[name][0].name != shard:
                problems.append(
                    f"{name} is in {tensors[name][0].name}, not in {shard} as the index says"
                )
        problems += [f"{name} is not in the index" for name in tensors if name not in weight_map]
    if problems:
        raise DamagedError(f"it is incomplete or damaged: {joined(problems)}", file=folder)
    return tensors
