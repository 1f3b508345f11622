"""The streamed run against a plain one: transformers' forward, NumPy's solver, one linear after
another."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import DamagedError, create_checkpoint, open_checkpoint, part_of
from jaxprune import (
    ADMM,
    NM,
    Crossed,
    Exact,
    Finished,
    InputError,
    Magnitude,
    SparseGPT,
    Unstructured,
    Wanda,
    load,
    prune_layers,
)
from jaxprune.commands.progress import layer_line
from jaxprune.loop import other_params
from jaxprune.methods import with_more_damping
from jaxprune.solve.gram_matrices import accumulate
from jaxprune.solve.kernel import store
from jaxprune.solve.layer_result import LayerResult
from jaxprune.solve.rules import with_rules
from jaxprune.streaming.hidden_states import HiddenStates, batch_size
from jaxprune.streaming.model import apply_layer
from tests.helpers import oracles, tiny
from tests.helpers.optional import needs_torch, torch
from tests.helpers.shapes import LINEARS, windows


def watch(layer: Any) -> dict[str, np.ndarray]:
    """Fills in the inputs of the layer's linears, [tokens, n], at each forward pass."""
    inputs: dict[str, np.ndarray] = {}
    for name in LINEARS:

        def hook(_: object, args: tuple, __: object, name: str = name) -> None:
            inputs[name] = args[0].detach().numpy().reshape(-1, args[0].shape[-1])

        layer.get_submodule(name).register_forward_hook(hook)
    return inputs


def reference(tokens: np.ndarray, sparsity: float) -> list[dict[str, np.ndarray]]:
    """Prunes the random model of the `checkpoint` fixture in torch and NumPy; kernels [in, out] by
    layer."""
    model = tiny.model(tiny.config())
    pruned = []
    for layer in model.model.layers:
        inputs = watch(layer)
        with torch.no_grad():
            model(torch.tensor(tokens, dtype=torch.long))
        kernels = {}
        for name in LINEARS:
            x = inputs[name].astype(np.float64)
            weight = layer.get_submodule(name).weight.detach().numpy().T.astype(np.float64)
            kernels[name], _ = oracles.admm(
                x.T @ x,
                weight,
                "unstructured",
                sparsity,
                schedule="cubic",
                iterations=20,
                selections=15,
            )
        with torch.no_grad():
            for name, kernel in kernels.items():
                layer.get_submodule(name).weight.copy_(torch.tensor(kernel.T))
        pruned.append(kernels)
    return pruned


@needs_torch
def test_streamed_pruning_is_plain_pruning(checkpoint: Path) -> None:
    tokens = windows()
    expected = reference(tokens, 0.6)
    for layer in prune_layers(load(checkpoint), tokens, ADMM(), Unstructured(0.6)):
        for name, kernel in expected[layer.index].items():
            mine = layer.params[f"layers.{layer.index}.{name}.kernel"]
            agree = (mine != 0) == (kernel != 0)
            # float32 and float64 may disagree on a weight or two at the threshold.
            assert agree.mean() > 0.995, (layer.index, name)
            assert np.linalg.norm((mine - kernel)[agree]) < 0.02 * np.linalg.norm(kernel)


@needs_torch
def test_errors_are_those_of_the_stored_weights(checkpoint: Path) -> None:
    tokens = windows()
    (first, *_) = prune_layers(
        load(checkpoint), tokens, Wanda(), Unstructured(0.5, per_output=True)
    )
    model = tiny.model(tiny.config())
    layer = model.model.layers[0]
    captured = watch(layer)
    with torch.no_grad():
        model(torch.tensor(tokens, dtype=torch.long))
    for name, linear in first.kernels.items():
        x, dense = captured[name], layer.get_submodule(name).weight.detach().numpy().T
        pruned = first.params[f"layers.0.{name}.kernel"]
        expected = np.sum((x @ (dense - pruned)) ** 2) / np.sum((x @ dense) ** 2)
        np.testing.assert_allclose(linear.error, expected, rtol=1e-3)
        assert linear.zeros == np.sum(pruned == 0) == pruned.size // 2


def run(path: Path, dtype: object = None, **changes: object) -> list[LayerResult]:
    options: dict = {"tokens": windows(), "method": ADMM(), "target": Unstructured(0.5)} | changes
    return list(prune_layers(load(path, dtype=dtype), **options))


def test_a_run_is_deterministic(checkpoint: Path) -> None:
    for a, b in zip(run(checkpoint), run(checkpoint), strict=True):
        assert a.kernels == b.kernels
        for path in a.params:
            np.testing.assert_array_equal(a.params[path], b.params[path])


def test_only_the_pruned_kernels_change(checkpoint: Path) -> None:
    reader = open_checkpoint(checkpoint)
    for layer in run(checkpoint):
        dense = reader.read(layer.params)
        assert layer.params.keys() == {
            p for p in reader.spec if part_of(p) == f"layers.{layer.index}"
        }
        for path, array in layer.params.items():
            assert array.dtype == dense[path].dtype
            assert np.array_equal(array, dense[path]) != path.endswith(".kernel"), path


def test_one_compilation_serves_all_layers(tmp_path: Path) -> None:
    path = tiny.save(
        tmp_path, tiny.config(num_hidden_layers=6, hidden_size=40, intermediate_size=72)
    )
    counts = [f._cache_size() for f in (accumulate, apply_layer)]
    run(path)
    assert [f._cache_size() for f in (accumulate, apply_layer)] == [count + 1 for count in counts]
    stored = store._cache_size()
    run(path, target=lambda index, linear: Unstructured(0.3 + 0.05 * index))
    assert store._cache_size() == stored
    assert accumulate._cache_size() == counts[0] + 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_counts_are_exact_in_the_stored_dtype(dtype: str, pattern: object, tmp_path: Path) -> None:
    path = tiny.save(tmp_path, tiny.config(), dtype=dtype)
    for layer in run(path, target=pattern):
        for name in LINEARS:
            kernel = layer.params[f"layers.{layer.index}.{name}.kernel"]
            assert kernel.dtype.name == dtype
            zeros = kernel.astype(np.float32) == 0
            assert zeros.sum() == kernel.size // 2
            if isinstance(pattern, NM):
                assert (zeros.reshape(-1, 4, kernel.shape[1]).sum(axis=1) == 2).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_kept_weights_do_not_round_to_zero(dtype: jnp.dtype) -> None:
    weight = jnp.asarray([[1e-12, -1e-12, 0.0, 1.0]], jnp.float32)
    stored, figures = store(jnp.ones((1, 1), jnp.float32), jnp.ones((1, 4), dtype), weight)
    values = np.asarray(stored, np.float64)[0]
    assert values[0] > 0 and values[1] < 0 and values[2] == 0 and values[3] == 1
    assert abs(values[:2]).max() < 1e-7
    assert figures["zeros"].tolist() == [0, 0, 1, 0]


def test_16_bit_computation_runs_and_is_close(checkpoint: Path) -> None:
    for half, full in zip(run(checkpoint, dtype=jnp.bfloat16), run(checkpoint), strict=True):
        for name in LINEARS:
            assert half[name].error < full[name].error * 1.5 + 0.01


def test_every_linear_may_have_its_own_pattern(checkpoint: Path) -> None:
    def pattern(index: int, linear: str) -> Unstructured | NM:
        return NM(1, 4) if linear == "mlp.down_proj" else Unstructured(0.1 * (index + 1))

    for layer in run(checkpoint, target=pattern, method=Magnitude()):
        for name, linear in layer.kernels.items():
            share = 0.75 if name == "mlp.down_proj" else 0.1 * (layer.index + 1)
            assert linear.zeros == round(share * linear.size)


def test_each_phase_is_timed(checkpoint: Path) -> None:
    first = next(prune_layers(load(checkpoint), windows(), Magnitude(), Unstructured(0.5)))
    assert list(first.figures.seconds) == ["read", "gram", "solve", "forward"]


def test_layers_are_pruned_when_asked_for(checkpoint: Path) -> None:
    layers = prune_layers(load(checkpoint), windows(), Magnitude(), Unstructured(0.5))
    assert next(layers).index == 0
    layers.close()


def test_the_exported_checkpoint_is_the_pruned_model(checkpoint: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(checkpoint)
    with create_checkpoint(tmp_path / "out", reader.spec, reader.assets) as writer:
        for layer in prune_layers(load(checkpoint), windows(), ADMM(), Unstructured(0.5)):
            writer.write(layer.params)
        for paths in other_params(reader.spec):
            writer.write(reader.read(paths))
    dense, pruned = (
        load_file(checkpoint / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert dense.keys() == pruned.keys()
    for name, tensor in pruned.items():
        if "_proj" in name:
            assert int((tensor == 0).sum()) == tensor.size // 2
        else:
            np.testing.assert_array_equal(tensor, dense[name])


def test_bad_input_is_known_before_the_first_layer(checkpoint: Path) -> None:
    model = load(checkpoint)
    for tokens, pattern, message in (
        (windows() + 300, Unstructured(0.5), "outside the vocabulary, found 555, wanted 0 to 299"),
        (windows() - 200, Unstructured(0.5), "outside the vocabulary, found -"),
        (windows(1, 2000), Unstructured(0.5), "longer than the model's 1024"),
        (windows(), NM(5, 7), "divisible by 7"),
    ):
        with pytest.raises(InputError, match=message):
            prune_layers(model, tokens, Magnitude(), pattern)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_weights_names_layer_and_tensor(value: float, tmp_path: Path) -> None:
    path = tiny.save(tmp_path, tiny.config())
    stored = load_file(path / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DamagedError,
        match=r"layers\.1\.mlp\.up_proj\.kernel\[0, 0\]: it holds a number that is not finite",
    ):
        run(path)


def test_overflowing_activations_are_named(tmp_path: Path) -> None:
    path = tiny.save(tmp_path, tiny.config())
    stored = load_file(path / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"] *= 1e30
    stored["model.layers.1.mlp.gate_proj.weight"] *= 1e30
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="layer 1: activations are NaN or infinite in mlp_hidden"):
        run(path)


def test_hidden_states_are_updated_in_place_batch_by_batch() -> None:
    hidden = HiddenStates((6, 3, 2), np.dtype(np.float32), batch=2)
    hidden.replace(lambda rows: jnp.full((2, 3, 2), rows.start, jnp.float32))
    hidden.update(lambda x, rows: x + 1)
    np.testing.assert_array_equal(
        np.concatenate(list(hidden.batches()))[:, 0, 0], [1, 1, 3, 3, 5, 5]
    )
    with pytest.raises(ValueError, match="does not divide"):
        HiddenStates((6, 3, 2), np.dtype(np.float32), batch=4)


@pytest.mark.parametrize(
    ("count", "length", "expected"),
    [(128, 2048, 1), (32, 512, 2), (12, 128, 6), (7, 128, 7), (1, 9999, 1), (11, 100, 1)],
)
def test_batches_divide_the_windows(count: int, length: int, expected: int) -> None:
    assert batch_size(count, length) == expected


@needs_torch
def test_a_linear_makes_up_for_its_inputs_shift(checkpoint: Path) -> None:
    """After a pruned layer, aiming at the dense model's outputs brings the last hidden states
    nearer to them."""
    tokens, streamed = windows(), load(checkpoint)
    model = tiny.model(tiny.config())
    with torch.no_grad():
        dense = (
            model.model(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True)
            .hidden_states[2]
            .numpy()
        )

    def distance(asymmetry: float) -> tuple[float, float]:
        """Of the first layer's, and of the second layer's outputs."""
        hidden = streamed.embed(tokens)
        for layer in prune_layers(streamed, tokens, ADMM(), Unstructured(0.5), asymmetry=asymmetry):
            params = {
                p.removeprefix(f"layers.{layer.index}."): jnp.asarray(a)
                for p, a in layer.params.items()
            }
            streamed.forward(layer.index, params, hidden)
            if layer.index == 0:
                first = float(np.abs(hidden.array).sum())
            if layer.index == 1:
                return first, float(np.square(hidden.array - dense).mean())
        raise AssertionError

    (first, plain), (same, better) = distance(0.0), distance(1.0)
    assert same == pytest.approx(first, rel=1e-4)  # nothing has shifted before the first layer
    assert better < 0.98 * plain


def test_inputs_do_not_shift_after_dense_layers(checkpoint: Path) -> None:
    def second(asymmetry: float) -> LayerResult:
        dense_first = with_rules(Unstructured(0.5), {(0, path): None for path in LINEARS})
        _, layer, *_ = prune_layers(
            load(checkpoint), windows(), ADMM(), dense_first, asymmetry=asymmetry
        )
        return layer

    plain, aimed = second(0.0), second(0.5)
    for path, kernel in plain.kernels.items():
        # nothing is pruned before them
        if path.startswith("self_attn.") and path != "self_attn.o_proj":
            assert aimed[path].error == pytest.approx(kernel.error, rel=1e-3), path


def test_damping_is_raised_where_a_solve_fails(checkpoint: Path) -> None:
    """Five tokens a Gram matrix: next to no damping makes SparseGPT's factorization fail in
    float32."""
    few = windows(1, 5)
    results = run(checkpoint, tokens=few, method=SparseGPT(damping=1e-12))
    times = {
        path: linear.stats.get("damping_times")
        for layer in results
        for path, linear in layer.kernels.items()
    }
    assert {10.0} <= set(times.values()) <= {None, 10.0}
    assert all(np.isfinite(linear.error) for layer in results for linear in layer.kernels.values())
    assert "damping raised" in layer_line(results[0], 3)
    plain = run(checkpoint, tokens=few, method=SparseGPT())
    assert all(
        "damping_times" not in linear.stats for layer in plain for linear in layer.kernels.values()
    )


def test_damping_is_not_raised_without_end(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxprune.solve.layer.DAMPING", (1,))
    with pytest.raises(
        InputError, match=r"layer 0: .*q_proj.* cannot be solved, even with 1 times the damping"
    ):
        run(checkpoint, tokens=windows(1, 5), method=SparseGPT(damping=1e-30))


def test_more_damping_reaches_all_methods() -> None:
    crossed = Crossed(
        SparseGPT(damping=0.01), Finished(ADMM(damping=0.0), Exact(steps=3, damping=0.1))
    )
    more = with_more_damping(crossed, 10)
    assert more == Crossed(
        SparseGPT(damping=0.1), Finished(ADMM(damping=1e-6 * 10), Exact(steps=3, damping=1.0))
    )
    assert with_more_damping(Magnitude(), 10) == Magnitude()
