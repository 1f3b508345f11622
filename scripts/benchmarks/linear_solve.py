"""How an ADMM iteration applies (G + ρI)⁻¹: an explicit inverse against two triangular solves, side
by side.

Prints the times of preparation and of a whole solve for the linears of a layer, alternating between
the two, and their ratio. Both have the same count: n³ for the factorization or inverse (once), 2n²m
FLOPs an iteration.

    python scripts/benchmarks linear_solve
"""

import argparse
import statistics
import time

import jax

from jaxprune.methods.admm import ADMM
from jaxprune.methods.gram import gram, relative_error
from jaxprune.sparsity.patterns import Unstructured

PRESETS = {
    "smollm2-135m": [(576, 576), (576, 192), (576, 1536), (1536, 576)],
    "llama-7b": [(4096, 4096), (4096, 11008), (11008, 4096)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    print(
        f"{args.preset} on {jax.local_devices()[0].device_kind}, medians of {args.repeat}, "
        "alternating\n"
    )
    print("| n × m | step | inverse, s | cholesky, s | cholesky / inverse | relative error, both |")
    print("|---|---|---|---|---|---|")
    methods = {kind: ADMM(linear_solve=kind) for kind in ("inverse", "cholesky")}
    for n, m in PRESETS[args.preset]:
        x = jax.random.normal(jax.random.key(0), (2 * n, n)) @ jax.random.normal(
            jax.random.key(1), (n, n)
        )
        weight, h = jax.random.normal(jax.random.key(2), (n, m)), gram(x)
        times = {(kind, step): [] for kind in methods for step in ("prepare", "solve")}
        errors = {}
        for _ in range(args.repeat + 1):
            for kind, method in methods.items():
                start = time.perf_counter()
                prepared = jax.block_until_ready(method.prepare(h))
                middle = time.perf_counter()
                solution = jax.block_until_ready(method.solve(prepared, weight, Unstructured(0.5)))
                times[kind, "prepare"].append(middle - start)
                times[kind, "solve"].append(time.perf_counter() - middle)
                errors[kind] = float(relative_error(h, weight, solution.weight))
        for step in ("prepare", "solve"):
            # the first run compiles
            a, b = (statistics.median(times[kind, step][1:]) for kind in methods)
            agreement = f"{errors['inverse']:.6f}, {errors['cholesky']:.6f}"
            print(
                f"| {n} × {m} | {step} | {a:.4f} | {b:.4f} | {b / a:.2f} | {agreement} |",
                flush=True,
            )
