"""A checkpoint read as if its weights were stored in another dtype."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from convert.checkpoint import DerivedReader, Params, Reader, Spec, preferred_dtype
from convert.errors import Change, InputError

DTYPES = ("float16", "bfloat16", "float32")
"""The dtypes that a result can be stored in."""
WIDER = {"float16": "bfloat16", "bfloat16": "float32"}
"""Dtype -> one with a wider range."""


class CastReader(DerivedReader):
    """Reads a checkpoint's params in another dtype; params that are not floating-point numbers stay
    as they are.

    Args:
        reader: reads the checkpoint.
        dtype: the dtype of the params.
        changes: entries of config.json that name the dtype.
    """

    def __init__(
        self,
        reader: Reader,
        dtype: DTypeLike,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(reader, cast_spec(reader.spec, dtype), changes)

    def read(self, paths: Iterable[str]) -> Params:
        """Returns the named parameters, in memory; errors as the reader's.

        Raises:
            InputError: the dtype cannot hold a number of them.
        """
        params = self._reader.read(paths)
        for path in list(params):  # one after another, so that only one is there in both dtypes
            params[path] = cast(path, params[path], self.spec[path].dtype)
        return params

    def require_range(self) -> None:
        """Reads all params but kernels, which are many and never that large.

        Raises:
            InputError: the dtype cannot hold a number of them.
        """
        for path in self.spec:
            if not path.endswith(".kernel"):
                self.read([path])


def cast_spec(spec: Spec, dtype: DTypeLike) -> Spec:
    """Returns a checkpoint's shapes and dtypes when its floating-point numbers are cast."""
    return {
        path: jax.ShapeDtypeStruct(
            tensor.shape, np.dtype(dtype) if _is_float(tensor.dtype) else tensor.dtype
        )
        for path, tensor in spec.items()
    }


def cast(path: str, array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Returns an array in another dtype, each number rounded to the nearest.

    Args:
        path: of the param, for errors.
        array: finite numbers.
        dtype: the dtype.

    Raises:
        InputError: the dtype cannot hold a number.
    """
    if array.dtype == dtype:
        return array
    most = float(jnp.finfo(dtype).max)
    largest = max(float(array.max(initial=0)), -float(array.min(initial=0)))
    if largest > most:
        name = np.dtype(dtype).name
        raise InputError(
            f"{name} cannot hold a number of this size",
            entry=path,
            found=largest,
            wanted=f"at most {most:g}",
            options={"save_dtype": WIDER.get(name, Change.OMIT)},
        )
    return array.astype(dtype)


def saving_dtype(reader: Reader, asked: DTypeLike | None = None) -> np.dtype | None:
    """Returns the dtype that the weights of a result are cast to.

    Args:
        reader: the reader of the dense checkpoint.
        asked: the dtype that is asked for; None: the checkpoint's `preferred_dtype`.

    Returns:
        The dtype; None: each param is stored in the dtype that it has.

    Raises:
        InputError: no result can be stored in the dtype that is asked for.
    """
    dtype = preferred_dtype(reader) if asked is None else np.dtype(asked)
    if asked is not None and dtype is not None and dtype.name not in DTYPES:
        problem = f"no result can be stored in {dtype.name}: {', '.join(DTYPES)} can be chosen"
        raise InputError(problem, options={"save_dtype": Change.OTHER})
    return None if dtype is None or cast_spec(reader.spec, dtype) == reader.spec else dtype


def common_dtype(spec: Spec) -> np.dtype | None:
    """Returns the dtype of all floating-point params of a checkpoint; None: they have several."""
    found = {np.dtype(tensor.dtype) for tensor in spec.values() if _is_float(tensor.dtype)}
    return found.pop() if len(found) == 1 else None


def _is_float(dtype: DTypeLike) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))
