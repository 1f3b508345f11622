"""Pruned layers, and those that a run has finished already."""

import dataclasses
import logging
import math
from typing import Any

import numpy as np
from jaxtyping import UInt8

from convert import Params
from convert.errors import DamagedError
from convert.schema import Count, Schema, check, plain
from jaxprune.pruning.journal import DamagedEntryError, Journal
from jaxprune.pruning.kernel import KernelResult

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """One pruned layer; `layer["mlp.down_proj"]` is what became of a kernel.

    Attributes:
        index: the index of the layer, from 0.
        params: all params of the layer, on the host, as they are to be stored; paths as in the
            checkpoint.
        kernels: path of the linear layer inside the decoder layer -> what became of its kernel.
        masks: path of the linear layer -> its mask, packed as in a mask file; see `sparsity.masks`.
        seconds: the seconds by phase; `read` is the time spent waiting for the reader.
        resumed: whether an earlier process of the same run pruned it.
    """

    index: int
    params: Params
    kernels: dict[str, KernelResult]
    masks: dict[str, UInt8[np.ndarray, "m _"]]
    seconds: dict[str, float]
    resumed: bool = False

    def __getitem__(self, path: str) -> KernelResult:
        return self.kernels[path]

    def without_arrays(self) -> "LayerResult":
        """Returns the same without params and masks."""
        return dataclasses.replace(self, params={}, masks={})

    def as_json(self) -> dict[str, Any]:
        """Returns all but the arrays, as journals and records keep it; see
        `reporting.schema.Layer`."""
        kernels = {}
        for path, kernel in self.kernels.items():
            values = kernel._asdict().items()
            kernels[path] = {
                "stats" if name == "metrics" else name: value for name, value in values
            }
            if not kernel.sections:
                del kernels[path]["sections"]
        return plain({"index": self.index, "seconds": self.seconds, "linears": kernels})


class Results:
    """The layers of one stage of a run in its journal.

    Args:
        journal: the journal of the run; None: nothing is kept.
        stage: a name.
        count: number of the model's layers.
    """

    def __init__(self, journal: Journal | None, stage: str, count: int) -> None:
        self.journal, self.stage, self._count = journal, stage, count

    def __contains__(self, index: int) -> bool:
        return self.journal is not None and f"{self.stage}/{index}" in self.journal

    def whole(self) -> bool:
        """Returns whether all layers are there, each as it was written."""
        every = range(self._count)
        return all(index in self for index in every) and all(
            self.get(index) is not None for index in every
        )

    def require(self, index: int) -> LayerResult:
        """Returns a layer that the run has finished.

        Raises:
            DamagedEntryError: it was damaged meanwhile.
        """
        if layer := self.get(index):
            return layer
        raise DamagedEntryError(
            f"layer {index} was damaged on the disk while it was used: run the same command again"
        )

    def put(self, layer: LayerResult) -> None:
        """Commits a layer, unless it is there."""
        if self.journal and layer.index not in self:
            arrays = {f"params.{path}": array for path, array in layer.params.items()}
            arrays |= {f"masks.{path}": mask for path, mask in layer.masks.items()}
            self.journal.put(f"{self.stage}/{layer.index}", arrays, layer.as_json())

    def get(self, index: int) -> LayerResult | None:
        """Returns a layer; None where it is missing or damaged. A damaged one is removed."""
        if self.journal is None or index not in self:
            return None
        name = f"{self.stage}/{index}"
        entry = self.journal.get(name)
        found = entry and self._checked(entry.metadata, name)
        if entry is None or found is None:
            self.journal.drop(name)
            return None
        arrays: dict[str, Params] = {"params": {}, "masks": {}}
        for path, array in entry.arrays.items():
            kind, _, rest = path.partition(".")
            arrays[kind][rest] = array
        kernels = {path: kernel.result() for path, kernel in found.linears.items()}
        return LayerResult(
            index, arrays["params"], kernels, arrays["masks"], found.seconds, resumed=True
        )

    def _checked(self, metadata: dict[str, Any], name: str) -> "_Layer | None":
        """Returns what `LayerResult.as_json` gave; None where it is something else, which is
        said."""
        assert self.journal
        try:
            return check(
                _Layer, metadata, file=self.journal.folder / f"{name}.json", entry="figures"
            )
        except DamagedError as error:
            log.warning("%s; it will be made again", error)
            return None


class _Kernel(Schema):
    error: float | None
    zeros: Count
    wanted: Count
    size: Count
    stats: dict[str, float | None]
    sections: dict[str, Count] = {}

    def result(self) -> KernelResult:
        """Returns what became of a kernel."""
        metrics = {name: _number(value) for name, value in self.stats.items()}
        return KernelResult(
            _number(self.error), self.zeros, self.wanted, self.size, metrics, self.sections
        )


class _Layer(Schema):
    seconds: dict[str, float]
    linears: dict[str, _Kernel]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
