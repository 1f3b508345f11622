"""How much smaller a configuration becomes if parts of the model are removed.

An entry of config.json says how many units each layer has. A removal changes it, and transformers
and this library build the smaller model from the changed configuration. A configuration that they
refuse is refused here, before any work.
"""

import bisect
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert.assets import load_config
from convert.errors import UserError
from convert.names import EXPERT_COUNTS
from jaxprune.costs.run_sizes import Removal
from jaxprune.errors import Change, InputError
from jaxprune.models import Architecture, architecture_of
from jaxprune.recipe_parts import Structure
from jaxprune.sparsity.patterns import percent

CHANNELS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
)
"""Entries that hold the number of channels of a feed-forward network."""
LAYER_LISTS = "layer_types", "no_rope_layers"
"""Entries that hold a value for each layer."""
FIRST_LAYERS = ("first_k_dense_replace",)
"""Entries that hold how many of the first layers are of another kind."""
Entries = dict[str, Any]
Groups = tuple[int, int] | None
Built = Callable[[Mapping[str, Any]], Architecture]
"""Entries of config.json -> the architecture with them."""
HEADS, KV_HEADS, HEAD_SIZE = "num_attention_heads", "num_key_value_heads", "head_dim"


def removals(architecture: Architecture, assets: Path, structure: Structure) -> list[Removal]:
    """Returns the removals of a recipe, in order.

    Where the recipe says how many layers are removed, but not which, they are the last ones here.
    Where it says how many parameters, they are those of channels here.

    Args:
        architecture: of the dense model.
        assets: the folder of its config.json.
        structure: what is removed.

    Raises:
        InputError: the model has nothing of the kind, or too little of it would remain.
    """
    found: list[Removal] = []
    changes: Mapping[str, Any] = {}
    if structure.drop_parameters:
        structure = first_mix(architecture, assets, structure)
    for kind in structure.removed:
        found.append(removal_of(architecture, assets, kind, structure, changes))
        architecture, changes = found[-1].after, found[-1].changes
    return found


def removal_of(
    architecture: Architecture,
    assets: Path,
    kind: str,
    structure: Structure,
    changes: Mapping[str, Any],
) -> Removal:
    """Returns the removal of one kind of parts.

    Args:
        architecture: of the model before it.
        assets: the folder of the dense model's config.json.
        kind: the kind of parts.
        structure: what is removed.
        changes: entries of config.json that already have other values.

    Raises:
        InputError: see `removals`.
    """
    config = load_config(assets, changes)

    def built(entries: Mapping[str, Any]) -> Architecture:
        return _built(architecture, assets, {**changes, **entries})

    entries, groups = _OF_KIND[kind](architecture, config, structure, built)
    smaller = built(entries)
    if kind == "layers":
        kinds = _kinds(architecture)
        kept = kept_layers(structure, architecture)
        shrinks = _kinds(smaller) == [kinds[index] for index in kept]
    else:
        shrinks = kind == "experts" or _shrinks(architecture, smaller)
    if not shrinks:
        raise InputError(
            f"models of this family cannot have fewer {kind}",
            options={f"drop_{kind}": Change.OMIT},
        )
    return Removal(kind, architecture, smaller, {**changes, **entries}, groups)


def smaller_architecture(
    architecture: Architecture, assets: Path, structure: Structure
) -> Architecture:
    """Returns the architecture after all removals; arguments and errors as for `removals`."""
    made = removals(architecture, assets, structure)
    return made[-1].after if made else architecture


def layer_parameters(architecture: Architecture) -> int:
    """Returns how many parameters the decoder layers have."""
    spec = architecture.spec.items()
    return sum(tensor.size for path, tensor in spec if path.startswith("layers."))


def first_mix(architecture: Architecture, assets: Path, structure: Structure) -> Structure:
    """Returns the mix of parts that is tried first where a recipe says how many parameters are
    removed: channels alone, with as few layers as possible if these are too few.

    Args:
        architecture, assets: as for `removals`.
        structure: what is removed.

    Raises:
        InputError: see `removals`, or no mix has so many parameters.
    """
    parts = Structure(channel_multiple=structure.channel_multiple)
    for count in range(len(architecture.layers)):
        mix = dataclasses.replace(parts, drop_layers=count)
        if filled := with_channels(architecture, assets, mix, structure.drop_parameters):
            return filled
    raise InputError(
        f"no mix of layers and channels has {percent(structure.drop_parameters)} % of the decoder "
        "layers' parameters",
        options={"drop_parameters": Change.LOWER},
    )


def with_channels(
    architecture: Architecture, assets: Path, mix: Structure, share: float
) -> Structure | None:
    """Returns a mix with as few channels removed as make up for a fraction of the decoder layers'
    parameters.

    Args:
        architecture, assets: as for `removals`.
        mix: what is removed before the channels.
        share: the fraction.

    Returns:
        The mix; None if even the most channels are too few.

    Raises:
        InputError: see `removals`.
    """
    most = (1 - share) * layer_parameters(architecture)
    config = load_config(assets, {})
    count = max(getattr(config, name, None) or 0 for name in CHANNELS)
    multiple = mix.channel_multiple

    def removing(multiples: int) -> Structure:
        return dataclasses.replace(mix, drop_channels=multiples * multiple / count)

    def enough(multiples: int) -> bool:
        smaller = smaller_architecture(architecture, assets, removing(multiples))
        return layer_parameters(smaller) <= most

    every = range(max(1, -(-count // multiple)))
    place = bisect.bisect_left(every, True, key=enough)
    return removing(place) if place < len(every) else None


def kept_layers(structure: Structure, architecture: Architecture) -> list[int]:
    """Returns the indices of the layers that stay: without those that a structure names, else
    without the last ones."""
    count = len(architecture.layers)
    dropped = structure.named_layers or range(count - structure.layer_count, count)
    return [index for index in range(count) if index not in dropped]


def _built(architecture: Architecture, assets: Path, changes: Mapping[str, Any]) -> Architecture:
    """Returns the architecture with changed entries of its configuration."""
    config = architecture.config
    built = architecture_of(assets, config.dtype, changes=changes)
    if config.routing:
        routing = config.routing
        built = built.routed(mesh=routing.mesh, route_all=routing.route_all)
    return built


def _layers(
    architecture: Architecture, hf: Any, structure: Structure, built: Built
) -> tuple[Entries, Groups]:
    count, most = len(architecture.layers), max(structure.named_layers, default=0)
    if most >= count:
        raise InputError(
            f"there is no layers.{most}: the model's last layer is layers.{count - 1}",
            options={"drop_layers": Change.OTHER},
        )
    if structure.layer_count >= count:
        raise InputError(
            f"the model has {count} layers, and at least one must stay",
            options={"drop_layers": Change.LOWER},
        )
    kept = kept_layers(structure, architecture)
    changes: Entries = {"num_hidden_layers": len(kept)}
    for name in LAYER_LISTS:
        if values := getattr(hf, name, None):
            changes[name] = [values[index] for index in kept]
    for name in FIRST_LAYERS:
        if (first := getattr(hf, name, None)) is not None:
            changes[name] = sum(index < first for index in kept)
    if step := getattr(hf, "decoder_sparse_step", None):
        dense = {i for i in range(count) if i in hf.mlp_only_layers or (i + 1) % step}
        places = [place for place, index in enumerate(kept) if index in dense]
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": places}
    return changes, None


def _experts(
    architecture: Architecture, hf: Any, structure: Structure, built: Built
) -> tuple[Entries, Groups]:
    routing = architecture.config.routing
    if routing is None or not any(layer.experts for layer in architecture.layers):
        raise InputError("the model has no experts to drop", options={"drop_experts": Change.OMIT})
    keep = routing.experts - round(structure.drop_experts * routing.experts)
    if keep < routing.per_token:
        raise InputError(
            f"{keep} of {routing.experts} experts would remain, but each token needs "
            f"{routing.per_token}",
            options={"drop_experts": Change.LOWER},
        )
    changes = {name: keep for name in EXPERT_COUNTS if hasattr(hf, name)}
    return changes, (routing.experts, keep)


def _heads(
    architecture: Architecture, hf: Any, structure: Structure, built: Built
) -> tuple[Entries, Groups]:
    heads = getattr(hf, HEADS)
    kv_heads = getattr(hf, KV_HEADS, None) or heads
    count = head_groups(hf)
    keep = min(count - 1, max(1, round((1 - structure.drop_heads) * count)))

    def changes(keep: int) -> dict[str, Any]:
        found = {HEADS: keep * (heads // count), HEAD_SIZE: architecture.config.head_dim}
        return found | ({KV_HEADS: keep} if kv_heads > 1 and hasattr(hf, KV_HEADS) else {})

    def possible(keep: int) -> bool:
        try:
            return _shrinks(architecture, built(changes(keep)))
        except UserError:
            return False

    if keep < 1 or not possible(keep):
        others = [n for n in range(1, count) if possible(n)]
        what = "groups of heads" if kv_heads > 1 and kv_heads < heads else "heads"
        raise InputError(
            f"{max(keep, 0)} of {count} {what} cannot remain in a model of this family: "
            + (f"{', '.join(map(str, others))} can" if others else "no smaller number can"),
            options={"drop_heads": Change.OTHER if others else Change.OMIT},
        )
    return changes(keep), (count, keep)


def head_groups(hf: Any) -> int:
    """Returns how many groups of heads can be removed from a layer: key-value heads with their
    query heads. If there is one key-value head, each query head is a group.

    Args:
        hf: the configuration.
    """
    heads = getattr(hf, HEADS)
    kv_heads = getattr(hf, KV_HEADS, None) or heads
    return kv_heads if kv_heads > 1 else heads


def _channels(
    architecture: Architecture, hf: Any, structure: Structure, built: Built
) -> tuple[Entries, Groups]:
    multiple = structure.channel_multiple
    changes = {}
    for name in CHANNELS:
        count = getattr(hf, name, None)
        if not isinstance(count, int) or not count:
            continue
        most = (count - 1) // multiple * multiple
        if not most:
            raise InputError(
                f"{name} is {count}: no smaller multiple of {multiple} is left",
                options={"channel_multiple": Change.LOWER},
            )
        nearest = round((1 - structure.drop_channels) * count / multiple) * multiple
        changes[name] = min(most, max(multiple, nearest))
    return changes, None


_OF_KIND = {"layers": _layers, "experts": _experts, "heads": _heads, "channels": _channels}


def _kinds(architecture: Architecture) -> list[Any]:
    """Returns what tells apart the kinds of layers: rotation, window, and shapes."""
    every = zip(architecture.config.kinds, architecture.layers, strict=True)
    return [(kind, dict(layer.stored)) for kind, layer in every]


def _shrinks(architecture: Architecture, smaller: Architecture) -> bool:
    """Returns whether a linear layer has fewer inputs."""
    before, after = architecture.kernel_shapes(), smaller.kernel_shapes()
    return any(after[which][0] < shape[0] for which, shape in before.items())
