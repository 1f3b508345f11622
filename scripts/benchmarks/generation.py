"""Prompts continued with keys and values kept, beside a whole pass for each token: seconds, and
their ratio."""

import argparse
import time
from collections.abc import Callable

import numpy as np
from markdown import markdown

import jaxprune
from jaxprune.evaluation.samples import Prompts
from jaxprune.streaming.generation import generate
from jaxprune.streaming.model import StreamedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype")
    args = parser.parse_args()
    model = jaxprune.load(args.ckpt, dtype=args.dtype)
    prompts = Prompts().ids(model, args.tokens)
    ways: dict[str, Callable[[StreamedModel, list[list[int]], int], list[list[int]]]] = {
        "keys and values kept": kept,
        "a whole pass for each token": whole,
    }
    found, seconds = {}, {}
    for name, way in ways.items():
        way(model, prompts, 2)  # compiles
        start = time.perf_counter()
        found[name] = way(model, prompts, args.tokens)
        seconds[name] = time.perf_counter() - start
    first, second = found.values()
    count = len(prompts) * args.tokens
    rows = [[name, f"{took:.1f}", f"{count / took:.0f}"] for name, took in seconds.items()]
    print(
        "\n".join(markdown([f"{count} tokens of {args.ckpt}", "seconds", "tokens a second"], rows))
    )
    took = list(seconds.values())
    same = sum(
        a == b
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    print(f"\n{took[1] / took[0]:.1f} times as fast; {same} of {count} tokens are the same")


def kept(model: StreamedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    return generate(model, prompts, [count] * len(prompts), lambda number, tokens: False)


def whole(model: StreamedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """As many tokens by whole passes, all of windows of one length."""
    lengths = np.array([len(prompt) for prompt in prompts])
    windows = np.zeros((len(prompts), int(lengths.max()) + max(count, 32)), np.int32)
    for row, prompt in zip(windows, prompts, strict=True):
        row[: len(prompt)] = prompt
    head = model.params_of(model.architecture.head)
    rows = np.arange(len(prompts))
    for made in range(count):
        (states,) = model.final_states(windows)
        windows[rows, lengths + made] = model.next_tokens(
            head, states.pick(rows, lengths + made - 1)
        )
    return [
        row[length : length + count].tolist() for row, length in zip(windows, lengths, strict=True)
    ]


if __name__ == "__main__":
    main()
