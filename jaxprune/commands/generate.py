"""Generate text with a checkpoint, for calibration and tuning when there is too little text."""

import dataclasses
from collections.abc import Sequence

from convert.paths import inputs_of, require_apart
from jaxprune.api.generate import OwnText, file_of, generate
from jaxprune.api.load import load
from jaxprune.commands.command_line import (
    CHECKPOINT,
    CommandLine,
    Section,
    make,
    require_at_least,
    require_positive,
)
from jaxprune.commands.computation_options import ComputationOptions
from jaxprune.commands.progress import Progress
from jaxprune.commands.prune import source_paths
from jaxprune.commands.terminal import choose_devices, command, console, keep_memory
from jaxprune.errors import InputError
from jaxprune.run_store.opening import store_folder

EXAMPLES = """Examples:

    jaxprune generate llama-7b --out own.jsonl
    jaxprune generate ./my-model --out own.jsonl --tokens 250k --prompts mytext.jsonl
    jaxprune --ckpt llama-7b --preset thorough --sparsity 0.7 --tune-text own.jsonl"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(OwnText):
    """What is written, and where."""

    out: str
    """The file to create, with rows of JSON for --calib and --tune-text. Progress is saved in
    OUT.unfinished; the same command resumes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(TextOptions, ComputationOptions):
    """Options of a text that is written."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs a command line."""
    given = CommandLine(argv, __name__).read(
        Section("Text", TextOptions),
        Section("Machine", ComputationOptions),
        positionals={"checkpoint": CHECKPOINT},
    )
    wanted = make(Options, given)
    require_positive(wanted, "tokens", "length", "prompt_tokens")
    require_at_least(wanted, 0, "seed")
    if "prompt_tokens" in given and wanted.prompts is None:
        raise InputError("--prompt-tokens does nothing by itself: pass --prompts with it")
    place = file_of(wanted.out)
    keep_memory(large=True)
    model = load(
        given["checkpoint"], dtype=wanted.computation_dtype, devices=choose_devices(wanted.device)
    )
    inputs = {"a checkpoint": inputs_of(model.source), "prompts": source_paths(wanted.prompts)}
    require_apart(
        inputs, {"out": place.path, "out.unfinished": store_folder(place.path)}, error=InputError
    )
    with Progress() as progress:
        made = generate(model, wanted, place, progress)
    texts = "1 text" if len(made) == 1 else f"{len(made)} texts"
    console.print(f"{wanted.out}: {texts} of {wanted.length} tokens")
