"""What a run costs, counted beforehand: FLOPs by hand, programs against the run's own, memory
against allocation."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxprune import ADMM, ALPS, Unstructured, load, prune_layers
from jaxprune.calibration.text_stream import HELD_OUT, windows_held_out
from jaxprune.costs.flops import BF16X6, count_flops
from jaxprune.costs.program import Program
from jaxprune.costs.shapes import Shapes
from jaxprune.distill import tuning_costs
from jaxprune.distill.placement import Placement
from jaxprune.distill.schedule import TuningSteps
from jaxprune.hardware import Hardware, writing_for
from jaxprune.methods.linalg import matmul
from jaxprune.models.common.attention import causal_attention
from jaxprune.recipe_parts import Tuning
from jaxprune.sharding import ONE_DEVICE
from jaxprune.solve import layer_costs, sensitivity
from jaxprune.solve.gram_matrices import accumulate
from jaxprune.solve.sensitivity import backward, measure_sensitivity
from jaxprune.streaming.hidden_states import batch_size
from jaxprune.streaming.model import apply_layer
from tests.helpers.shapes import windows


def shapes(checkpoint: Path) -> Shapes:
    return Shapes(load(checkpoint).architecture, jnp.float32, ONE_DEVICE)


def flops(function: object, *shapes: tuple[int, ...]) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return sum(count_flops(jax.make_jaxpr(function)(*arguments)).values())


def test_flops_are_those_of_products_and_factorizations() -> None:
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert (
        flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7))
        == 4 * 2 * 3 * 5 * 7
    )
    assert flops(jnp.linalg.cholesky, (6, 6)) == 6**3 / 3
    assert flops(lambda a: a + a, (6, 6)) == 0


def test_what_no_result_needs_is_not_counted() -> None:
    def function(a: jax.Array, b: jax.Array) -> jax.Array:
        unused = jax.jit(jnp.matmul)(a, b)
        del unused
        return jax.jit(jnp.matmul)(a, a)

    assert flops(function, (4, 4), (4, 4)) == 2 * 4**3


def test_loops_and_branches() -> None:
    def loop(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda _, x: a @ x, a)

    def branch(a: jax.Array) -> jax.Array:
        return jax.lax.cond(a[0, 0] > 0, lambda: a, lambda: a @ a @ a)

    assert flops(loop, (4, 4)) == 5 * 2 * 4**3
    assert flops(branch, (4, 4)) == 2 * 2 * 4**3


@pytest.mark.parametrize("window", [None, 100])
def test_cudnns_attention_is_counted(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("check_cudnn_version", 91000), ("check_is_flash_attention", None)):
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_, found=found, **__: found)
    query, key = (jax.ShapeDtypeStruct((2, 512, heads, 64), jnp.bfloat16) for heads in (8, 4))
    attention = partial(causal_attention, window=window)

    def gradient(query: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(attention, query, key, key)[1](query)

    pairs = sum(min(token + 1, window or 512) for token in range(512))
    with writing_for(Hardware("gpu", 9.0, cudnn=True)):
        forward, both = (
            jax.make_jaxpr(attention)(query, key, key),
            jax.make_jaxpr(gradient)(query, key),
        )
    assert count_flops(forward) == {"bfloat16": 2 * 2 * 2 * 8 * 64 * pairs}
    assert count_flops(both) == {"bfloat16": 2 * 7 * 2 * 8 * 64 * pairs}


def test_products_by_parts_are_counted_apart() -> None:
    def function(a: jax.Array) -> jax.Array:
        return matmul(a, matmul(a, a).astype(jnp.bfloat16).astype(jnp.float32))

    a = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    for capability, kind in ((9.0, BF16X6), (8.9, "float32")):
        with writing_for(Hardware("gpu", capability)):
            assert Program("solve", "two products", function, (a,), 1).flops() == {
                kind: 2 * 2 * 4**3
            }


def test_a_layer_is_counted_as_by_hand(checkpoint: Path) -> None:
    model = load(checkpoint).architecture
    length, count = 16, 4
    found = {
        p.name: p
        for p in layer_costs.programs(shapes(checkpoint), count, length, ADMM(), Unstructured(0.5))
    }
    tokens = length * batch_size(count, length)
    layer = model.layers[0]
    weights = sum(n * m for n, m in layer.kernels.values())
    n, m = layer.kernels["mlp.down_proj"]
    attention = 4 * tokens * length * model.width  # one segment, so the masked half is computed
    grams = 2 * tokens * sum(layer.features(capture) ** 2 for capture in layer.reads)
    total = {name: sum(program.flops().values()) for name, program in found.items()}
    assert total["forward"] == 2 * tokens * weights + attention
    assert total["forward and Gram matrices"] == total["forward"] - 2 * tokens * n * m + grams
    assert total["solve mlp.down_proj"] == 20 * 2 * n * n * m
    assert found["forward"].calls == (len(model.layers) - 1) * count / batch_size(count, length)


def test_the_programs_are_those_of_a_run(checkpoint: Path) -> None:
    """The run compiles nothing that the programs do not name, and calls them with the same
    shapes."""
    model, tokens = load(checkpoint), windows(4, 16)
    named = [*layer_costs.programs(shapes(checkpoint), 4, 16, ADMM(), Unstructured(0.5))]
    named += sensitivity.programs(shapes(checkpoint), 4, 16)

    def compile_by_name(function: object, wanted: Iterable[Program]) -> None:
        for program in wanted:
            inner = getattr(program.function, "func", program.function)
            if inner is function:
                jax.block_until_ready(
                    inner(*program.function.args, *jax.tree.map(_zeros, program.arguments))
                )

    for function in (accumulate, apply_layer, backward):
        function.clear_cache()
        compile_by_name(function, named)
    before = [function._cache_size() for function in (accumulate, apply_layer, backward)]
    assert min(before) > 0
    for _ in prune_layers(model, tokens, ADMM(), Unstructured(0.5)):
        pass
    measure_sensitivity(model, tokens)
    assert [function._cache_size() for function in (accumulate, apply_layer, backward)] == before


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def test_a_dense_model_that_goes_along_is_counted(checkpoint: Path) -> None:
    def named(asymmetry: bool) -> dict[str, Program]:
        every = layer_costs.programs(
            shapes(checkpoint), 4, 16, ADMM(), Unstructured(0.5), asymmetry=asymmetry
        )
        return {program.name: program for program in every}

    alone, along = named(False), named(True)
    targets = {
        f"target of {name.removeprefix('solve ')}" for name in alone if name.startswith("solve ")
    }
    assert targets and along.keys() == alone.keys() | targets
    name = "forward and Gram matrices"
    assert sum(along[name].flops().values()) > 2 * sum(alone[name].flops().values())
    assert along[name].peak_bytes() > alone[name].peak_bytes()
    assert all(along[target].peak_bytes() > 0 for target in targets)


@pytest.mark.parametrize("method", [ADMM(), ALPS()])
def test_peaks_are_at_least_what_is_alive(method: object, checkpoint: Path) -> None:
    layer = load(checkpoint).architecture.layers[0]
    weights = 4 * sum(param.size for param in layer.spec.values())
    grams = 4 * sum(layer.features(capture) ** 2 for capture in layer.reads)
    for program in layer_costs.programs(shapes(checkpoint), 4, 16, method, Unstructured(0.5)):
        alive = weights + (grams if program.phase == "gram" else 0)
        assert alive < program.peak_bytes() < 60 * (weights + grams), program.name


def of_distillation(checkpoint: Path, tuning: Tuning) -> list[Program]:
    held_out = windows_held_out(16) if tuning.tune_tokens else 0
    steps = TuningSteps.of(tuning, 8, 16, held_out * 16)
    return list(
        tuning_costs.programs(shapes(checkpoint), steps, Placement(True, True), (held_out, 16))
    )


def test_measures_of_what_is_held_out_are_counted(checkpoint: Path) -> None:
    """The dense model's pass over 16 windows of 16 tokens, and three of the pruned model's: before,
    midway, after."""

    def count(programs_: Iterable[Program], name: str = "") -> float:
        return sum(
            sum(p.flops().values()) * p.calls for p in programs_ if not name or p.name == name
        )

    none, stream, pieces = (
        of_distillation(checkpoint, tuning)
        for tuning in (
            Tuning(tune_epochs=1),
            Tuning(tune_tokens=8 * 16),
            Tuning(tune_tokens=8 * 16, tune_chunks=2, tune_windows=2),
        )
    )
    window = count(none, "dense forward") / 8
    assert count(stream, "held-out forward") == count(pieces, "held-out forward")  # whole windows
    assert count(stream, "held-out forward") == pytest.approx(3 * HELD_OUT * window)
    assert count(stream, "dense forward of what is held out") == pytest.approx(HELD_OUT * window)
    assert count(stream, "dense forward") == pytest.approx(8 * window)
    heads = count(stream, "held-out divergence")
    assert heads == pytest.approx(3 * HELD_OUT * 16 * 2 * 2 * 32 * 300, rel=0.01)
    assert count(stream) - count(none) == pytest.approx(4 * HELD_OUT * window + heads)


def test_chunks_take_a_step_each(checkpoint: Path) -> None:
    def steps(tuning: Tuning) -> list[float]:
        every = of_distillation(checkpoint, tuning)
        return [program.calls for program in every if program.name.startswith("step ")]

    whole, pieces = steps(Tuning(tune_epochs=1)), steps(Tuning(tune_epochs=1, tune_chunks=2))
    assert pieces == [2 * calls for calls in whole]


def test_gradual_zeros_are_counted(checkpoint: Path) -> None:
    """Of three layers, after the first six of ten steps."""

    def calls(tuning: Tuning, name: str) -> set[float]:
        return {
            program.calls
            for program in of_distillation(checkpoint, tuning)
            if program.name.startswith(name)
        }

    none, some = (Tuning(tune_tokens=10 * 16, tune_gradual=share) for share in (0.0, 0.125))
    assert calls(none, "step ") == calls(some, "step ") == {3 * 10}
    assert not calls(none, "gradual pruning of ") and calls(some, "gradual pruning of ") == {3 * 6}


def test_distillation_is_counted(checkpoint: Path) -> None:
    half, once = (of_distillation(checkpoint, Tuning(tune_epochs=share)) for share in (0.5, 1.0))
    of_half, of_once = (
        sum(sum(p.flops().values()) * p.calls for p in every) for every in (half, once)
    )
    assert of_once == pytest.approx(2 * of_half)
    assert all(np.isfinite(p.peak_bytes()) for p in once)
