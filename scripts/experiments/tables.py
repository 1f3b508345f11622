"""An experiment's cells as a CSV, a Markdown table and a picture."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import Experiment, pattern_name
from pictures import Results, draw, seconds_of

from jaxprune.evaluation.perplexity import short_name

HEADINGS = {
    "gram": "Gram matrices",
    "solve": "solver",
    "forward": "forward",
    "sensitivity": "sensitivity",
    "tune": "tuning",
}
PHASES = tuple(HEADINGS)
REACHED = 10
"""ADMM iterations whose error the other updates are to reach, in the table of steps."""


def write(name: str, experiment: Experiment, bench: Any, results: Results) -> list[Path]:
    """Writes NAME.csv, NAME.md, NAME.png and NAME.svg; returns their paths."""
    stem = bench.out / name
    rows = [_record(cell, result, _paper(experiment, bench.ckpt, cell)) for cell, result in results]
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    setting = _setting(experiment, bench, results)
    lines = [
        f"# {experiment.title}",
        "",
        f"{setting}.",
        "",
        *_tables(experiment, bench.ckpt, results),
        "",
    ]
    stem.with_suffix(".md").write_text("\n".join(lines))
    drawn = draw(experiment, bench.ckpt, results, setting, stem)
    return [stem.with_suffix(".csv"), stem.with_suffix(".md"), *drawn]


def _record(cell: Any, result: dict[str, Any], paper: float | None) -> dict[str, Any]:
    seconds = seconds_of(result)
    return {
        "row": cell.row,
        "pattern": cell.pattern,
        "steps": cell.step,
        "layer": cell.linear and cell.linear[0],
        "linear": cell.linear and cell.linear[1],
        "seed": cell.seed,
        "perplexity": _digits(result.get("perplexity")),
        "paper": paper,
        **_compared(result),
        **_accuracies(result),
        "relative_error": _digits(result.get("error")),
        **{f"seconds_{phase}": _digits(seconds.get(phase), 4) for phase in PHASES},
    }


def _compared(result: dict[str, Any]) -> dict[str, str | None]:
    """What each text says beside the dense model: divergence in nats, and the same most probable
    tokens in percent."""
    found = {}
    for name, text in result.get("quality", result).get("texts", {}).items():
        of_text = f" {name}" if "texts" in result else ""
        found[f"perplexity{of_text}"] = _digits(text["perplexity"])
        found[f"kl{of_text}"] = _digits(text["kl"])
        found[f"top1{of_text}"] = _digits(None if text["top1"] is None else 100 * text["top1"])
    return found


def _accuracies(result: dict[str, Any]) -> dict[str, str | None]:
    """Accuracies by task and their mean, in percent."""
    if "quality" not in result:
        return {}
    found = {
        task: metrics for task, metrics in result["quality"]["tasks"].items() if "acc" in metrics
    }
    found["mean"] = result["quality"]["mean_accuracy"]
    return {
        f"{name} {task}": _digits(100 * metrics[name]) if name in metrics else None
        for task, metrics in found.items()
        for name in ("acc", "acc_stderr")
    }


def _digits(value: float | None, digits: int = 6) -> str | None:
    return None if value is None else f"{value:.{digits}g}"


def _paper(experiment: Experiment, ckpt: str, cell: Any) -> float | None:
    """The paper's perplexity, or mean accuracy in percent."""
    value = experiment.paper.get(ckpt, {}).get((cell.row, cell.pattern))
    return value[-1] if isinstance(value, tuple) else value


def _setting(experiment: Experiment, bench: Any, results: Results) -> str:
    """What was run on what, in a sentence without its full stop."""
    windows, length = bench.calibration.shape
    text = (
        f"{bench.ckpt}, calibrated on {windows} windows of {length} tokens of "
        f"{short_name(bench.options.calib)}"
    )
    if experiment.measure in ("perplexity", "quality", "accuracy"):
        names = bench.texts if experiment.measure == "quality" else bench.texts[:1]
        for name in names:
            windows, length = bench.evaluation[name].shape
            text += f"; perplexity of {short_name(name)}, {windows} windows of {length} tokens"
    if experiment.measure == "accuracy":
        rows = f"the first {bench.options.limit} rows" if bench.options.limit else "all rows"
        text += f"; tasks of lm-eval, {rows} of each, {bench.options.backend} backend"
    return f"{text}; {', '.join(sorted({result['hardware'] for _, result in results}))}"


def _tables(experiment: Experiment, ckpt: str, results: Results) -> list[str]:
    if experiment.measure == "seconds":
        return _durations(results)
    if experiment.measure == "accuracy":
        quality = _by_pattern(experiment, ckpt, results) if experiment.against else []
        return [*quality, "", *_zero_shot(experiment, ckpt, results)]
    if experiment.measure == "quality":
        return _over_seeds(experiment, results)
    if experiment.measure == "error":
        return (
            _convergence(experiment, results) if experiment.steps else _errors(experiment, results)
        )
    return (
        _by_steps(experiment, results)
        if experiment.steps
        else _by_pattern(experiment, ckpt, results)
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def _by_pattern(experiment: Experiment, ckpt: str, results: Results) -> list[str]:
    """Perplexities and mean errors, rows by patterns."""
    found = {(cell.row, cell.pattern): result for cell, result in results}
    paper = experiment.paper.get(ckpt, {})
    measured = [
        row
        for row in experiment.rows
        if any((row, pattern) in found for pattern in experiment.patterns)
    ]

    def perplexity(row: str, pattern: str) -> str:
        beside = f" (paper {paper[row, pattern]:g})" if (row, pattern) in paper else ""
        return (
            f"{found[row, pattern]['perplexity']:.2f}{beside}"
            if (row, pattern) in found
            else "not run"
        )

    def error(row: str, pattern: str) -> str:
        return f"{100 * found[row, pattern]['error']:.3f}" if (row, pattern) in found else "not run"

    header = ["perplexity", *map(pattern_name, experiment.patterns)]
    rows = [["dense", perplexity("dense", "")] + [""] * (len(experiment.patterns) - 1)]
    rows += [
        [row, *(perplexity(row, pattern) for pattern in experiment.patterns)] for row in measured
    ]
    lines = markdown(header, rows)
    errors = [[row, *(error(row, pattern) for pattern in experiment.patterns)] for row in measured]
    return [
        *lines,
        "",
        *(_against(experiment, found, measured) if experiment.against else []),
        "Mean over all linears of the error relative to the linear's own input in that run:",
        "",
        *markdown(["relative error, %", *header[1:]], errors),
    ]


def _against(
    experiment: Experiment, found: dict[tuple[str, str], dict[str, Any]], rows: Sequence[str]
) -> list[str]:
    """Perplexities over the best of some rows', and durations over the first's."""
    ratios = experiment.over_best({key: result["perplexity"] for key, result in found.items()})

    def ratio(row: str, pattern: str) -> str:
        return f"{ratios[row, pattern]:.3f}" if (row, pattern) in ratios else ""

    def duration(row: str, pattern: str) -> str:
        own, first = (
            sum(seconds_of(found.get((name, pattern), {})).values())
            for name in (row, experiment.against[0])
        )
        return (f"{own:.0f} s" + (f" ({own / first:.2f})" if first else "")) if own else ""

    def cells(value: Callable[[str, str], str]) -> list[list[str]]:
        return [[row, *(value(row, pattern) for pattern in experiment.patterns)] for row in rows]

    names = [*map(pattern_name, experiment.patterns)]
    better = "the better of " * (len(experiment.against) > 1)
    return [
        f"Perplexity over that of {better}{' and '.join(experiment.against)}:",
        "",
        *markdown(["ratio", *names], cells(ratio)),
        "",
        f"Seconds to prune, all phases, and over {experiment.against[0]}'s:",
        "",
        *markdown(["seconds (ratio)", *names], cells(duration)),
        "",
    ]


def _over_seeds(experiment: Experiment, results: Results) -> list[str]:
    """Means over calibration seeds with their standard deviations, a table for each text and
    metric."""
    lines: list[str] = [
        "Means over the calibration seeds ± the standard deviation of one seed, where there are "
        "several. KL divergence from the dense model in nats; top-1 agreement in percent."
    ]
    dense = next(result for cell, result in results if cell.row == "dense")
    for text in dense["texts"]:
        for metric, scale in (("perplexity", 1), ("kl", 1), ("top1", 100)):
            rows = []
            for row in experiment.rows:
                values = [
                    [
                        scale * result["texts"][text][metric]
                        for cell, result in results
                        if (cell.row, cell.pattern) == (row, pattern)
                    ]
                    for pattern in experiment.patterns
                ]
                if any(values):
                    rows.append([row, *map(mean_text, values)])
            known = f" (dense {dense['texts'][text]['perplexity']:.2f})" * (metric == "perplexity")
            header = [f"{metric}, {text}{known}", *map(pattern_name, experiment.patterns)]
            lines += ["", *markdown(header, rows)]
    return lines


def mean_text(values: Sequence[float]) -> str:
    """A mean and its standard deviation, in as many digits as this allows; empty for no value."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    deviation = statistics.stdev(values)
    digits = max(0, 1 - math.floor(math.log10(deviation))) if deviation else 2
    if deviation and f"{deviation:.1e}"[0] != "1":
        digits = max(0, digits - 1)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _zero_shot(experiment: Experiment, ckpt: str, results: Results) -> list[str]:
    """Accuracies in percent, with standard errors, and the paper's beside them; then what a text
    says."""
    tasks = list(results[0][1]["quality"]["tasks"])
    paper = experiment.paper.get(ckpt, {})
    rows, texts = [], []
    for cell, result in results:
        quality = result["quality"]
        found = [quality["tasks"][task] for task in tasks] + [quality["mean_accuracy"]]
        beside = paper.get((cell.row, cell.pattern), [None] * len(found))
        values = [
            _with_error(m) + (f" (paper {p:g})" if p else "")
            for m, p in zip(found, beside, strict=True)
        ]
        rows.append([pattern_name(cell.pattern) if cell.pattern else "", cell.row, *values])
        for text in quality["texts"].values():
            compared = (
                ["", ""]
                if text["kl"] is None
                else [f"{text['kl']:.4f}", f"{100 * text['top1']:.2f} %"]
            )
            texts.append([*rows[-1][:2], f"{text['perplexity']:.2f}", *compared])
    return [
        "Accuracy (acc) in percent, zero-shot, with its standard error:",
        "",
        *markdown(["zeros", "method", *tasks, "mean"], rows),
        "",
        *markdown(
            [
                "zeros",
                "method",
                "perplexity",
                "KL divergence from dense, nats",
                "same most probable token",
            ],
            texts,
        ),
    ]


def _with_error(metrics: dict[str, float]) -> str:
    error = f" ± {100 * metrics['acc_stderr']:.2f}" if "acc_stderr" in metrics else ""
    return f"{100 * metrics['acc']:.2f}{error}"


def _by_steps(experiment: Experiment, results: Results) -> list[str]:
    """Perplexity and time in the solver, by row and steps."""
    found = {(cell.row, cell.step, cell.pattern): result for cell, result in results}
    header = ["update", "steps"]
    header += [
        f"{pattern_name(p)}: {what}"
        for p in experiment.patterns
        for what in ("perplexity", "solver, s")
    ]
    rows = []
    for row, step in dict.fromkeys((row, step) for row, step, pattern in found if pattern):
        line = [row, "" if step is None else str(step)]
        for pattern in experiment.patterns:
            result = found[row, step, pattern]
            line += [f"{result['perplexity']:.2f}", f"{result['seconds']['solve']:.1f}"]
        rows.append(line)
    return [f"Dense: {found['dense', None, '']['perplexity']:.2f}", "", *markdown(header, rows)]


def _durations(results: Results) -> list[str]:
    """Seconds by phase."""
    phases = [one for one in PHASES if any(one in result["seconds"] for _, result in results)]
    rows = []
    for cell, result in results:
        seconds = [result["seconds"].get(phase, 0.0) for phase in phases]
        rows.append([cell.row, *(f"{value:.1f}" for value in (*seconds, sum(seconds)))])
    return [
        "Layers' medians times their number, so without compilation, reading and writing.",
        "",
        *markdown(["method", *(f"{HEADINGS[phase]}, s" for phase in phases), "sum, s"], rows),
    ]


def _errors(experiment: Experiment, results: Results) -> list[str]:
    """Relative errors in percent, rows by patterns: the mean over all linears, then layer by
    layer."""
    lines = []
    layers = sorted({cell.linear[0] for cell, _ in results})
    for layer in (None, *layers):
        rows = []
        for row in experiment.rows:
            line = [row]
            for pattern in experiment.patterns:
                values = [
                    result["error"]
                    for cell, result in results
                    if (cell.row, cell.pattern) == (row, pattern)
                    and layer in (None, cell.linear[0])
                ]
                line.append(f"{100 * statistics.mean(values):.3f}")
            rows.append(line)
        title = (
            f"mean error, %, layers {', '.join(map(str, layers))}"
            if layer is None
            else f"layer {layer}"
        )
        lines += [*markdown([title, *map(pattern_name, experiment.patterns)], rows), ""]
    return lines


def _percent(error: float) -> str:
    return f"{100 * error:.4f}" if error < 10 else "diverged"


def _convergence(experiment: Experiment, results: Results) -> list[str]:
    """Errors in percent by steps, for each linear; and the steps that each update needs for ADMM's
    error at ten."""
    shown = [step for step in experiment.steps if step in (1, 2, 5, 10, 20, 50, 100, 200)]
    lines, needed = [], []
    for linear in dict.fromkeys(cell.linear for cell, _ in results):
        found = {
            (cell.row, cell.step): result["error"]
            for cell, result in results
            if cell.linear == linear
        }
        rows = []
        for row in experiment.rows:
            if (row, None) in found:
                rows.append([row, *[_percent(found[row, None])] * len(shown)])
            else:
                rows.append([row, *(_percent(found[row, step]) for step in shown)])
        name = f"layer {linear[0]}, {linear[1]}"
        lines += [*markdown([f"error %, {name}", *map(str, shown)], rows), ""]
        goal = found["ADMM", REACHED]
        counts = [name]
        for row in (row for row, flags in experiment.rows.items() if "{k}" in flags):
            enough = [step for step in experiment.steps if found[row, step] <= goal * (1 + 1e-3)]
            counts.append(str(min(enough)) if enough else f"> {max(experiment.steps)}")
        needed.append(counts)
    header = [f"steps to within 0.1 % of ADMM's error at {REACHED}"]
    header += [row for row, flags in experiment.rows.items() if "{k}" in flags]
    return [*markdown(header, needed), "", *lines[:-1]]
