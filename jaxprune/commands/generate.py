"""Let a checkpoint write text, to prune it on where there is too little other text."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Literal

import numpy as np

from convert.destination import destination, staged
from convert.paths import inputs_of, paths_of, require_apart
from jaxprune.api.generate import generate
from jaxprune.api.load import load
from jaxprune.commands.options import CommandLine, Section, make, require_at_least, require_positive
from jaxprune.commands.progress import Progress
from jaxprune.commands.terminal import choose_devices, console, keep_memory, run_main
from jaxprune.errors import InputError

EXAMPLES = """Examples:

    jaxprune generate llama-7b own.jsonl --tokens 1M
    jaxprune generate ./my-model own.jsonl --tokens 250k --prompts mytext.jsonl
    jaxprune --ckpt llama-7b --preset thorough --sparsity 0.7 --calib c4,own.jsonl"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is written."""

    tokens: int = 1_000_000
    """Of all texts, such as 250k or 1M."""
    length: int = 256
    """Tokens of a text."""
    prompts: str | None = None
    """A text whose documents give the beginnings, as for --calib (default: the model begins by itself)."""
    prompt_tokens: int = 16
    """Tokens of a beginning."""
    seed: int = 0
    """Of what is drawn."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the model's computation; auto is float32 on a CPU and the checkpoint's dtype elsewhere."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """The kind of device to run on; auto takes the best there is, gpu is CUDA's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_main(_main, argv)


def _main(argv: Sequence[str]) -> None:
    given = CommandLine(argv).read(
        "jaxprune generate",
        "Let a checkpoint write text, to prune it on where there is too little other text.",
        [Section("Text", Options)],
        positionals={
            "checkpoint": "A folder, a .gguf file, a known name, or owner/name of a hub.",
            "file": "The file to make: rows of JSON, for --calib.",
        },
        examples=EXAMPLES,
    )
    wanted = make(Options, given)
    require_positive(wanted, "tokens", "length", "prompt_tokens")
    require_at_least(wanted, 0, "seed")
    place = destination(given["file"], folder=False)
    if place.path.suffix != ".jsonl":
        raise InputError("--calib knows rows of JSON by their file's name", file=place.path, wanted="FILE.jsonl")
    place.check()
    keep_memory(large=True)
    devices = choose_devices(wanted.device)
    model = load(given["checkpoint"], dtype=None if wanted.dtype == "auto" else np.dtype(wanted.dtype), devices=devices)
    inputs = {"a checkpoint": inputs_of(model.source), "prompts": paths_of(wanted.prompts)}
    require_apart(inputs, {"the file": place.path}, error=InputError)
    with Progress() as progress:
        texts = generate(
            model,
            wanted.tokens,
            length=wanted.length,
            prompts=wanted.prompts,
            prompt_tokens=wanted.prompt_tokens,
            seed=wanted.seed,
            observer=progress,
        )
    with staged(place) as file:
        file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    console.print(f"{given['file']}: {len(texts)} texts of {wanted.length} tokens")


if __name__ == "__main__":
    sys.exit(main())
