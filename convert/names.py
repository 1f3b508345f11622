"""Names of tensors in Hugging Face checkpoints <-> paths of Flax params.

A path is the tensor's name without the prefix of the text model, with Flax's name of the leaf.
Tensors of other models beside the text model, such as a vision tower, have their own names as
paths, below `beside`.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

PREFIXES: Mapping[str, str] = {"gpt_neox": "gpt_neox.", "opt": "model.decoder."}
"""Model type -> prefix of names, except of heads. Other types have the prefix `model.`."""
EMBEDDINGS = ("embed_tokens", "embed_in", "embed_positions")
HEADS = ("lm_head", "embed_out")
TIED = ("cohere2", "gemma2", "gemma3_text", "opt", "smollm3")
"""Model types whose head is the embedding where the configuration does not say."""
EXPERT_COUNTS = "num_experts", "num_local_experts", "n_routed_experts"
"""Entries of a configuration that hold the number of experts."""
RECURRENT = "linear_attn."
"""Prefix of a recurrent module's tensors inside a layer, such as those of the gated delta rule."""
STACKED = ("gpt_oss",)
"""Model types whose experts' kernels are one tensor."""
BESIDE = "beside"
INSIDE = "inside"
"""Of a configuration: the model type of the checkpoint that holds the text model among others."""


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a checkpoint's tensors are called.

    Attributes:
        prefix: the prefix of the text model's names, except of the head's.
        head: what the head's names begin with.
        alone: whether there is nothing beside the text model; then some checkpoints lack the prefix
            in part or whole.
        stacked: whether the kernels of all experts of a layer are one tensor, [experts, n_in,
            n_out].
        beside: what the names of modules for multi-token prediction begin with, which are beside
            the text model.
    """

    prefix: str = "model."
    head: str = ""
    alone: bool = True
    stacked: bool = False
    beside: tuple[str, ...] = ("mtp.",)

    def bare(self, name: str) -> str:
        """Returns a name without the prefix; that of a tensor of another model below `beside`."""
        if name.startswith(self.beside):
            return f"{BESIDE}.{name}"
        if self.alone:
            for step in self.prefix.split(".")[:-1]:
                name = name.removeprefix(f"{step}.")
            return name
        head = name.removeprefix(self.head)
        if head.startswith(HEADS):
            return head
        return (
            name.removeprefix(self.prefix) if name.startswith(self.prefix) else f"{BESIDE}.{name}"
        )

    def hf_name(self, path: str) -> str:
        """Returns the checkpoint's name of a path, such as `model.norm.weight` of `norm.scale`."""
        if path.startswith(f"{BESIDE}."):
            return path.removeprefix(f"{BESIDE}.")
        module, _, leaf = path.rpartition(".")
        leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
        return f"{self.head if module in HEADS else self.prefix}{module}.{leaf}"


TEXT = Naming()
"""Of most checkpoints that hold a text model alone."""
OLDER = Naming("language_model.model.", "language_model.", False)
"""Of text models among others before transformers 5."""


def naming_of(config: Mapping[str, Any], beside: Iterable[str]) -> Naming:
    """Returns how the tensors of a checkpoint are called.

    Args:
        config: as `assets.read_config` gives it, with `inside` where the text model is among
            others.
        beside: names of tensors. Those of other models tell which of two ways it is, and a layer
            after the last one that has an `eh_proj` is a module for multi-token prediction.
    """
    if not config.get(INSIDE):
        kind = config["model_type"]
        found = (
            re.match(r"((?:model\.)?layers\.([0-9]{1,9})\.)eh_proj\.", name) for name in beside
        )
        further = {
            match[1] for match in found if match and int(match[2]) >= config["num_hidden_layers"]
        }
        return Naming(
            PREFIXES.get(kind, "model."),
            stacked=kind in STACKED,
            beside=(*Naming.beside, *sorted(further)),
        )
    names = [name for name in beside if not name.startswith(Naming.beside)]
    newer = all(name.startswith(("model.", "lm_head.")) for name in names)
    return Naming("model.language_model.", "", False) if newer else OLDER


def flax_path(bare: str, ndim: int) -> str:
    """Returns the path of a tensor, of its name without the prefix and its number of axes."""
    module, _, leaf = bare.rpartition(".")
    if leaf != "weight" or bare.startswith(f"{BESIDE}."):
        return bare
    if module in EMBEDDINGS:
        return f"{module}.embedding"
    return f"{module}.kernel" if ndim == 2 else f"{module}.scale"


def naming_in(config: Mapping[str, Any], paths: Iterable[str]) -> Naming:
    """Returns how the tensors of these paths are called; see `naming_of`."""
    beside = [path.removeprefix(f"{BESIDE}.") for path in paths if path.startswith(f"{BESIDE}.")]
    return naming_of(config, beside)


def predictors_in(config: Mapping[str, Any], paths: Collection[str]) -> list[str]:
    """Returns the modules for multi-token prediction among these paths, such as `mtp`."""
    prefixes = naming_in(config, paths).beside
    names = [path.removeprefix(f"{BESIDE}.") for path in paths if path.startswith(f"{BESIDE}.")]
    found = {prefix for prefix in prefixes for name in names if name.startswith(prefix)}
    return sorted(prefix.removesuffix(".") for prefix in found)


def split_expert(path: str) -> tuple[str, int, str] | None:
    """Returns what is before and after an expert's number, and the number between; None: it is
    no expert's."""
    match = re.fullmatch(r"(.*\.experts)\.([0-9]+)\.(.+)", path)
    return (match[1], int(match[2]), match[3]) if match else None


def expert_path(path: str, expert: int | None) -> str:
    """Returns the path of an expert's linear layer, such as `mlp.experts.3.up_proj`; None: it is no
    expert's."""
    if expert is None:
        return path
    parent, _, name = path.rpartition(".")
    return f"{parent}.{expert}.{name}"
