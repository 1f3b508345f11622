"""Every family against transformers, on tiny random checkpoints: one battery for all files of `models`."""

from pathlib import Path

import numpy as np
import pytest

from convert import plugins
from jaxprune import load, models
from tests.helpers import families
from tests.helpers.logits import logits
from tests.helpers.optional import needs_torch, torch

pytestmark = needs_torch


def test_every_family_is_tried() -> None:
    assert plugins.names(models) == sorted(families.VARIANTS)


@pytest.mark.parametrize(("family", "variant"), families.CASES)
def test_logits_are_those_of_transformers(family: str, variant: str, tmp_path: Path) -> None:
    reference = families.save(tmp_path, families.config(family, variant))
    tokens = np.random.default_rng(0).integers(0, 300, (2, 100))
    with torch.no_grad():  # in float64, for both float32 results differ from it by rounding
        expected = reference.double()(torch.tensor(tokens)).logits.numpy()
    found, _ = logits(load(tmp_path), tokens)
    assert np.abs(found - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())
