"""The params of one layer at most are on the device, whatever is done to the model."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxprune import load
from jaxprune.commands.prune import main
from jaxprune.streaming.model import StreamedModel
from tests.helpers import families, tiny
from tests.helpers.optional import needs_torch

LINE = "--nsamples 4 --seqlen 32"
Content = tuple[tuple[int, ...], str, bytes]


def content(array: Any) -> Content:
    return array.shape, array.dtype.name, np.asarray(array).tobytes()


def of_layers(folder: Path) -> dict[Content, int]:
    """What each layer's dense params hold -> the layer; pruning leaves norms as they are."""
    layers = enumerate(load(folder).layers())
    return {content(array): index for index, params in layers for array in params.values()}


@contextmanager
def watched(folder: Path) -> Iterator[list[set[int]]]:
    """Yields the layers whose params are on the device each time that a layer was put there, and
    each time that one was applied."""
    known, found = of_layers(folder), []

    def look() -> None:
        live = [array for array in jax.live_arrays() if not array.is_deleted()]
        found.append({known[key] for key in map(content, live) if key in known})

    def looking(name: str, patch: pytest.MonkeyPatch) -> None:
        real = getattr(StreamedModel, name)

        def call(self: StreamedModel, *args: Any, **options: Any) -> Any:
            result = real(self, *args, **options)
            look()
            return result

        patch.setattr(StreamedModel, name, call)

    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        looking("put_layer", patch)
        looking("forward", patch)
        yield found


def require_one_at_a_time(folder: Path, text: Path, line: str) -> None:
    argv = ["--ckpt", str(folder), "--calib", str(text), *LINE.split(), *line.split()]
    if "--drop-channels" not in argv and "--drop-parameters" not in argv:
        argv += ["--sparsity", "0.5"]
    argv += ["--eval-text", str(text)] if "--eval" in argv else ["--eval", "none"]
    with watched(folder) as found:
        assert main([*argv, "--out", str(folder.with_name("out"))]) == 0
    assert set().union(*found) == {0, 1, 2, 3}
    assert max(map(len, found)) == 1, found


@pytest.mark.parametrize(
    "line",
    [
        "--method admm --asymmetry 0.5",
        "--weigh-outputs --max-deviation 0.2",
        "--method wanda --quantize q4_0",
        "--method magnitude --eval ppl --eval-windows 2",
        "--drop-heads 0.5 --drop-channels 0.34 --channel-multiple 8",
        "--drop-parameters 0.3 --channel-multiple 8",
    ],
)
def test_one_layer_is_on_the_device_at_a_time(line: str, text: Path, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "dense", tiny.config(num_hidden_layers=4))
    require_one_at_a_time(folder, text, line)


@needs_torch
@pytest.mark.parametrize("line", ["--drop-experts 0.34", "--method wanda --route-all"])
def test_one_layer_with_its_experts_is_on_the_device_at_a_time(
    line: str, text: Path, tmp_path: Path
) -> None:
    families.save(tmp_path / "dense", families.config("olmoe", "plain", num_hidden_layers=4))
    require_one_at_a_time(tmp_path / "dense", text, line)
