"""What decides which parts go, in turn: perplexity and KL divergence of models of the same size."""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from markdown import markdown

import jaxprune
from jaxprune import calibration
from jaxprune.evaluation import perplexity
from jaxprune.methods.linalg import precondition
from jaxprune.recipe_parts import Structure
from jaxprune.solve.sensitivity import evenly_spaced
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel
from jaxprune.structure import layers, removal
from jaxprune.structure.input_groups import METHOD, optimum, selected

Choice = Callable[[jax.Array, jax.Array, jax.Array, int], np.ndarray]
"""Gram matrix, kernel, changes of the loss, number that stays -> the groups that stay."""
SURGEON_STEPS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", default="smollm2-135m")
    parser.add_argument("--dtype")
    parser.add_argument("--kind", choices=["channels", "heads", "layers"], default="channels")
    parser.add_argument("--drop", type=float, default=0.27, help="as --drop-KIND")
    parser.add_argument("--multiple", type=int, default=64, help="as --channel-multiple")
    parser.add_argument("--nsamples", type=int, default=48)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="these criteria only")
    args = parser.parse_args()
    model = jaxprune.load(args.ckpt, dtype=args.dtype)
    tokens = calibration.calibration_windows(
        args.calib, model.tokenizer, args.nsamples, args.seqlen, 0, pack=True
    )
    text = calibration.evaluation_windows(
        args.eval_text, model.tokenizer, args.seqlen, args.eval_windows
    )
    (dense,) = model.final_states(text)
    ways = ways_of(args, tokens)
    rows = []
    for name in args.only or ways:
        smaller = ways[name](model)
        (states,) = smaller.final_states(text)
        quality = perplexity.compare([model, smaller], [dense, states], text)[1]
        size = 1 - parameters(smaller) / parameters(model)
        rows.append([name, f"{100 * size:.1f} %", f"{quality.ratio:.3f}", f"{quality.kl:.4f}"])
        print(" ".join(rows[-1]), flush=True)
    header = ["criterion", "removed", "perplexity over dense's", "KL divergence, nats"]
    print("\n" + "\n".join(markdown(header, rows)))


def ways_of(
    args: argparse.Namespace, tokens: np.ndarray
) -> dict[str, Callable[[StreamedModel], StreamedModel]]:
    """Returns criterion -> what removes parts of a model by it."""
    if args.kind == "layers":
        count = int(args.drop)
        return {
            "divergence of the whole model": partial(by_divergence, tokens, count),
            "block influence": partial(by_influence, tokens, count),
        }
    structure = Structure(**{f"drop_{args.kind}": args.drop}, channel_multiple=args.multiple)
    return {name: partial(by_choice, tokens, structure, choice) for name, choice in CHOICES.items()}


def by_choice(
    tokens: np.ndarray, structure: Structure, choice: Choice, model: StreamedModel
) -> StreamedModel:
    """Removes heads or channels; what reads the others is re-optimized, whatever the choice."""

    def remove(gram: jax.Array, kernel: jax.Array, changes: jax.Array, keep: int) -> Any:
        kept = np.sort(choice(gram, kernel, changes, keep))
        size = len(gram) // len(changes)
        rows = (kept[:, None] * size + np.arange(size)).reshape(-1)
        weights, error = optimum(gram, kernel, jnp.asarray(rows, jnp.int32))
        return kept, weights, float(error)

    before = removal.remove_inputs
    removal.remove_inputs = remove
    try:
        return removal.remove(model, tokens, structure)[0]
    finally:
        removal.remove_inputs = before


def by_divergence(tokens: np.ndarray, count: int, model: StreamedModel) -> StreamedModel:
    return removal.remove(model, tokens, Structure(drop_layers=count))[0]


def by_influence(tokens: np.ndarray, count: int, model: StreamedModel) -> StreamedModel:
    """Removes the layers that turn the hidden states least (ShortGPT, arXiv 2403.03853)."""
    inputs: list[HiddenStates] = []
    windows = evenly_spaced(tokens, layers.WINDOWS)
    final = model.final_states(windows, visit=lambda _, states: inputs.append(states[0].copy()))
    influences = [
        1 - np.mean([cosine(x, y) for x, y in zip(one.batches(), after.batches(), strict=True)])
        for one, after in itertools.pairwise([*inputs, *final])
    ]
    return layers.without_layers(model, np.argsort(influences)[:count].tolist())


def cosine(x: jax.Array, y: jax.Array) -> float:
    """Returns the mean cosine of the angles between hidden states."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return float(jnp.mean(jnp.sum(x * y, axis=-1) / norms))


def of_groups(values: jax.Array, changes: jax.Array) -> np.ndarray:
    """Returns sums over the inputs of each group."""
    return np.asarray(values).reshape(len(changes), -1).sum(axis=1)


def largest(scores: np.ndarray, keep: int) -> np.ndarray:
    return np.argsort(-scores)[:keep]


def by_output_and_loss(gram: jax.Array, kernel: jax.Array, changes: jax.Array, keep: int) -> Any:
    return np.flatnonzero(selected(keep, gram, kernel, changes))


def by_output(gram: jax.Array, kernel: jax.Array, changes: jax.Array, keep: int) -> Any:
    return np.flatnonzero(selected(keep, gram, kernel, jnp.zeros_like(changes)))


def by_surgeon(gram: jax.Array, kernel: jax.Array, changes: jax.Array, keep: int) -> Any:
    """Optimal brain surgeon, as SlimGPT (arXiv 2412.18110) in each layer for itself: the group g
    costs tr(W_gᵀ ([H⁻¹]_gg)⁻¹ W_g). After each step W is updated, and H⁻¹ downdated."""
    scaled = precondition(gram, METHOD.damping)
    inverted = np.linalg.inv(np.asarray(scaled.gram, np.float64))
    weights = np.asarray(kernel * scaled.scale[:, None], np.float64)
    alive, size = np.arange(len(changes)), len(gram) // len(changes)
    while len(alive) > keep:
        places = alive[:, None] * size + np.arange(size)
        own = inverted[places[:, :, None], places[:, None, :]]
        costs = np.sum(weights[places] * np.linalg.solve(own, weights[places]), axis=(1, 2))
        count = min(-(-(len(changes) - keep) // SURGEON_STEPS), len(alive) - keep)
        gone = np.argsort(costs)[:count]
        rows = places[gone].reshape(-1)
        columns = inverted[:, rows]
        block = np.linalg.inv(columns[rows])
        weights = weights - columns @ (block @ weights[rows])
        inverted = inverted - columns @ block @ columns.T
        alive = np.delete(alive, gone)
    return alive


def by_loss(gram: jax.Array, kernel: jax.Array, changes: jax.Array, keep: int) -> Any:
    """First-order changes of the loss, as GISP (arXiv 2510.18030) in each layer for itself."""
    return largest(np.asarray(changes), keep)


def by_activations(gram: jax.Array, kernel: jax.Array, changes: jax.Array, keep: int) -> Any:
    """Sums of |W| times the norms of the inputs, as FASP (arXiv 2501.09412)."""
    norms = jnp.sqrt(jnp.diagonal(gram))
    return largest(of_groups(jnp.sum(jnp.abs(kernel), axis=1) * norms, changes), keep)


def by_magnitude(gram: jax.Array, kernel: jax.Array, changes: jax.Array, keep: int) -> Any:
    return largest(of_groups(jnp.sum(kernel * kernel, axis=1), changes), keep)


def by_chance(gram: jax.Array, kernel: jax.Array, changes: jax.Array, keep: int) -> Any:
    return np.random.default_rng(0).permutation(len(changes))[:keep]


CHOICES: dict[str, Choice] = {
    "output and loss (jaxprune)": by_output_and_loss,
    "output (ADMM alone)": by_output,
    "output (optimal brain surgeon)": by_surgeon,
    "loss (first order)": by_loss,
    "weights and inputs (FASP)": by_activations,
    "magnitude": by_magnitude,
    "chance": by_chance,
}


def parameters(model: StreamedModel) -> int:
    return sum(t.size for path, t in model.reader.spec.items() if path.startswith("layers."))


if __name__ == "__main__":
    main()
