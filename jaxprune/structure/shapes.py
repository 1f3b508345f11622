"""Which params of a layer lose what, if units of it are removed.

A unit is a channel of a feed-forward network, or a group of attention heads. Nothing here knows a
family: the layer of the smaller configuration is compared with the whole one. What has become
smaller is cut, and the linear layer that has fewer inputs is the one that reads the units.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from convert import Params
from jaxprune.models import Layer
from jaxprune.solve import sensitivity
from jaxprune.sparsity.patterns import Projections


@dataclasses.dataclass(frozen=True)
class Units:
    """The units that one input of a layer consists of.

    Attributes:
        capture: the input, as `Layer.inputs` names it.
        readers: the linear layers that read it.
        count: how many units there are.
        keep: how many stay.
    """

    capture: str
    readers: tuple[str, ...]
    count: int
    keep: int


Kept = Mapping[str, Int[np.ndarray, "k"]]
"""Capture -> indices of its units that stay, sorted."""


def units_of(layer: Layer, smaller: Layer, groups: tuple[int, int] | None) -> dict[str, Units]:
    """Returns the units of a layer of which some are removed, by capture.

    Args:
        layer: the whole layer.
        smaller: the same layer of the smaller configuration.
        groups: how many units each input consists of, in the layer and in the smaller one; None:
            every feature is a unit.
    """
    found = {}
    for capture, readers in layer.inputs.items():
        before, after = (one.kernels[readers[0]][0] for one in (layer, smaller))
        if after < before:
            count, keep = groups or (before, after)
            found[capture] = Units(capture, readers, count, keep)
    return found


def measured_units(layer: Layer, units: Mapping[str, Units]) -> sensitivity.Units:
    """Returns the units as the reverse pass takes them: by the captures of the layer's program, in
    which experts are stacked."""
    counts = {layer.sources[capture].name: one.count for capture, one in units.items()}
    return tuple(sorted(counts.items()))


def cut(
    layer: Layer, smaller: Layer, units: Mapping[str, Units], kept: Kept, params: Params
) -> Params:
    """Returns params of a layer without the units that are removed.

    Args:
        layer: the whole layer.
        smaller: the same layer of the smaller configuration.
        units: as `units_of` returns them.
        kept: the units that stay.
        params: path in the layer, as in a checkpoint -> array.
    """
    owners = {reader.rpartition(".")[0]: one for one in units.values() for reader in one.readers}
    found: Params = {}
    for path, array in params.items():
        shape = smaller.stored[path].shape
        module = path.rpartition(".")[0]
        for axis, (before, after) in enumerate(zip(array.shape, shape, strict=True)):
            if before != after:
                own = _owner(module, owners)
                # Only outputs belong to several projections.
                sides: list[Projections] = [(), ()]
                if axis == array.ndim - 1:
                    sides = [one.projections.get(module, ()) for one in (layer, smaller)]
                places = _places(before, sides[0], sides[1], own.count, kept[own.capture])
                array = np.take(array, places, axis=axis)
        found[path] = array
    return found


def _owner(module: str, owners: Mapping[str, Units]) -> Units:
    """Returns the units that a module has: those of the nearest module around it."""
    while module not in owners and module:
        module = module.rpartition(".")[0]
    return owners[module]


def _places(
    size: int,
    projections: Projections,
    smaller: Projections,
    count: int,
    kept: Int[np.ndarray, "k"],
) -> Sequence[int] | np.ndarray:
    """Returns the indices that stay along an axis on which units lie one after the other, in each
    of several projections where these shrink."""
    if projections == smaller:  # none, or they are the same within each unit
        return _of_units(size, count, kept)
    places, start = [], 0
    for (_, before), (_, after) in zip(projections, smaller, strict=True):
        own = np.arange(before) if before == after else _of_units(before, count, kept)
        places.append(start + own)
        start += before
    return np.concatenate(places)


def _of_units(size: int, count: int, kept: Int[np.ndarray, "k"]) -> Int[np.ndarray, "_"]:
    """Returns the indices of the units that stay among `size` features."""
    each = size // count
    return (kept[:, None] * each + np.arange(each)).reshape(-1)
