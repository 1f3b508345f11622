"""Which params lose what, over all families: a sliced model computes what the whole one computes
whose removed units nobody reads."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxprune import load
from jaxprune.errors import InputError
from jaxprune.models import Architecture
from jaxprune.recipe_parts import Structure
from jaxprune.structure.shapes import cut, units_of
from jaxprune.structure.sizes import removals
from tests.helpers import families
from tests.helpers.optional import needs_torch

pytestmark = needs_torch
NO_HEADS = "cannot remain in a model of this family: no smaller number can"
STRUCTURES = {
    "heads": Structure(drop_heads=0.5),
    "channels": Structure(drop_channels=0.4, channel_multiple=8),
}
REFUSED = {
    # transformers derives the size of a head, or factors of its rotation, from their number.
    **{("opt", variant, "heads"): NO_HEADS for variant in families.VARIANTS["opt"]},
    **{("gpt_neox", variant, "heads"): NO_HEADS for variant in families.VARIANTS["gpt_neox"]},
    ("phi3", "long", "heads"): NO_HEADS,
    ("qwen2_moe", "window", "channels"): "no smaller multiple of 8 is left",
}


@pytest.fixture(scope="module", params=families.CASES, ids=" ".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, variant = request.param
    folder = tmp_path_factory.mktemp("dense")
    families.save(folder, families.config(family, variant))
    return family, variant, folder


@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_sliced_layer_does_as_a_layer_whose_removed_units_nobody_reads(
    case: tuple[str, str, Path], kind: str
) -> None:
    family, variant, folder = case
    model = load(folder)
    before = model.architecture
    if (family, variant, kind) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[family, variant, kind]):
            removals(before, model.reader.assets, STRUCTURES[kind])
        return
    (removal,) = removals(before, model.reader.assets, STRUCTURES[kind])
    rng, shrunk = np.random.default_rng(0), 0
    for index, stacked in enumerate(model.layers()):
        layer, smaller = before.layers[index], removal.after.layers[index]
        units = units_of(layer, smaller, removal.groups)
        kept = {
            capture: np.sort(rng.permutation(one.count)[: one.keep])
            for capture, one in units.items()
        }
        params = layer.unstack(stacked)
        small = cut(layer, smaller, units, kept, params)
        assert {path: array.shape for path, array in small.items()} == {
            path: smaller.stored[path].shape for path in params
        }
        for one in units.values():
            for reader in one.readers:
                kernel = params[f"{reader}.kernel"].copy()
                size = len(kernel) // one.count
                gone = np.setdiff1d(np.arange(one.count), kept[one.capture])
                kernel.reshape(one.count, size, -1)[gone] = 0
                params[f"{reader}.kernel"] = kernel
        shrunk += bool(units)
        x = rng.normal(size=(1, 40, before.config.hidden_size)).astype(np.float32)
        whole, sliced = (
            jax.jit(one)(jax.device_put(one.stack(own)), x)[0]
            for one, own in ((layer, params), (smaller, small))
        )
        if family not in NORMALIZED or kind != "heads":
            np.testing.assert_allclose(whole, sliced, rtol=1e-4, atol=1e-4)
    assert shrunk >= expected_layers(before, kind)


NORMALIZED = "olmo2", "olmo3", "olmoe"
"""Their norms of queries and keys are over all heads: without some, the others change."""


def expected_layers(architecture: Architecture, kind: str) -> int:
    """The number of layers that have such units."""
    if kind == "channels":
        return len(architecture.layers)
    return sum("linear_attn" not in " ".join(layer.kernels) for layer in architecture.layers)
