"""Public checkpoints by their configuration: names and shapes of all tensors are those of
transformers' model."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from convert.names import expert_path, naming_of
from convert.stored import tensors_of
from jaxprune.models import architecture_of
from tests.helpers import public
from tests.helpers.families import linears
from tests.helpers.optional import needs_torch, torch


@needs_torch
@pytest.mark.parametrize(("family", "name"), public.CASES)
def test_shapes_are_those_of_transformers(family: str, name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    written = {"model_type": family, **public.PUBLIC[family][name]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    expected = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }
    # as it is called inside, not in files
    if "lm_head.weight" in expected and family == "gpt_neox":
        expected["embed_out.weight"] = expected.pop("lm_head.weight")
    naming, spec = (
        naming_of({"model_type": family}, ()),
        architecture_of(tmp_path, jnp.bfloat16).spec,
    )
    if not naming.stacked:
        expected = {
            own: size
            for name, shape in expected.items()
            for own, size in apart(name, shape, family)
        }
    found = {}
    for name, paths in tensors_of(spec, naming).items():
        shape = spec[paths[0]].shape
        found[name] = (
            (len(paths), *shape)
            if len(paths) > 1
            else shape[::-1]
            if paths[0].endswith(".kernel")
            else shape
        )
    assert found == expected


def apart(name: str, shape: tuple[int, ...], family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the tensors of experts that one of transformers' module holds, as a checkpoint has
    them."""
    parts = linears(name.removesuffix(".weight"), family)
    if len(shape) < 3 or "experts" not in name:
        yield (
            (f"{parts[0]}.weight" if name.endswith(".weight") and ".layers." in name else name),
            shape,
        )
        return
    for expert in range(shape[0]):
        for part in parts:
            yield f"{expert_path(part, expert)}.weight", (shape[1] // len(parts), shape[2])
