"""Runs a checkpoint in another program, in a process of its own, and times it.

    python -m jaxprune.evaluation.engines ENGINE PATH PROMPT GENERATED

It prints a line of JSON with the fields of `Timing`. The process imports nothing but the engine, so
its peak memory is the engine's.
"""

import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """One measurement.

    Attributes:
        prompt: seconds to read the prompt.
        generated: seconds to generate the tokens after it.
        peak_bytes: the peak memory of the process.
    """

    prompt: float
    generated: float
    peak_bytes: int


Step = Callable[[list[int]], Any]
"""Adds tokens to the context, and computes the logits of the last one."""


def llama_cpp(path: str, positions: int) -> tuple[int, Callable[[], Step]]:
    """Loads a GGUF file into llama.cpp.

    Args:
        path: the file.
        positions: tokens of the longest context.

    Returns:
        The size of the vocabulary, and what starts an empty context.
    """
    from llama_cpp import Llama

    threads = _cores()
    model = Llama(
        path,
        n_ctx=positions,
        n_batch=positions,
        n_ubatch=positions,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        verbose=False,
    )

    def start() -> Step:
        model.reset()
        return model.eval

    return model.n_vocab(), start


def transformers(path: str, positions: int) -> tuple[int, Callable[[], Step]]:
    """Loads a folder in Hugging Face's format into transformers; arguments as for `llama_cpp`."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    torch.set_num_threads(_cores())
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True).eval()

    def start() -> Step:
        state: dict[str, Any] = {"past_key_values": None}

        def step(tokens: list[int]) -> None:
            ids = torch.tensor([tokens])
            output = model(ids, use_cache=True, logits_to_keep=1, **state)
            state["past_key_values"] = output.past_key_values

        return step

    return model.config.get_text_config().vocab_size, start


class Engine(NamedTuple):
    """A program that runs checkpoints.

    Attributes:
        module: the Python module that it needs.
        load: loads a checkpoint.
    """

    module: str
    load: Callable[[str, int], tuple[int, Callable[[], Step]]]

    @property
    def installed(self) -> bool:
        """Whether it can be used here."""
        return importlib.util.find_spec(self.module) is not None


ENGINES = {
    "llama.cpp": Engine("llama_cpp", llama_cpp),
    "transformers": Engine("torch", transformers),
}
"""Name -> engine."""


def measure(engine: str, path: str, prompt: int, generated: int) -> Timing:
    """Times a checkpoint in an engine, after a short context that is not timed.

    Args:
        engine: the name of the engine.
        path: the checkpoint.
        prompt: tokens of the prompt. They are all different kinds of tokens, evenly spaced in the
            vocabulary.
        generated: tokens that are generated, one at a time. Their speed does not depend on which
            tokens they are.
    """
    vocabulary, start = ENGINES[engine].load(path, prompt + generated)
    tokens = [place * vocabulary // prompt for place in range(prompt)]
    step = start()
    step(tokens[: prompt // 4])
    step(tokens[:1])
    step = start()
    begin = time.perf_counter()
    step(tokens)
    read = time.perf_counter()
    for place in range(generated):
        step([tokens[place % prompt]])
    end = time.perf_counter()
    return Timing(read - begin, end - read, _peak_bytes())


def _peak_bytes() -> int:
    """Returns the peak memory of this process. On Linux, `ru_maxrss` is at least the memory that
    the parent process had when it started this one, so the kernel's own count is used there."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    name, file, *counts = sys.argv[1:]
    print(json.dumps(measure(name, file, *map(int, counts))._asdict()))
