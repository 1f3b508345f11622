"""The options of a run, beside its recipe."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from convert.hub import known_names
from jaxprune.errors import InputError
from jaxprune.flags import add_fields, make
from jaxprune.recipe import Parser, Recipe


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's outcome, but for the recipe."""

    ckpt: str
    """The dense checkpoint: a known name such as llama-7b, a folder, a .gguf file, or owner/name on the hub."""
    out: str | None = None
    """The folder to make (default: named after checkpoint, method and pattern, in the current folder)."""
    overwrite: bool = False
    """Replace --out (and --save-masks) if it exists; it is replaced only once the new one is complete."""
    save_masks: str | None = None
    """A file for the masks, packed bits in safetensors, for fine-tuning that keeps them."""
    calib: str | None = None
    """Calibration text: c4, wikitext2, wikipedia, a file (.jsonl, .json.gz, .parquet, .txt, or .npy of token ids
    [count, length]), or a folder laid out as on the hub (default: c4; wikipedia for smollm2-135m)."""
    nsamples: int = 128
    """Calibration windows."""
    seqlen: int = 2048
    """Tokens of a calibration window."""
    pack: bool = False
    """Join documents to fill calibration windows, instead of skipping those shorter than one."""
    eval_text: str | None = None
    """Text to measure perplexity on, as --calib, or none (default: wikitext2; wikipedia for smollm2-135m, other
    articles than calibration's)."""
    eval_seqlen: int | None = None
    """Tokens of an evaluation window (default: --seqlen)."""
    eval_windows: int | None = None
    """Evaluate on the first so many windows only (default: all)."""
    seed: int = 0
    """Of the choice of calibration windows; a run is deterministic in it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the model's computation; auto is float32 on a CPU and the checkpoint's dtype elsewhere. The result is
    stored in the checkpoint's dtype in any case."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """The kind of device to run on; auto takes the best there is, gpu is CUDA's."""

    def resolved(self, recipe: Recipe) -> "Config":
        """The same run with the defaults that depend on other options filled in.

        Raises:
            InputError: options that no run can have.
        """
        for name in ("nsamples", "seqlen", "eval_seqlen", "eval_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        hubless = self.ckpt == "smollm2-135m"
        return dataclasses.replace(
            self,
            out=self.out or f"{Path(self.ckpt).absolute().name.removesuffix('.gguf')}-{recipe.slug}",
            calib=self.calib or ("wikipedia" if hubless else "c4"),
            eval_text=self.eval_text or ("wikipedia" if hubless else "wikitext2"),
            eval_seqlen=self.eval_seqlen or self.seqlen,
        )


def parse(argv: Sequence[str]) -> tuple[Config, Recipe]:
    """Reads a command line.

    Raises:
        InputError: a value that cannot be used. Unknown flags end the program with argparse's message.
    """
    reader = Parser(
        argv,
        prog="jaxprune",
        description="Prune a LLaMA-family checkpoint in one shot, layer by layer, and measure what it cost.",
        epilog=f"Known checkpoints: {', '.join(known_names())}.",
    )
    add_fields(reader.parser.add_argument_group("run"), Config)
    given, recipe = reader.parse()
    return make(Config, given).resolved(recipe), recipe
