"""The phases of a run, against what they say that they cost."""

import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxprune import ADMM, Magnitude, Recipe, Unstructured, load, prune_model
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.distill import adafactor, gradual_pruning, layer_vjp, student
from jaxprune.evaluation import perplexity
from jaxprune.phases import PHASES
from jaxprune.recipe_parts import Importance, Structure, Tuning
from jaxprune.solve import gram_matrices, kernel, sensitivity
from jaxprune.sparsity.patterns import NO_ZEROS
from jaxprune.streaming import model as streaming
from jaxprune.structure import experts, input_groups
from jaxprune.structure.removal import remove
from jaxprune.structure.sizes import removals
from tests.helpers import families
from tests.helpers.shapes import windows

COMPILED = (
    streaming.apply_layer,
    gram_matrices.accumulate,
    kernel.store,
    experts.norms,
    sensitivity.backward,
    sensitivity.loss_gradient,
    layer_vjp.forward_and_vjp,
    layer_vjp.pull_back,
    student.head_divergence,
    adafactor.step_one,
    adafactor.kept,
    gradual_pruning.pruned,
    perplexity.divergence,
    input_groups.selected,
    input_groups.optimum,
)
"""The functions that a run calls, but for those of its method."""
RECIPE = Recipe(
    ADMM(),
    Unstructured(0.7),
    importance=Importance(weigh_outputs=True, max_deviation=0.1),
    tuning=Tuning(tune_epochs=1.25, tune_windows=2, tune_gradual=0.25),
    quantize="q4_0",
)


def key(function: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a function, and the shapes that it is called with."""
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [
        (leaf.shape, np.dtype(leaf.dtype)) if hasattr(leaf, "shape") else leaf for leaf in leaves
    ]
    return function.__name__, tree, *shapes


def foreseen(run: RunSizes) -> dict[tuple[Any, ...], float]:
    """Returns the calls of `COMPILED` as the phases of a run describe them."""
    found: Counter[tuple[Any, ...]] = Counter()
    for phase in PHASES:
        for program in phase.costs(run).programs if phase.wanted(run.recipe) else ():
            function = program.function
            static = function.args if isinstance(function, partial) else ()
            inner = function.func if isinstance(function, partial) else function
            if inner in COMPILED:
                found[key(inner, (*static, *program.arguments))] += program.calls
    return found


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], float]:
    """Returns a count of all calls of `COMPILED` from now on."""
    found: Counter[tuple[Any, ...]] = Counter()

    def recording(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
                found[key(function, arguments)] += 1
            return function(*arguments)

        return call

    for function in COMPILED:
        new = recording(function)
        for module in [one for name, one in sys.modules.items() if name.startswith("jaxprune")]:
            if getattr(module, function.__name__, None) is function:
                monkeypatch.setattr(module, function.__name__, new)
    return found


def differences(one: dict[Any, float], other: dict[Any, float]) -> dict[Any, tuple[float, float]]:
    every = {**one, **other}
    return {
        (name, *rest): (one.get((name, *rest), 0), other.get((name, *rest), 0))
        for name, *rest in every
        if one.get((name, *rest), 0) != pytest.approx(other.get((name, *rest), 0))
    }


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_run_makes_the_calls_that_its_phases_describe(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = next(iter(families.VARIANTS[family]))
    # all kernels come in whole blocks of a grid
    configuration = families.config(family, variant, intermediate_size=64)
    families.save(tmp_path / "dense", configuration)
    model, tokens = load(tmp_path / "dense"), windows(4, 32)
    spec, architecture = model.reader.spec, model.architecture
    run = RunSizes(spec, spec, architecture, [], RECIPE, 4, 32, [(4, 32)], tmp_path)
    wanted = foreseen(run)
    called = recorded(monkeypatch)
    for _ in prune_model(model, tokens, RECIPE):
        pass
    perplexity.text_quality([model, model], tokens)
    assert {name for name, *_ in called} > {"accumulate", "pull_back", "pruned", "divergence"}
    assert differences(wanted, called) == {}


@pytest.mark.parametrize("kind", ["layers", "heads", "channels"])
@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_removal_makes_the_calls_that_its_phases_describe(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = next(iter(families.VARIANTS[family]))
    configuration = families.config(family, variant, intermediate_size=64)
    families.save(tmp_path / "dense", configuration)
    model, tokens = load(tmp_path / "dense"), windows(4, 32)
    amount = 1 if kind == "layers" else 0.5
    structure = Structure(**{f"drop_{kind}": amount}, channel_multiple=8)
    recipe = Recipe(Magnitude(), NO_ZEROS, structure=structure)
    spec, architecture = model.reader.spec, model.architecture
    removed = removals(architecture, model.reader.assets, structure)
    run = RunSizes(spec, spec, architecture, removed, recipe, 4, 32, [], tmp_path)
    wanted = foreseen(run)
    called = recorded(monkeypatch)
    remove(model, tokens, structure)
    assert {name for name, *_ in called} >= (
        {"apply_layer", "divergence"} if kind == "layers" else {"backward", "selected", "optimum"}
    )
    assert differences(wanted, called) == {}
