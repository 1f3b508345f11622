"""Pruned layers, and how a run saves them."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import UInt8

from convert import Params
from convert.schema import Count, Schema, check, plain
from jaxprune.pruning.kernel import KernelResult
from jaxprune.pruning.store import RunStore, Saved, Stage, flat, grouped


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
        """Returns all but the arrays, as run stores and records have it; see
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


def saved_layers(store: RunStore | None, stage: str) -> Stage[LayerResult]:
    """Returns the layers that a stage of a run saves; none where there is no store."""
    return Stage(store, stage, _save, _load)


def _save(layer: LayerResult) -> Saved:
    return Saved(flat(params=layer.params, masks=layer.masks), layer.as_json())


def _load(index: int, saved: Saved) -> LayerResult:
    found = check(_Layer, saved.figures, file=f"layer {index}", entry="figures")
    kernels = {path: kernel.result() for path, kernel in found.linears.items()}
    arrays = grouped(saved.arrays)
    return LayerResult(
        index, arrays["params"], kernels, arrays["masks"], found.seconds, resumed=True
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
