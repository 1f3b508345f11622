"""Pruned layers, and those that a run has finished already."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import UInt8

from convert import Params
from convert.errors import DamagedError
from convert.schema import Schema, check
from jaxprune.commands.terminal import console
from jaxprune.pruning.journal import Journal
from jaxprune.pruning.kernel import LinearResult
from jaxprune.reporting import schema


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """One pruned layer.

    Attributes:
        index: of the layer, from 0.
        params: all params of the layer, on the host, as they are to be stored; paths as in the checkpoint.
        linears: path of the linear inside the layer -> its outcome.
        masks: path of the linear -> its mask, packed as in a mask file; see `masks`.
        seconds: by stage; `read` is the time spent waiting for the reader.
        resumed: whether an earlier process of the same run pruned it.
    """

    index: int
    params: Params
    linears: dict[str, LinearResult]
    masks: dict[str, UInt8[np.ndarray, "m _"]]
    seconds: dict[str, float]
    resumed: bool = False

    def figures(self) -> dict[str, Any]:
        """All but the arrays, as JSON; see `schema.Layer`."""
        linears = {path: linear._asdict() for path, linear in self.linears.items()}
        return schema.plain({"index": self.index, "seconds": self.seconds, "linears": linears})


class Results:
    """The layers of one stage of a run in its journal.

    Args:
        journal: of the run; None: nothing is kept.
        stage: a name.
        count: of the model's layers.
    """

    def __init__(self, journal: Journal | None, stage: str, count: int) -> None:
        self.journal, self.stage, self._count = journal, stage, count

    def __contains__(self, index: int) -> bool:
        return self.journal is not None and f"{self.stage}/{index}" in self.journal

    def whole(self) -> list[LayerResult]:
        """All layers in order; none where one is missing or damaged."""
        if not all(index in self for index in range(self._count)):
            return []
        layers = [layer for index in range(self._count) if (layer := self.get(index))]
        return layers if len(layers) == self._count else []

    def put(self, layer: LayerResult) -> None:
        """Commits a layer, unless it is there."""
        if self.journal and layer.index not in self:
            arrays = {f"params.{path}": array for path, array in layer.params.items()}
            arrays |= {f"masks.{path}": mask for path, mask in layer.masks.items()}
            self.journal.put(f"{self.stage}/{layer.index}", arrays, layer.figures())

    def get(self, index: int) -> LayerResult | None:
        """A layer; None where it is missing or damaged; a damaged one is removed."""
        if self.journal is None or index not in self:
            return None
        name = f"{self.stage}/{index}"
        entry = self.journal.get(name)
        figures = entry and self._figures(entry.figures, name)
        if entry is None or figures is None:
            self.journal.drop(name)
            return None
        arrays: dict[str, Params] = {"params": {}, "masks": {}}
        for path, array in entry.arrays.items():
            kind, _, rest = path.partition(".")
            arrays[kind][rest] = array
        linears = {path: linear.result() for path, linear in figures.linears.items()}
        return LayerResult(index, arrays["params"], linears, arrays["masks"], figures.seconds, resumed=True)

    def _figures(self, figures: dict[str, Any], name: str) -> "_Layer | None":
        """As `LayerResult.figures` gives them; None where they are something else, which is said."""
        assert self.journal
        try:
            return check(_Layer, figures, file=self.journal.folder / f"{name}.json", entry="figures")
        except DamagedError as error:
            console.print(f"{error}; it will be made again")
            return None


class _Linear(Schema):
    error: float | None
    zeros: schema.Count
    wanted: schema.Count | None = None
    size: schema.Count
    stats: dict[str, float | None]

    def result(self) -> LinearResult:
        """A journal of version 1 does not say what was wanted; what it found is taken for it."""
        wanted = self.zeros if self.wanted is None else self.wanted
        stats = {name: _number(value) for name, value in self.stats.items()}
        return LinearResult(_number(self.error), self.zeros, wanted, self.size, stats)


class _Layer(Schema):
    seconds: dict[str, float]
    linears: dict[str, _Linear]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
