"""What can be said of accelerators without one: all programs of a run lower for them, as accurate
as here."""

import dataclasses
import re
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxprune import ADMM, load, methods
from jaxprune.costs.program import Program
from jaxprune.costs.shapes import Shapes
from jaxprune.distill import tuning_costs
from jaxprune.distill.placement import Placement
from jaxprune.distill.schedule import TuningSteps
from jaxprune.evaluation import perplexity
from jaxprune.hardware import Hardware, writing_for
from jaxprune.models.common.attention import cudnn_takes
from jaxprune.recipe_parts import Tuning
from jaxprune.sharding import ONE_DEVICE
from jaxprune.solve import layer_costs, sensitivity
from jaxprune.sparsity.patterns import NM, Unstructured

BY_PARTS = "lhs_precision_type = bf16, rhs_precision_type = bf16, accumulation_type = f32"
HARDWARE = {"cpu": Hardware("cpu"), "cuda": Hardware("gpu", 9.0), "tpu": Hardware("tpu")}


def lower(program: Program, platform: str) -> str:
    with writing_for(HARDWARE[platform]):
        return program.lowered(platform)


def all_programs(checkpoint: Path, dtype: str) -> Iterator[Program]:
    shapes = Shapes(load(checkpoint, dtype=dtype).architecture, dtype, ONE_DEVICE)
    for name in methods.names():
        yield from layer_costs.programs(shapes, 4, 512, methods.load(name)(), Unstructured(0.5))
    yield from layer_costs.programs(shapes, 4, 512, ADMM(), NM(2, 4))
    yield from sensitivity.programs(shapes, 4, 512)
    for placement in (Placement(True, True), Placement(True, False), Placement(False, False)):
        steps = TuningSteps.of(Tuning(tune_epochs=2, tune_gradual=0.5), 4, 512)
        yield from tuning_costs.programs(shapes, steps, placement)
    yield from perplexity.programs(shapes, 4, 512)


def test_16_bit_products_on_cpus_have_float32_results(checkpoint: Path) -> None:
    """XLA's CPU backend multiplies no others in 16 bits: it widens their operands first."""
    shapes = Shapes(load(checkpoint, dtype="bfloat16").architecture, "bfloat16", ONE_DEVICE)
    phases = [sensitivity.programs(shapes, 4, 512), perplexity.programs(shapes, 4, 512)]
    phases += [
        tuning_costs.programs(
            shapes, TuningSteps.of(Tuning(tune_epochs=2), 4, 512), Placement(True, True)
        )
    ]
    lowered = "\n".join(lower(program, "cpu") for phase in phases for program in phase)
    products = re.findall(r"stablehlo.dot_general .*: (.*)", lowered)
    assert len(products) > 20
    assert all(
        re.fullmatch(r"\(tensor<\S*xbf16>, tensor<\S*xbf16>\) -> tensor<\S*xf32>", p)
        for p in products
    )


@pytest.mark.parametrize(
    ("platform", "dtype"),
    [
        ("cuda", "bfloat16"),
        ("tpu", "float32"),
        pytest.param("cuda", "float32", marks=pytest.mark.slow),
        pytest.param("tpu", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_program_lowers_for_accelerators_and_keeps_float32(
    platform: str, dtype: str, checkpoint: Path
) -> None:
    lowered = [(program, lower(program, platform)) for program in all_programs(checkpoint, dtype)]
    exact = [text for program, text in lowered if dtype == "float32" or program.phase == "solve"]
    others = [text for program, text in lowered if dtype == "bfloat16" and program.phase != "solve"]
    assert not re.search(
        r"stablehlo.dot_general .*\((tensor<[^>]*xf32>,|tensor<[^>]*>, tensor<[^>]*xf32>)",
        "\n".join(others),
    )
    products = re.findall(
        r"stablehlo.dot_general .*\(tensor<[^>]*xf32>, tensor<[^>]*xf32>\)", "\n".join(exact)
    )
    assert len(products) > 20
    assert [
        one for one in products if "[HIGHEST, HIGHEST]" not in one and BY_PARTS not in one
    ] == []
    assert any(BY_PARTS in one for one in products) == (platform == "cuda")


@pytest.mark.parametrize(
    ("platform", "own", "others"),
    [
        ("cuda", "cusolver_potrf", ["stablehlo.cholesky"]),
        ("tpu", "stablehlo.cholesky", ["cusolver"]),
        ("cpu", "stablehlo.while", ["potrf", "cholesky"]),
    ],
)
def test_what_is_lowered_is_what_would_run_there(
    platform: str, own: str, others: list[str]
) -> None:
    matrix = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    text = lower(Program("solve", "prepare", ADMM().prepare, (matrix,), 1), platform)
    assert own in text and not [other for other in others if other in text]
    assert platform == "cpu" or text.count("stablehlo.while") <= 8


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_inverses_program_does_not_grow_with_the_matrix(platform: str) -> None:
    shapes = [jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (4096, 11008)]
    small, large = (
        lower(Program("solve", "prepare", ADMM().prepare, (s,), 1), platform) for s in shapes
    )
    assert len(large.splitlines()) < 1.05 * len(small.splitlines())


@pytest.mark.parametrize(
    ("capability", "dtype", "length", "width", "takes"),
    [
        ("9.0", "bfloat16", 512, 128, True),
        ("12.0", "float16", 512, 64, True),
        ("8.0", "bfloat16", 511, 128, False),
        ("8.0", "bfloat16", 512, 256, False),
        ("8.0", "float32", 512, 128, False),
        ("7.5", "float16", 512, 128, False),
        ("gfx942", "bfloat16", 512, 128, False),
        (None, "bfloat16", 512, 128, False),
    ],
)
def test_cudnn_gets_what_it_takes(
    capability: str | None, dtype: str, length: int, width: int, takes: bool
) -> None:
    query = jnp.zeros((1, length, 2, width), dtype)
    found = Hardware.of(
        types.SimpleNamespace(
            platform="gpu", **{"compute_capability": capability} if capability else {}
        )
    )
    assert found.capability == (float(capability) if capability and capability[0].isdigit() else 0)
    with writing_for(found):
        assert cudnn_takes(query) == takes
    with writing_for(dataclasses.replace(found, cudnn=False)):
        assert not cudnn_takes(query)
