"""A checkpoint without some of its experts, as if it had never had them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from convert import Params, Reader
from convert.checkpoint import RenamedReader, part_of
from convert.names import split_expert


class KeptExperts(RenamedReader):
    """Reads a checkpoint's params but for those of some experts; the others are renumbered, and
    routers with them.

    Args:
        reader: reads the whole checkpoint.
        kept: layer index -> the experts that stay, in order.
        routers: layer index -> paths of its routers.
        changes: entries of config.json that count the experts.
    """

    def __init__(
        self,
        reader: Reader,
        kept: Mapping[int, Sequence[int]],
        routers: Mapping[int, Collection[str]],
        changes: Mapping[str, Any],
    ) -> None:
        self._kept = {f"layers.{index}": experts for index, experts in kept.items()}
        self._routers = {
            f"layers.{index}.{path}" for index, paths in routers.items() for path in paths
        }
        renamed = {path: self._renamed(path) for path in reader.spec}
        super().__init__(reader, {new: path for path, new in renamed.items() if new}, changes)
        for path, tensor in self.spec.items():
            experts = self._experts_of(path)
            if experts is not None:
                shape = *tensor.shape[:-1], len(experts)
                self.spec[path] = jax.ShapeDtypeStruct(shape, tensor.dtype)

    def read(self, paths: Iterable[str]) -> Params:
        """Returns the named parameters, in memory; errors as the reader's."""
        found = super().read(paths)
        for path, array in found.items():
            experts = self._experts_of(path)
            if experts is not None:
                found[path] = np.take(array, experts, axis=-1)
        return found

    def _renamed(self, path: str) -> str | None:
        """Returns the path of a param among those that stay; None: it goes."""
        kept, parts = self._kept.get(part_of(path)), split_expert(path)
        if kept is None or parts is None:
            return path
        before, number, rest = parts
        return f"{before}.{kept.index(number)}.{rest}" if number in kept else None

    def _experts_of(self, path: str) -> Sequence[int] | None:
        """Returns the experts of which a router's param has outputs; None: it is no router's."""
        is_router = path.rpartition(".")[0] in self._routers
        return self._kept.get(part_of(path)) if is_router else None
