"""Shares of zeros: exact totals, bounds, and one threshold."""

from pathlib import Path

import numpy as np
import pytest

from jaxprune import InputError, load
from jaxprune.solve.allocation import allocate, share_zeros, zeros_to_allocate
from jaxprune.solve.rules import Counts
from jaxprune.solve.sensitivity import measure_sensitivity
from tests.helpers.shapes import INPUTS, windows


def histograms(linears: int = 5, bins: int = 40, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 1000, (linears, bins)) * (generator.random((linears, bins)) < 0.7)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_deviation", [0.0, 0.05, 0.3, 0.99])
@pytest.mark.parametrize("sparsity", [0.0, 0.1234, 0.5, 0.97])
def test_totals_are_exact_within_bounds(sparsity: float, max_deviation: float, seed: int) -> None:
    counts = histograms(seed=seed)
    sizes = counts.sum(axis=1)
    zeros = round(sparsity * sizes.sum())
    found = share_zeros([(3, row) for row in counts], zeros, max_deviation)
    assert found.sum() == zeros
    share = zeros / sizes.sum()
    slack = 1 / sizes  # a whole weight
    assert (found / sizes <= min(share + max_deviation, 1) + slack).all()
    assert (found / sizes >= max(share - max_deviation, 0) - slack).all()


def test_one_threshold_where_nothing_bounds_it() -> None:
    counts = histograms()
    threshold = 17
    zeros = counts[:, :threshold].sum(axis=1)
    np.testing.assert_array_equal(
        share_zeros([(0, row) for row in counts], int(zeros.sum()), 0.99), zeros
    )


def test_weights_of_one_bin_are_shared_in_proportion() -> None:
    found = share_zeros([(7, np.array([100, 900])), (6, np.array([0, 300, 700]))], 200, 0.99)
    np.testing.assert_array_equal(found, [50, 150])


def test_a_linear_that_does_not_matter_keeps_a_weight() -> None:
    """As an expert that no token of the windows comes to: all of its weights lie in the first
    bin."""
    found = share_zeros([(0, np.array([100])), (9, np.array([50, 50]))], 140, 0.3)
    np.testing.assert_array_equal(found, [99, 41])


def test_the_threshold_is_one_of_saliencies(checkpoint: Path) -> None:
    """Against sorting all saliencies of the model."""
    model = load(checkpoint)
    sensitivity = measure_sensitivity(model, windows(6, 40, 3))
    found = {
        linear: pattern.sparsity
        for linear, pattern in allocate(model, sensitivity, 0.6, 0.95).items()
    }
    saliencies = {}
    for index, layer in enumerate(sensitivity):
        for capture, paths in INPUTS.items():
            for path in paths:
                name = f"layers.{index}.{path}.kernel"
                kernel = model.reader.read([name])[name].astype(np.float64)
                saliencies[index, path] = (
                    kernel**2 * layer.inputs[capture][:, None] * layer.outputs[path][None, :]
                )
    assert found.keys() == saliencies.keys() == model.architecture.kernel_shapes().keys()
    threshold = np.quantile(np.concatenate([s.reshape(-1) for s in saliencies.values()]), 0.6)
    for linear, saliency in saliencies.items():
        assert abs(found[linear] - (saliency < threshold).mean()) < 0.01, linear
    sizes = {linear: saliency.size for linear, saliency in saliencies.items()}
    total = sum(round(found[linear] * size) for linear, size in sizes.items())
    assert total == round(0.6 * sum(sizes.values()))
    assert max(found.values()) - min(found.values()) > 0.1


@pytest.mark.parametrize(
    ("sparsity", "zeros"), [(0.5, 2), (0.525, 3), (0.45, 0), (0.674, 9), (0.42, -1), (0.7, 10)]
)
def test_what_is_left_for_the_others(sparsity: float, zeros: int) -> None:
    """40 weights, 30 of them named with 18 zeros; a weight of the others has to stay."""
    counts = Counts(40, 18, 0.0, {(0, "mlp.up_proj"): 10})
    if 0 <= zeros < 10:
        assert zeros_to_allocate(counts, sparsity) == zeros
    else:
        with pytest.raises(
            InputError, match=f"needs {zeros} zeros among the 10 weights that no rule names"
        ):
            zeros_to_allocate(counts, sparsity)


def test_nothing_is_allocated_where_rules_name_every_linear_layer(checkpoint: Path) -> None:
    model = load(checkpoint)
    sensitivity = measure_sensitivity(model, windows(2, 16))
    assert (
        allocate(model, sensitivity, 0.6, 0.3, dict.fromkeys(model.architecture.kernel_shapes()))
        == {}
    )
