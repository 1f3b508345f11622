"""How float32 products are made, float32 or parts of 16-bit floats: the errors of solves, and
perplexities.

On an H100 products of three bfloat16 parts (six products, `bf16x6`) or of two TF32 parts (three,
`tf32x3`) run on the tensor cores. Here they are made of float32 products of the same parts, which
any machine has: sums are float32 either way. First each linear layer of some layers is solved on
the dense model's Gram matrices, where rounding is the only difference, and with float64 as the
oracle; then, with --seeds, whole models are pruned and measured.

    python scripts/benchmarks products --ckpt smollm2-135m --layers 0 10 20 29 --seeds 0 1
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from markdown import markdown

from jaxprune import Evaluator, Measures, Recipe, RunOptions, calibration_windows, load, prune
from jaxprune.methods import admm, alps, gradient, gram, linalg, sparsegpt
from jaxprune.methods.gram import relative_error
from jaxprune.solve.calibration_states import CalibrationStates
from jaxprune.solve.gram_matrices import gram_matrices
from jaxprune.sparsity.patterns import NM, Pattern, Unstructured

METHODS = {"admm": admm.ADMM(), "alps": alps.ALPS(), "sparsegpt": sparsegpt.SparseGPT()}
PATTERNS: dict[str, Pattern] = {
    "50 %": Unstructured(0.5),
    "70 %": Unstructured(0.7),
    "2:4": NM(2, 4),
}
MODULES = linalg, admm, alps, gradient, gram, sparsegpt
MATMUL = linalg.matmul


def parts(x: Array, count: int, bits: int) -> list[Array]:
    """Returns floats of so many bits that sum to x, nearly; the first is the largest."""
    found = []
    for _ in range(count):
        found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits))
        x = x - found[-1]
    return found


def by_parts(a: Array, b: Array, *, count: int, bits: int) -> Array:
    """Returns a @ b by products of parts, without those that float32 would not hold; the smallest
    are added first."""
    left, right = parts(a, count, bits), parts(b, count, bits)
    places = [(i, j) for i in range(count) for j in range(count) if i + j < count]
    total = jnp.zeros((), a.dtype)
    for i, j in sorted(places, key=sum, reverse=True):
        total = total + MATMUL(left[i], right[j])
    return total


KINDS: dict[str, Callable[[Array, Array], Array]] = {
    "float32": MATMUL,
    "bf16x6": partial(by_parts, count=3, bits=7),
    "tf32x3": partial(by_parts, count=2, bits=10),
}


def use(product: Callable[[Array, Array], Array]) -> None:
    """Makes all methods multiply in this way."""
    for module in MODULES:
        if hasattr(module, "matmul"):
            module.matmul = product  # type: ignore[attr-defined]
    jax.clear_caches()


def problems(args: argparse.Namespace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields Gram matrices of the dense model's layers and the kernels that read them."""
    model = load(args.ckpt)
    tokens = windows(args, 0)
    states = CalibrationStates(model, tokens, with_dense=False)
    for index, params in enumerate(model.layers(range(max(args.layers) + 1))):
        own, layer = model.put_layer(index, params), model.architecture.layers[index]
        if index in args.layers:
            grams, _ = gram_matrices(states, index, own)
            for capture, paths in layer.reads.items():
                matrix = np.asarray(grams.take(capture))
                for path in paths:
                    yield matrix, np.asarray(own[f"{path}.kernel"], np.float32)
        model.forward(index, own, states.pruned)


def windows(args: argparse.Namespace, seed: int) -> np.ndarray:
    return calibration_windows(
        args.calib, load(args.ckpt).tokenizer, args.nsamples, args.seqlen, seed, pack=True
    )


def solved(matrix: np.ndarray, kernel: np.ndarray, dtype: type) -> dict[tuple[str, str], float]:
    """Returns (method, pattern) -> the relative error of a linear layer's outputs, computed in
    float64."""
    found = {}
    with jax.enable_x64(True):
        exact = jnp.asarray(matrix, np.float64), jnp.asarray(kernel, np.float64)
        own = [array.astype(dtype) for array in exact]
        for method_name, method in METHODS.items():
            prepared = method.prepare(own[0])
            for name, pattern in PATTERNS.items():
                weight = method.solve(prepared, own[1], pattern).weight.astype(np.float64)
                found[method_name, name] = float(relative_error(*exact, weight))
    return found


def table_of_solves(args: argparse.Namespace) -> list[str]:
    every = list(problems(args))
    found = {}
    for kind, product in {**KINDS, "float64": MATMUL}.items():
        use(product)
        dtype = np.float64 if kind == "float64" else np.float32
        found[kind] = [solved(matrix, kernel, dtype) for matrix, kernel in every]
        print(f"{kind}: done", file=sys.stderr, flush=True)
    use(MATMUL)
    rows = []
    for kind in KINDS:
        for which in found[kind][0]:
            own, exact, plain = (
                np.array([one[which] for one in found[k]]) for k in (kind, "float64", "float32")
            )
            far, off = np.abs(own / plain - 1), np.abs(own / exact - 1)
            sums = (
                f"{abs(own.sum() / plain.sum() - 1):.1e}",
                f"{abs(own.sum() / exact.sum() - 1):.1e}",
            )
            rows.append([kind, *which, f"{far.max():.1e}", sums[0], f"{off.max():.1e}", sums[1]])
    head = [
        "products",
        "method",
        "pattern",
        "from float32's errors, at most",
        "all",
        "from float64's, at most",
        "all",
    ]
    return [
        f"{len(every)} linear layers, relative differences of their errors",
        "",
        *markdown(head, rows),
    ]


def table_of_models(args: argparse.Namespace) -> list[str]:
    rows = []
    for seed in args.seeds:
        first: float | None = None
        for kind in args.kinds:
            use(KINDS[kind])
            model = load(args.ckpt)
            measures = Measures((args.eval_text,), args.seqlen, args.eval_windows)
            recipe = Recipe(METHODS["admm"], pattern=PATTERNS["50 %"])
            with tempfile.TemporaryDirectory() as folder:
                out, evaluator = Path(folder) / "out", Evaluator(measures, model)
                options = RunOptions(seed=seed, evaluator=evaluator)
                result = prune(model, windows(args, seed), recipe, out, options)
            (text,) = result.evaluation["pruned"].texts.values()
            first = first or text.perplexity
            rows.append(
                [str(seed), kind, f"{text.perplexity:.4f}", f"{text.perplexity / first - 1:+.2%}"]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    use(MATMUL)
    return [
        "",
        "admm, 50 %",
        "",
        *markdown(["seed", "products", "perplexity", "from float32's"], rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--calib", default="wikipedia")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="seeds of whole models")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["float32", "bf16x6"], help="of whole models"
    )
    parser.add_argument("--eval-text", default="wikipedia")
    parser.add_argument("--eval-windows", type=int, default=32)
    args = parser.parse_args()
    print("\n".join(table_of_solves(args)), flush=True)
    if args.seeds:
        print("\n".join(table_of_models(args)))
