"""Arrays and checkpoints with zeros, without a pruning."""

from pathlib import Path

import ml_dtypes
import numpy as np

from convert import create_checkpoint, open_checkpoint, parts


def zeroed(shape: tuple[int, int], density: float, dtype: str, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    array = generator.standard_normal(shape).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    array[generator.random(shape) >= density] = 0
    return array


def grouped(shape: tuple[int, int], n: int, m: int, dtype: str = "bfloat16") -> np.ndarray:
    array = zeroed(shape, 1, dtype)
    order = np.random.default_rng(1).random((shape[0], shape[1] // m, m)).argsort(axis=2)
    array.reshape(order.shape)[order >= n] = 0
    return array


def pruned(source: Path, target: Path, pattern: str = "0.6") -> Path:
    """Writes a checkpoint with zeros in its layers' kernels, one of them negative."""
    reader = open_checkpoint(source)
    with create_checkpoint(target, reader.spec, reader.assets) as writer:
        for paths in parts(reader.spec).values():
            params = reader.read(paths)
            for path in paths:
                if path.startswith("layers.") and path.endswith(".kernel"):
                    shape = params[path].shape[::-1]
                    n, _, m = pattern.partition(":")
                    like = (
                        grouped(shape, int(n), int(m)) if m else zeroed(shape, float(n), "float32")
                    )
                    kernel = np.where(like.T != 0, params[path], 0).astype(params[path].dtype)
                    kernel[np.unravel_index(np.abs(kernel).argmax(), kernel.shape)] = -0.0
                    params[path] = kernel
            writer.write(params)
    return target
