"""The output of a running command: lines, progress bars and the table of its timing."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import Progress as Bar
from rich.progress import TaskID

from jaxprune.api.evaluate import Evaluation
from jaxprune.api.prune import PruningResult
from jaxprune.commands.terminal import console, duration, keep_memory, print_table, progress_bar
from jaxprune.distill.schedule import all_zeros_there
from jaxprune.evaluation.quality import Quality, table
from jaxprune.models.common.functional_modules import every_expert
from jaxprune.planning.estimate import Need, seconds
from jaxprune.planning.jit_versus_eager import Timing
from jaxprune.recipe_parts import Tuning
from jaxprune.reporting.model_card import summary
from jaxprune.sharding import ONE_DEVICE, Devices
from jaxprune.solve.layer_result import LayerResult
from jaxprune.solve.quantized_layers import ERROR
from jaxprune.streaming.observer import Observer

MOST_COLUMNS = 6
"""Of a table of checkpoints, so that a terminal has room for it."""
SHORTER = {
    "mix": "--drop-channels in place of --drop-parameters",
    **dict.fromkeys(("layers", "experts", "heads", "channels"), "a smaller --nsamples or --seqlen"),
    "sensitivity": "a smaller --sensitivity-windows",
    "gram": "a smaller --nsamples or --seqlen",
    "solve": "a quicker --method (wanda, or magnitude)",
    "forward": "a smaller --nsamples or --seqlen",
    "quantize": "a smaller --nsamples or --seqlen",
    "tune": "less to tune on (--tune-epochs, or --tune-tokens)",
    "evaluate": "a smaller --eval-windows, or --eval none,",
}
"""Phase -> what makes it shorter."""


class Progress(Observer):
    """Shows the progress of a run on the terminal, between `__enter__` and `__exit__`.

    Args:
        devices: the devices that the work runs on.
        tasks: whether tasks of lm-eval are part of it, whose time is not foreseen.
        tuning: the tuning that is part of it, as `effective_tuning` has it; None: there is none.
    """

    def __init__(
        self, devices: Devices = ONE_DEVICE, *, tasks: bool = False, tuning: Tuning | None = None
    ) -> None:
        self._devices, self._tasks, self._tuning = devices, tasks, tuning or Tuning()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._count = 0
        self._divergences: list[float] = []

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def planned(self, need: Need) -> None:
        """Says how long the run will take, by this machine's matrix rate, and which phase takes
        most."""
        times = seconds(need, self._devices)
        total = duration(sum(times.values()))
        beside = "compilation and the tasks of lm-eval" if self._tasks else "compilation"
        console.print(f"this takes about {total}, plus {beside}; {longest(times)}")

    def started(self, what: str, count: int, unit: str = "layers") -> None:
        """Begins a new progress bar."""
        self._stop()
        if not what.startswith(("pruning", "removing")):
            keep_memory(large=True)  # the phases from here on compute logits
        self._count = count
        self._bar = progress_bar()
        self._task = self._bar.add_task(what, total=count, unit=unit)
        self._bar.start()

    def layer_visited(self, index: int) -> None:
        """Advances the bar."""
        if self._bar:
            self._bar.advance(self._task)

    def layer_done(self, result: LayerResult) -> None:
        """Prints a line about a pruned layer."""
        if self._bar:
            self._bar.console.print(layer_line(result, self._count))
            self._bar.update(self._task, completed=result.index + 1)

    def finished(self, result: PruningResult | Evaluation) -> None:
        """Prints the tables of a result."""
        self._stop()
        if isinstance(result, Evaluation):
            header, rows = result.rows()
            if len(header) > MOST_COLUMNS:  # one row per checkpoint instead
                header, *rows = map(list, zip(header, *rows, strict=True))
            print_table(rows, header)
            print_samples(result.qualities)
            return
        if result.record.timing:
            header, rows = timing_table(result.record.timing)
            print_table(rows, header)
        print_table([*summary(result.record), ("result", os.path.relpath(result.folder))])
        if result.evaluation:
            header, rows = table(result.evaluation)
            print_table(rows, header)
            print_samples(result.evaluation)

    def tuning_resumed(self, step: int) -> None:
        """Prints the step with which the tuning resumes."""
        if self._bar:
            self._bar.console.print(f"the tuning resumes with step {step + 1}")

    def step_done(self, number: int, steps: int, divergence: float) -> None:
        """Advances the bar and prints the mean divergence over each quarter of the steps."""
        self._divergences.append(divergence)
        if self._bar:
            self._bar.update(self._task, completed=number)
            if number * 4 // steps > (number - 1) * 4 // steps:
                count = len(self._divergences)
                mean = sum(self._divergences) / count
                self._bar.console.print(
                    f"tuning, steps {number - count + 1} to {number} of {steps}: KL divergence "
                    f"{mean:.4f} nats on the text that is tuned on"
                )
                self._divergences = []

    def divergence_measured(self, tokens: int, divergence: float) -> None:
        """Prints the divergence on the held-out text."""
        if self._bar:
            line = (
                f"tuned on {tokens:,} tokens: KL divergence {divergence:.4f} nats on held-out text"
            )
            if not all_zeros_there(self._tuning, tokens):
                line += ", zeros are still to come"
            self._bar.console.print(line)


def print_samples(qualities: Mapping[str, Quality]) -> None:
    """Prints prompts with the continuations of all checkpoints below them."""
    columns = [
        [(name, sample) for sample in quality.samples]
        for name, quality in qualities.items()
        if quality.samples
    ]
    for row in zip(*columns, strict=True):
        console.print(f"\n{json.dumps(row[0][1].prompt, ensure_ascii=False)}")
        for name, sample in row:
            console.print(
                f"  {Path(name).name}: {json.dumps(''.join(sample.tokens), ensure_ascii=False)}"
            )


def longest(times: Mapping[str, float]) -> str:
    """Returns which phase takes most, and what makes it shorter, as a clause."""
    phase = max(times, key=lambda phase: times[phase])
    return f"most of it is {phase} ({duration(times[phase])}), which {SHORTER[phase]} shortens"


def layer_line(layer: LayerResult, count: int) -> str:
    """Returns one line on a finished layer: relative errors in percent, sparsity, seconds."""
    every: dict[str, list[float]] = {}
    for path, kernel in layer.kernels.items():
        every.setdefault(every_expert(path), []).append(kernel.stats.get(ERROR, kernel.error))
    labels = short_names(list(every))
    errors = "  ".join(
        f"{label} {100 * sum(found) / len(found):.3g}"
        for label, found in zip(labels, every.values(), strict=True)
    )
    zeros, size = (
        sum(getattr(kernel, name) for kernel in layer.kernels.values())
        for name in ("zeros", "size")
    )
    seconds = "  ".join(f"{phase} {value:.1f}" for phase, value in layer.figures.seconds.items())
    line = (
        f"layer {layer.index + 1}/{count}  error %: {errors}  sparsity {100 * zeros / size:.2f} %  "
        f"s: {seconds}"
    )
    few = [kernel.stats["tokens"] for kernel in layer.kernels.values() if kernel.few_tokens]
    if few:
        line += (
            f"  {len(few)} linear layers of experts were given fewer tokens than they have inputs, "
            f"at least {min(few):g}"
        )
    enough = [kernel for kernel in layer.kernels.values() if not kernel.few_tokens]
    raised = max((kernel.stats.get("damping_times", 1) for kernel in enough), default=1)
    if raised > 1:
        line += f"  damping raised {raised:g} times"
    return line


def short_names(paths: Sequence[str]) -> list[str]:
    """Returns the last words of linear layers' paths, as many as distinguish them, such as
    `experts.up`."""
    words = [path.removesuffix("_proj").replace(".*", "").split(".") for path in paths]
    return [
        next(
            ".".join(own[-count:])
            for count in range(1, len(own) + 1)
            if count == len(own) or sum(other[-count:] == own[-count:] for other in words) == 1
        )
        for own in words
    ]


def timing_table(timing: Timing) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a table: a phase each."""
    times = "compiled, first time, s", "compiled, s", "eager, s"
    rows = []
    for phase in timing.jit:
        found = timing.first[phase], timing.jit[phase], timing.eager[phase]
        first, jit, eager = (value or 0.0 for value in found)
        values = first, jit, eager, eager / max(jit, 1e-9)
        rows.append([phase, *(f"{value:.2f}" for value in values)])
    return ["first layer", *times, "eager / compiled"], rows
