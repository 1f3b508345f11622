"""What of a tuning stays on the device."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxprune import load
from jaxprune.costs.program import size_of
from jaxprune.costs.shapes import Shapes
from jaxprune.distill import tuning_costs
from jaxprune.distill.placement import Placement, placement_of
from jaxprune.distill.schedule import TuningSteps
from jaxprune.hardware import HEADROOM
from jaxprune.models import architecture_of
from jaxprune.recipe_parts import Structure, Tuning
from jaxprune.sharding import ONE_DEVICE
from jaxprune.structure.sizes import smaller_architecture
from tests.helpers import cgroups, families, tiny


def test_what_fits_stays_on_the_device(checkpoint: Path) -> None:
    architecture = load(checkpoint).architecture
    weights = sum(n * m for n, m in architecture.kernel_shapes().values())
    found = [placement_of(architecture, (1, 64), device_bytes=free) for free in (0, 1e6, 1e7)]
    assert found[0] == Placement(state=False, results=False)
    assert found[-1] == Placement(state=True, results=True)
    assert placement_of(architecture, (1, 64), device_bytes=4.0 * weights) == Placement(
        state=False, results=False
    )
    assert placement_of(architecture, (1, 64)) == Placement(state=True, results=True)
    # What stays leaves room for a batch of the dense model.
    fits = [
        placement_of(architecture, (1, 64), device_bytes=1e7, batch_tokens=n).state
        for n in (64, 2**20)
    ]
    assert fits == [True, False]


def test_results_do_not_stay_where_a_container_has_little_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = load(checkpoint).architecture
    assert placement_of(architecture, (4, 64)) == Placement(state=True, results=True)
    cgroups.limit(tmp_path, monkeypatch, 2**20)
    assert placement_of(architecture, (4, 64)) == Placement(state=True, results=False)


def test_a_model_that_drops_experts_leaves_room_for_the_dense_one(tmp_path: Path) -> None:
    families.config(
        "qwen3_moe", "mixed", num_local_experts=64, moe_intermediate_size=1024
    ).save_pretrained(tmp_path)
    dense = architecture_of(tmp_path, jnp.float32)
    fewer = smaller_architecture(dense, tmp_path, Structure(drop_experts=0.75))
    fits = [
        tuple(
            placement_of(fewer, (1, 8), teacher=t, device_bytes=size, batch_tokens=8).state
            for t in (None, dense)
        )
        for size in (2.8e7, 3.6e7, 1e8)
    ]
    assert fits == [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize(
    "wanted", [Placement(state=True, results=False), Placement(state=True, results=True)]
)
def test_what_just_fits_a_device_fits_as_runs_are_planned(
    wanted: Placement, tmp_path: Path
) -> None:
    tiny.config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=80).save_pretrained(
        tmp_path
    )
    architecture = architecture_of(tmp_path, jnp.bfloat16)
    steps = TuningSteps.of(Tuning(tune_epochs=2), 8, 512)

    def place(device_bytes: float) -> Placement:
        return placement_of(architecture, steps.shape, device_bytes=device_bytes, batch_tokens=2048)

    low, high = 1e6, 1e11
    while high > 1.001 * low:
        between = (low * high) ** 0.5
        low, high = (low, between) if place(between) >= wanted else (between, high)
    assert place(high) == wanted
    shapes = Shapes(architecture, jnp.bfloat16, ONE_DEVICE, 2048, high)
    for program in tuning_costs.programs(shapes, steps, wanted):
        assert program.resident + size_of(program.arguments) < HEADROOM * high, program.name
