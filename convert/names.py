"""Names of tensors in Hugging Face checkpoints <-> paths of Flax params.

A path is the tensor's name without the prefix of the architecture's base model, with Flax's name of the leaf.
"""

from collections.abc import Mapping

PREFIXES: Mapping[str, str] = {"gpt_neox": "gpt_neox.", "opt": "model.decoder."}
"""Model type -> what names begin with, but for heads; of all other types it is `model.`."""
EMBEDDINGS = ("embed_tokens", "embed_in", "embed_positions")
HEADS = ("lm_head", "embed_out")


def prefix_of(model_type: str) -> str:
    """Returns what names in checkpoints of a model type begin with, but for heads."""
    return PREFIXES.get(model_type, "model.")


def bare_name(name: str, model_type: str) -> str:
    """Returns a tensor's name without the prefix, which some checkpoints lack in part or whole."""
    for step in prefix_of(model_type).split(".")[:-1]:
        name = name.removeprefix(f"{step}.")
    return name


def flax_path(bare: str, ndim: int) -> str:
    """Returns the path of a tensor, of its name without the prefix and its number of axes."""
    module, _, leaf = bare.rpartition(".")
    if leaf != "weight":
        return bare
    if module in EMBEDDINGS:
        return f"{module}.embedding"
    return f"{module}.kernel" if ndim == 2 else f"{module}.scale"


def hf_name(path: str, model_type: str) -> str:
    """Returns the checkpoint's name of a path: `layers.0.mlp.up_proj.kernel` -> `model.layers.0.mlp.up_proj.weight`."""
    module, _, leaf = path.rpartition(".")
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return f"{'' if module in HEADS else prefix_of(model_type)}{module}.{leaf}"
