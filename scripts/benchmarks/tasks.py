"""The two backends on the same tasks, task by task in turn: seconds, and whether they agree item by
item.

python scripts/benchmarks tasks --ckpt smollm2-135m --limit 100
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune import hardware, load
from jaxprune.evaluation.lm import StreamedLM
from jaxprune.evaluation.packing import Request, group, pack
from jaxprune.evaluation.tasks import ZERO_SHOT, Tasks, summarize
from jaxprune.evaluation.torch_lm import hflm
from jaxprune.planning.this_machine import describe_hardware


class Counting(StreamedLM):
    """Counts the tokens that go through the model, and those of one row a request."""

    tokens, alone = 0, 0

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        self.alone = sum(len(context) + len(continuation) - 1 for context, continuation in requests)
        packed = pack(
            requests,
            group(requests, self.max_length),
            self.max_length,
            hardware.current().tokens_per_batch,
        )
        self.tokens = sum(windows.tokens.size for windows in packed)
        return super()._score(requests)


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, int, float]:
    """Items, items whose accuracy differs, and the largest difference of a log-likelihood in
    nats."""
    items, different, largest = 0, 0, 0.0
    for task, samples in ours["samples"].items():
        for a, b in zip(samples, theirs["samples"][task], strict=True):
            assert a["doc_hash"] == b["doc_hash"]
            items += 1
            different += any(
                a[metric] != b[metric] for metric in ("acc", "acc_norm") if metric in a
            )
            pairs = zip(a["filtered_resps"], b["filtered_resps"], strict=True)
            largest = max(largest, *(abs(x[0] - y[0]) for x, y in pairs))
    return items, different, largest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", default="smollm2-135m")
    parser.add_argument("--tasks", default=",".join(ZERO_SHOT))
    parser.add_argument(
        "--tasks-data", type=Path, help="folder with the tasks' rows (default: the hub's)"
    )
    parser.add_argument("--limit", type=int, default=100, help="rows of each task")
    args = parser.parse_args()
    streamed = load(args.ckpt)
    models = {"jax": Counting(streamed), "torch": hflm(streamed.reader, streamed.dtype)}
    print(f"{args.ckpt}, the first {args.limit} rows of each task, {describe_hardware()}\n")
    header = (
        "task",
        "items",
        "acc, jax",
        "acc, torch",
        "items that differ",
        "largest difference, nats",
    )
    header += "tokens, one row a request", "tokens, packed", "jax, s", "torch, s", "torch / jax"
    _row(*header)
    _row(*["---"] * len(header))
    totals = np.zeros(6)
    for name in args.tasks.split(","):
        tasks = Tasks([name], args.tasks_data, args.limit)
        results, seconds = {}, {}
        for backend, model in models.items():
            start = time.perf_counter()
            results[backend] = tasks.run(model)
            seconds[backend] = time.perf_counter() - start
        items, different, largest = compare(results["jax"], results["torch"])
        counts = models["jax"].alone, models["jax"].tokens
        totals += items, different, *counts, *seconds.values()
        accuracies = [f"{summarize(results[backend])[name]['acc']:.4f}" for backend in models]
        _row(
            name,
            items,
            *accuracies,
            different,
            f"{largest:.1e}",
            *counts,
            *_times(*seconds.values()),
        )
    items, different, alone, tokens, *both = totals
    _row("all", int(items), "", "", int(different), "", int(alone), int(tokens), *_times(*both))


def _times(ours: float, theirs: float) -> tuple[str, str, str]:
    return f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}"


def _row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
