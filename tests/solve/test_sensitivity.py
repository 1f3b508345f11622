"""The streamed reverse pass against torch's autograd with hooks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune import Importance, InputError, load
from jaxprune.run_store.store import RunStore
from jaxprune.solve import sensitivity
from jaxprune.solve.sensitivity import Sensitivity, measure_sensitivity, weights
from tests.helpers import tiny
from tests.helpers.optional import needs_torch, torch
from tests.helpers.shapes import INPUTS, windows

UNITS = (("attention_output", 4), ("mlp_hidden", 48))


def reference(tokens: np.ndarray, units: tuple[tuple[str, int], ...] = ()) -> list[Sensitivity]:
    model = tiny.model(tiny.config())
    inputs, outputs, gradients = {}, {}, {}
    for index, layer in enumerate(model.model.layers):
        for path in (path for paths in INPUTS.values() for path in paths):

            def hook(_: object, args: tuple, output: Any, which: tuple = (index, path)) -> None:
                output.retain_grad()
                args[0].retain_grad()
                gradients[which] = args[0]
                inputs[which], outputs[which] = args[0].detach().numpy().astype(np.float64), output

            layer.get_submodule(path).register_forward_hook(hook)
    ids = torch.tensor(tokens, dtype=torch.long)
    scores = model(ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        scores.reshape(-1, 300), ids[:, 1:].reshape(-1), reduction="sum"
    ).backward()
    squares = {
        which: output.grad.numpy().astype(np.float64) ** 2 for which, output in outputs.items()
    }

    def changes(index: int, path: str, count: int) -> np.ndarray:
        slopes = gradients[index, path].grad.numpy().astype(np.float64)
        each = inputs[index, path] * slopes
        return (each.reshape(*each.shape[:2], count, -1).sum(-1) ** 2).sum((0, 1))

    return [
        Sensitivity(
            {
                capture: sum(squares[index, path].sum(-1) for path in paths)
                for capture, paths in INPUTS.items()
            },
            {path: squares[index, path].sum((0, 1)) for paths in INPUTS.values() for path in paths},
            {
                capture: (inputs[index, paths[0]] ** 2).sum((0, 1))
                for capture, paths in INPUTS.items()
            },
            {},
            {capture: changes(index, INPUTS[capture][0], count) for capture, count in units},
        )
        for index in range(len(model.model.layers))
    ]


def assert_close(found: list[Sensitivity], expected: list[Sensitivity], rtol: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for own, other in zip(mine, theirs, strict=True):
            assert own.keys() == other.keys()
            for name, array in own.items():
                np.testing.assert_allclose(
                    array, other[name], rtol=rtol, atol=1e-6 * other[name].max(), err_msg=name
                )


@needs_torch
def test_gradients_are_torchs(checkpoint: Path) -> None:
    tokens = windows(6, 40, 3)
    assert_close(measure_sensitivity(load(checkpoint), tokens), reference(tokens), 2e-3)


@needs_torch
def test_changes_without_units_are_torchs(checkpoint: Path, tmp_path: Path) -> None:
    tokens, model, store = windows(6, 40, 3), load(checkpoint), RunStore(tmp_path)
    units = [UNITS] * model.num_layers
    expected = reference(tokens, UNITS)
    for _ in range(2):  # the second time, all is saved
        found = measure_sensitivity(
            model, tokens, store=store, units=units, name="sensitivity/channels"
        )
        assert_close(found, expected, 2e-3)
    store.close()


def test_groups_of_windows_add_up(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, model = windows(5, 40, 3), load(checkpoint)
    # inputs of three layers and the output, 40 tokens of width 32, float32
    window = 4 * 40 * 32 * 4
    whole = measure_sensitivity(model, tokens)
    for host_bytes in (2.5 * window, 0):
        monkeypatch.setattr(sensitivity, "HOST_BYTES", host_bytes)
        assert_close(measure_sensitivity(model, tokens), whole, 1e-4)


def test_what_was_kept_of_other_groups_is_not_taken(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a run that was stopped goes on with its hidden states on a disk."""
    tokens, model, store = windows(5, 40, 3), load(checkpoint), RunStore(tmp_path)
    whole = measure_sensitivity(model, tokens)
    for host_bytes in (0, sensitivity.HOST_BYTES):
        monkeypatch.setattr(sensitivity, "HOST_BYTES", host_bytes)
        assert_close(measure_sensitivity(model, tokens, store=store), whole, 1e-4)
    store.close()


def test_weights_are_normalised_powers() -> None:
    energy, outputs = (
        np.array([[1.0, 4.0], [9.0, 16.0]], np.float32),
        np.array([0.0, 2.0, 6.0], np.float32),
    )
    layer = Sensitivity(
        {"capture": energy}, {"linear": outputs}, {"capture": np.ones(3, np.float32)}, {}, {}
    )
    found = weights(layer, Importance(token_power=0.5, weigh_outputs=True))
    np.testing.assert_allclose(found.tokens["capture"], np.sqrt(energy) / 2.5, rtol=1e-6)
    np.testing.assert_allclose(found.outputs["linear"][1:] ** 2, outputs[1:] * 3 / 8, rtol=1e-6)
    # a column must stay a number when it is divided by its weight
    assert 0 < found.outputs["linear"][0] < 1e-5
    assert weights(layer, Importance(token_power=0.5)).outputs == {}
    assert weights(layer, Importance(weigh_outputs=True)).tokens == {}


def test_no_gradient_at_all_weighs_all_the_same() -> None:
    nothing = Sensitivity(
        {"capture": np.zeros((2, 3), np.float32)}, {"linear": np.zeros(4, np.float32)}, {}, {}, {}
    )
    found = weights(nothing, Importance(token_power=0.5, weigh_outputs=True))
    assert (found.tokens["capture"] == 1).all() and (found.outputs["linear"] == 1).all()


@pytest.mark.parametrize(
    "bad", [{"token_power": -1.0}, {"max_deviation": -0.1}, {"max_deviation": 1.0}]
)
def test_impossible_options_are_refused(bad: dict) -> None:
    with pytest.raises(InputError, match="must"):
        Importance(**bad)


def test_gradients_that_overflow_are_an_error(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"][:] = 3e38
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="NaN or infinite"):
        measure_sensitivity(load(tmp_path), windows())
