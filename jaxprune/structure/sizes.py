"""How much smaller a configuration becomes if parts of the model are removed.

An entry of config.json says how many units each layer has. A removal changes it, and transformers
and this library build the smaller model from the changed configuration. A configuration that they
refuse is refused here, before any work.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from convert.assets import load_config
from convert.errors import UserError
from convert.names import EXPERT_COUNTS
from jaxprune.costs.run_sizes import Removal
from jaxprune.errors import Change, InputError
from jaxprune.models import Architecture, architecture_of
from jaxprune.recipe_parts import Structure

CHANNELS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
)
"""Entries that hold the number of channels of a feed-forward network."""
Built = Callable[[Mapping[str, Any]], Architecture]
"""Entries of config.json -> the architecture with them."""
HEADS, KV_HEADS, HEAD_SIZE = "num_attention_heads", "num_key_value_heads", "head_dim"


def removals(
    architecture: Architecture,
    assets: Path,
    structure: Structure,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> list[Removal]:
    """Returns the removals of a recipe, in order: experts, heads, channels.

    Args:
        architecture: of the dense model.
        assets: the folder of its config.json.
        structure: what is removed.
        changes: entries of config.json that already have other values.

    Raises:
        InputError: the model has nothing of the kind, or too little of it would remain.
    """
    found: list[Removal] = []
    for kind, share in structure.shares.items():
        config = load_config(assets, changes)

        def built(
            entries: Mapping[str, Any],
            before: Architecture = architecture,
            earlier: Mapping[str, Any] = changes,
        ) -> Architecture:
            return _built(before, assets, {**earlier, **entries})

        entries, groups = _OF_KIND[kind](architecture, config, share, structure, built)
        smaller = built(entries)
        if kind != "experts" and not _shrinks(architecture, smaller):
            raise InputError(
                f"models of this family cannot have fewer {kind}",
                options={f"drop_{kind}": Change.OMIT},
            )
        changes = {**changes, **entries}
        found.append(Removal(kind, architecture, smaller, changes, groups))
        architecture = smaller
    return found


def smaller_architecture(
    architecture: Architecture, assets: Path, structure: Structure
) -> Architecture:
    """Returns the architecture after all removals; arguments and errors as for `removals`."""
    made = removals(architecture, assets, structure)
    return made[-1].after if made else architecture


def _built(architecture: Architecture, assets: Path, changes: Mapping[str, Any]) -> Architecture:
    """Returns the architecture with changed entries of its configuration."""
    config = architecture.config
    built = architecture_of(assets, config.dtype, changes=changes)
    if config.routing:
        routing = config.routing
        built = built.routed(mesh=routing.mesh, route_all=routing.route_all)
    return built


def _experts(
    architecture: Architecture, hf: Any, share: float, structure: Structure, built: Built
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    routing = architecture.config.routing
    if routing is None or not any(layer.experts for layer in architecture.layers):
        raise InputError("the model has no experts to drop", options={"drop_experts": Change.OMIT})
    keep = routing.experts - round(share * routing.experts)
    if keep < routing.per_token:
        raise InputError(
            f"{keep} of {routing.experts} experts would remain, but each token needs "
            f"{routing.per_token}",
            options={"drop_experts": Change.LOWER},
        )
    changes = {name: keep for name in EXPERT_COUNTS if hasattr(hf, name)}
    return changes, (routing.experts, keep)


def _heads(
    architecture: Architecture, hf: Any, share: float, structure: Structure, built: Built
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    heads = getattr(hf, HEADS)
    kv_heads = getattr(hf, KV_HEADS, None) or heads
    count = kv_heads if kv_heads > 1 else heads
    keep = min(count - 1, max(1, round((1 - share) * count)))

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


def _channels(
    architecture: Architecture, hf: Any, share: float, structure: Structure, built: Built
) -> tuple[dict[str, Any], tuple[int, int] | None]:
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
        nearest = round((1 - share) * count / multiple) * multiple
        changes[name] = min(most, max(multiple, nearest))
    return changes, None


_OF_KIND = {"experts": _experts, "heads": _heads, "channels": _channels}


def _shrinks(architecture: Architecture, smaller: Architecture) -> bool:
    """Returns whether a linear layer has fewer inputs."""
    before, after = architecture.kernel_shapes(), smaller.kernel_shapes()
    return any(after[which][0] < shape[0] for which, shape in before.items())
