"""Pruned layers to be tuned, a text to tune on, and what a tuning tells."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxprune import ADMM, Observer, Unstructured, load, prune_layers
from jaxprune.calibration.text_stream import TextStream
from jaxprune.solve.layer_result import LayerResult
from tests.helpers.shapes import windows


class Steps(Observer):
    """Remembers the divergences of steps, those on what is held out, and what the solves made."""

    def __init__(self) -> None:
        self.told: list[float] = []
        self.held_out: list[tuple[int, float]] = []
        self.resumed: list[int] = []
        self.layers: list[LayerResult] = []

    def layer_done(self, result: LayerResult) -> None:
        self.layers.append(result)

    def step_done(self, number: int, steps: int, divergence: float) -> None:
        self.told.append(divergence)
        assert len(self.told) <= steps

    def tuning_resumed(self, step: int) -> None:
        self.resumed.append(step)

    def divergence_measured(self, tokens: int, divergence: float) -> None:
        self.held_out.append((tokens, divergence))


def kept_at(number: int) -> Callable[..., bool]:
    """For `RunStore.worth_saving`, which asks the clock: the step of that number from now is saved,
    and no other."""
    steps = itertools.count(1)
    return lambda *_: next(steps) == number


def pruned(checkpoint: Path, sparsity: float = 0.5) -> list[LayerResult]:
    return list(prune_layers(load(checkpoint), windows(), ADMM(), Unstructured(sparsity)))


def kernel(layer: LayerResult, name: str) -> np.ndarray:
    return layer.params[f"layers.{layer.index}.{name}.kernel"]


def of_ids(tmp_path: Path, held_out: int = 4) -> TextStream:
    ids = np.random.default_rng(1).integers(0, 300, (80, 32))
    np.save(tmp_path / "ids.npy", ids)
    return TextStream(str(tmp_path / "ids.npy"), None, 32, held_out=held_out)
