"""The results of pruned layers, and how the run store saves them."""

import dataclasses
from typing import Annotated

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from convert import Params
from convert.schema import Count, check, dump
from jaxprune.run_store.store import RunStore, Saved, Stage, flat, grouped
from jaxprune.solve.kernel import KernelResult


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """Statistics of one pruned layer; `layer["mlp.down_proj"]` are those of a kernel.

    Attributes:
        index: the index of the layer, from 0.
        seconds: seconds by phase; `read` is the time spent waiting for the reader.
        kernels: path of the linear layer inside the decoder layer -> statistics of its kernel.
    """

    index: Count
    seconds: dict[str, float]
    kernels: Annotated[dict[str, KernelResult], Field(min_length=1)]

    def __getitem__(self, path: str) -> KernelResult:
        return self.kernels[path]

    @property
    def zeros(self) -> int:
        """Zeros of the layer's kernels."""
        return sum(kernel.zeros for kernel in self.kernels.values())

    @property
    def size(self) -> int:
        """Number of weights of the layer's kernels."""
        return sum(kernel.size for kernel in self.kernels.values())


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """One pruned layer; `layer["mlp.down_proj"]` are the statistics of a kernel.

    Attributes:
        figures: the layer's statistics.
        params: all params of the layer in their stored dtypes, on the host, by their paths in the
            checkpoint.
        masks: path of the linear layer -> its mask, packed as in a mask file; see `sparsity.masks`.
        resumed: whether an earlier process of the same run pruned it.
    """

    figures: LayerSummary
    params: Params
    masks: dict[str, UInt8[np.ndarray, "m _"]]
    resumed: bool = False

    def __getitem__(self, path: str) -> KernelResult:
        return self.figures[path]

    @property
    def index(self) -> int:
        return self.figures.index

    @property
    def kernels(self) -> dict[str, KernelResult]:
        return self.figures.kernels


SavedLayers = Stage[LayerResult]


def saved_layers(store: RunStore | None, stage: str) -> SavedLayers | None:
    """Returns the saved layers of a stage; None without a store."""
    return Stage(store, stage, _save, _load) if store else None


def _save(layer: LayerResult) -> Saved:
    return Saved(flat(params=layer.params, masks=layer.masks), dump(layer.figures))


def _load(index: int, saved: Saved) -> LayerResult:
    figures = check(LayerSummary, saved.figures, file=f"layer {index}", entry="figures")
    arrays = grouped(saved.arrays)
    return LayerResult(figures, arrays["params"], arrays["masks"], resumed=True)
