"""The options that say what to measure of checkpoints."""

import dataclasses
from pathlib import Path
from typing import Literal, TypeVar

from convert.paths import paths_of
from jaxprune.commands.command_line import require_at_least, require_positive
from jaxprune.errors import InputError
from jaxprune.evaluation.quality import Measures
from jaxprune.evaluation.tasks import ZERO_SHOT

MEASURES = ("ppl", "samples", "zero-shot", "speed")
SAMPLE_TOKENS = 48
MEASURE_OF = {
    **dict.fromkeys(("eval_text", "eval_seqlen", "eval_windows"), "ppl"),
    **dict.fromkeys(("prompts", "sample_tokens"), "samples"),
    **dict.fromkeys(("tasks", "limit", "tasks_data", "backend"), "zero-shot"),
}
"""Option -> the measure that it is for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of every command that evaluates."""

    eval: str | None = None
    """What to measure, separated by commas. ppl: perplexity of a text and, against a dense model,
    KL divergence and top-1 agreement. samples: continuations of prompts. zero-shot: lm-eval tasks.
    speed: size, memory, and prompt and generated tokens a second in llama.cpp and in transformers,
    on the CPU, where they are installed.
    none: nothing (default: ppl for a run, ppl,zero-shot for jaxprune evaluate)."""
    eval_text: str | None = None
    """Texts for ppl, separated by commas: wikitext2, c4, wikipedia, or a file as for --calib
    (default: wikitext2; wikipedia for smollm2-135m, with other articles than for calibration)."""
    eval_seqlen: int | None = None
    """Number of tokens of an evaluation window (default: --seqlen, else 2048)."""
    eval_windows: int | None = None
    """Use only this many windows of a text, from its start (default: all)."""
    prompts: str | None = None
    """A file with prompts for samples: .txt with one prompt per line, or texts or conversations as
    for --calib (default: twelve built-in prompts)."""
    sample_tokens: int | None = None
    """Maximum number of tokens of a sample (default: 48)."""
    tasks: str | None = None
    """lm-eval tasks for zero-shot, separated by commas (default: the paper's seven: boolq, rte,
    hellaswag, winogrande, arc_easy, arc_challenge, openbookqa)."""
    limit: int | None = None
    """Use only this many rows of each task, from its start (default: all)."""
    tasks_data: str | None = None
    """A folder with the rows of the tasks, as TASK.jsonl or TASK.parquet, instead of the hub."""
    backend: Literal["jax", "torch"] = "jax"
    """What runs the tasks: jax streams the model layer by layer; torch loads the whole model into
    lm-eval's HFLM."""

    @property
    def measures(self) -> list[str]:
        """What to measure: of `MEASURES`."""
        return [] if self.eval == "none" else split(self.eval)

    def plan(self, device: str = "auto") -> Measures:
        """Returns what to measure, as the library takes it; defaults are filled in.

        Args:
            device: the kind of device that the torch backend runs on.
        """
        texts, tasks = (split(found) for found in (self.eval_text, self.tasks))
        return Measures(
            texts=texts if "ppl" in self.measures else [],
            seqlen=self.eval_seqlen or 2048,
            windows=self.eval_windows,
            tasks=tasks if "zero-shot" in self.measures else [],
            tasks_data=self.tasks_data,
            limit=self.limit,
            backend=self.backend,
            device=device,
            samples=(self.sample_tokens or SAMPLE_TOKENS) if "samples" in self.measures else 0,
            prompts=self.prompts,
            speed="speed" in self.measures,
        )

    def inputs(self) -> dict[str, list[Path]]:
        """Returns option -> the paths that it names."""
        return {
            "eval_text": [path for text in split(self.eval_text) for path in paths_of(text)],
            "prompts": paths_of(self.prompts),
            "tasks_data": paths_of(self.tasks_data),
        }

    def check(self) -> None:
        """Raises InputError for options that contradict each other or mean nothing."""
        require_positive(self, "eval_windows", "limit", "sample_tokens")
        require_at_least(self, 2, "eval_seqlen")  # the first token of a window is not predicted
        if unknown := [name for name in self.measures if name not in MEASURES]:
            raise InputError(
                f"--eval takes {', '.join(MEASURES)} or none, not {unknown[0]!r}; tasks go to "
                "--tasks"
            )
        for name, measure in MEASURE_OF.items():
            if getattr(self, name) not in (None, "jax") and measure not in self.measures:
                raise InputError(
                    f"--{name.replace('_', '-')} is for --eval {measure}, but --eval is "
                    f"{self.eval}: pass --eval {','.join([*self.measures, measure])}"
                )


Options = TypeVar("Options", bound=EvalOptions)


def with_defaults(options: Options, *, eval: str, eval_text: str, eval_seqlen: int) -> Options:
    """Returns the same options, those left out filled in.

    Raises:
        InputError: see `EvalOptions.check`.
    """
    filled = dataclasses.replace(options, eval=options.eval or eval)
    filled.check()
    if "ppl" in filled.measures:
        text, seqlen = options.eval_text or eval_text, options.eval_seqlen or eval_seqlen
        filled = dataclasses.replace(filled, eval_text=text, eval_seqlen=seqlen)
    if "zero-shot" in filled.measures:
        filled = dataclasses.replace(filled, tasks=options.tasks or ",".join(ZERO_SHOT))
    return filled


def split(text: str | None) -> list[str]:
    """Returns the parts between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
