"""Pictures of experiments, made to be understood without the text."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from experiments import Experiment, pattern_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from jaxprune.distill.schedule import all_zeros_there
from jaxprune.recipe_parts import effective_tuning

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "figure.dpi": 130,
    "svg.hashsalt": "jaxprune",
}
COLORS = [
    "#888888",
    "#c08a00",
    "#7cb342",
    "#00796b",
    "#26418f",
    "#8e44ad",
    "#d1495b",
    "#e07a1f",
    "#111111",
    "#17a2c9",
]
MARKERS = "osD^vP*XhH"
PHASES = {
    "gram": "forward pass and Gram matrices",
    "solve": "solver",
    "forward": "second forward pass",
    "sensitivity": "sensitivity",
    "tune": "tuning",
}
PARTIAL = "quality_by_sparsity", "quality_by_minutes", "gains", "tuned_alike", "durations"
"""Pictures that can be made of some of an experiment's cells."""
Results = Sequence[tuple[Any, dict[str, Any]]]
"""Cells and what was measured of them."""


def seconds_of(result: dict[str, Any]) -> dict[str, float]:
    """The seconds of each phase; none where the cell went on from an earlier run, whose share is
    not known."""
    return {} if result.get("resumed") else result.get("seconds", {})


def draw(
    experiment: Experiment, ckpt: str, results: Results, setting: str, stem: Path
) -> list[Path]:
    """Draws an experiment's picture as PNG and SVG; returns their paths."""
    draw_it: Callable[[Experiment, Results], tuple[Figure, str]] = globals()[
        f"_{experiment.picture}"
    ]
    with plt.rc_context(STYLE):
        figure, title = draw_it(experiment, results)
        figure.suptitle(f"{title}: {ckpt}", fontsize=12, fontweight="bold")
        figure.text(
            0.5,
            0.005,
            setting.replace("; ", "\n"),
            ha="center",
            va="bottom",
            fontsize=7.5,
            color="#555555",
        )
        paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
        for path in paths:
            figure.savefig(
                path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None}
            )
        plt.close(figure)
    return paths


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, below: float = 0.45
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with room for the title above and the setting below, in inches."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(rect=(0, below / height, 1, 1 - (below + 0.05) / height))
    return figure, axes.ravel()


def _plain(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, at its major ticks alone."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _shades(rows: Sequence[str]) -> dict[str, Any]:
    """ADMM in red, Adam in greens, SGD in blues."""
    families = {"Adam": plt.cm.Greens, "SGD": plt.cm.Blues}
    colors: dict[str, Any] = {"ADMM": "#d1495b"}
    for family, shades in families.items():
        members = [row for row in rows if row.startswith(family)]
        for number, row in enumerate(members):
            colors[row] = shades(
                0.95 - 0.6 * number / max(1, len(members) - 1) if len(members) > 1 else 0.7
            )
    return colors


def _convergence(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    linears = list(dict.fromkeys(cell.linear for cell, _ in results))
    figure, axes = _figure(11, 8.4, -(-len(linears) // 2), 2)
    colors = _shades(list(experiment.rows))
    for axis, linear in zip(axes, linears, strict=True):
        found = {
            (cell.row, cell.step): 100 * r["error"] for cell, r in results if cell.linear == linear
        }
        lines = [value for (row, step), value in found.items() if row == "ADMM"]
        for row, flags in experiment.rows.items():
            if "{k}" in flags:
                values = [found[row, step] for step in experiment.steps]
                width = 2.6 if row == "ADMM" else 1.3
                axis.plot(
                    experiment.steps,
                    values,
                    color=colors[row],
                    lw=width,
                    marker=".",
                    label=row,
                    zorder=width,
                )
            else:
                style = (
                    {"ls": "--", "color": "black"}
                    if "SparseGPT" in row
                    else {"ls": ":", "color": "#999999"}
                )
                axis.axhline(found[row, None], lw=1.5, label=row, **style)
        low, high = (
            found["exact optimum, no ridge", None],
            max(found["SparseGPT's update", None], max(lines)),
        )
        axis.set_ylim(low - 0.05 * (high - low), low + 1.6 * (high - low))
        axis.set_xscale("log")
        _plain(axis.xaxis)
        axis.set_title(f"layer {linear[0]}, {linear[1]}", fontsize=10)
        axis.set_xlabel("update steps")
        axis.set_ylabel("relative error of the output, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8.5, frameon=False)
    return (
        figure,
        f"How fast updates converge under Wanda's {pattern_name(experiment.patterns[0])} mask",
    )


def _quality_by_time(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    figure, axes = _figure(11, 5.2, 1, len(experiment.patterns))
    colors = {
        "ADMM": "#d1495b",
        "Adam": "#2a9d4e",
        "SparseGPT's update": "black",
        "SparseGPT with its own mask": "#26418f",
    }
    for axis, pattern in zip(axes, experiment.patterns, strict=True):
        for row, flags in experiment.rows.items():
            cells = [(c.step, r) for c, r in results if (c.row, c.pattern) == (row, pattern)]
            x, y = [r["seconds"]["solve"] for _, r in cells], [r["perplexity"] for _, r in cells]
            if "{k}" not in flags:
                axis.plot(
                    x,
                    y,
                    "s" if "own" not in row else "*",
                    ms=9,
                    color=colors[row],
                    label=row,
                    ls="",
                )
                continue
            axis.plot(x, y, "o-", color=colors[row], label=f"{row} (steps beside the points)")
            for step, px, py in zip((step for step, _ in cells), x, y, strict=True):
                axis.annotate(
                    str(step),
                    (px, py),
                    textcoords="offset points",
                    xytext=(5, 6) if row == "Adam" else (-5, -13),
                    fontsize=8.5,
                    color=colors[row],
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        for which in (axis.xaxis, axis.yaxis):
            _plain(which)
        values = [r["perplexity"] for c, r in results if c.pattern == pattern]
        _few_ticks(axis, 0.9 * min(values), 1.12 * max(values))
        axis.set_title(f"{pattern_name(pattern)} sparsity", fontsize=10)
        axis.set_xlabel("time in the solver, all layers, seconds (log)")
        axis.set_ylabel("perplexity (log)")
    axes[0].legend(fontsize=8.5, frameon=False)
    return figure, "Perplexity by time spent on the update, Wanda's masks"


def _few_ticks(axis: Axes, low: float, high: float) -> None:
    """Round ticks on a logarithmic y axis, not too many."""
    if high / low < 4:
        ticks = [t for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]
    else:
        for multiples in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8), (1, 2, 5), (1,)):
            ticks = [
                m * 10.0**e for e in range(-3, 7) for m in multiples if low <= m * 10.0**e <= high
            ]
            if len(ticks) < 12:
                break
    axis.set_yticks(ticks)
    axis.set_ylim(low, high)


def _quality_by_sparsity(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    figure, axis = _rows_by_pattern(
        experiment, {(c.row, c.pattern): r["perplexity"] for c, r in results}
    )
    _dense_line(axis, results)
    _logarithmic(axis, "perplexity")
    return figure, experiment.title


def _quality_by_minutes(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    """A line a pattern, on it a point a row, at its median time: time hardly depends on the
    pattern. Below them, a line a pattern, the divergence on held-out text while the row of most
    tokens is tuned."""
    perplexities = {(c.row, c.pattern): r["perplexity"] for c, r in results}
    known = [
        (c.row, sum(seconds_of(r).values()) / 60) for c, r in results if c.pattern and seconds_of(r)
    ]
    medians = {row: statistics.median(m for other, m in known if other == row) for row, _ in known}
    minutes = dict(sorted(medians.items(), key=lambda item: item[1]))
    curves = {
        c.pattern: (c, r["divergences"]) for c, r in results if c.recipe and r.get("divergences")
    }
    figure, (axis, *others) = _figure(
        9.5, 6.4 + 3.6 * bool(curves), rows=1 + bool(curves), below=0.65
    )
    for number, pattern in enumerate(experiment.patterns):
        points = [
            (m, perplexities[row, pattern])
            for row, m in minutes.items()
            if (row, pattern) in perplexities
        ]
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        if points:
            axis.plot(*zip(*points, strict=True), label=pattern_name(pattern), lw=1.6, **style)
        for below in others:
            if pattern in curves:
                cell, points = curves[pattern]
                tuning = effective_tuning(cell.recipe.tuning, cell.recipe.pattern)
                whole = [point for point in points if all_zeros_there(tuning, point[0])]
                below.plot(*zip(*points, strict=True), lw=1.6, ls=":", **style)
                below.plot(*zip(*whole, strict=True), lw=1.6, **style)
    for below in others:
        below.set_xlabel("tokens tuned on (dotted: zeros are still to come)")
        below.xaxis.set_major_formatter(EngFormatter(sep=""))
        below.set_ylabel("KL divergence on held-out text, nats")
    _dense_line(axis, results)
    axis.set_xscale("log")
    _logarithmic(axis, "perplexity")
    labels = ["\n".join([f"{float(f'{m:.2g}'):g}", *row.split(", ")]) for row, m in minutes.items()]
    axis.set_xticks(list(minutes.values()), labels)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("minutes to prune (log), median over the patterns")
    return figure, experiment.title


def _gains(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    """A line a row, on it a point a pattern: the perplexity over that of the best of the rows
    compared with."""
    ratios = experiment.over_best({(c.row, c.pattern): r["perplexity"] for c, r in results})
    rows = [row for row in experiment.rows if any((row, p) in ratios for p in experiment.patterns)]
    figure, (axis,) = _figure(9.5, 1.6 + 0.3 * len(rows))
    for number, pattern in enumerate(experiment.patterns):
        points = [
            (ratios[row, pattern], place)
            for place, row in enumerate(rows)
            if (row, pattern) in ratios
        ]
        if points:
            style = {"color": COLORS[2 * number], "marker": MARKERS[number]}
            axis.plot(*zip(*points, strict=True), ls="", label=pattern_name(pattern), **style)
    axis.axvline(1, color="#999999", ls=":", lw=1.5, zorder=0)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xticks(
        [
            tick
            for tick in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2)
            if low <= tick <= high
        ]
    )
    _plain(axis.xaxis)
    axis.set_xlabel(
        f"perplexity over that of the better of {' and '.join(experiment.against)} (log; lower is "
        "better)"
    )
    axis.legend(
        fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="zeros"
    )
    return figure, experiment.title


def _errors_by_sparsity(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    means = {}
    for row in experiment.rows:
        for pattern in experiment.patterns:
            values = [r["error"] for c, r in results if (c.row, c.pattern) == (row, pattern)]
            means[row, pattern] = statistics.mean(values)
    unit = list(experiment.rows)[-1]
    ratios = {
        (row, pattern): value / means[unit, pattern] for (row, pattern), value in means.items()
    }
    figure, axis = _rows_by_pattern(experiment, ratios)
    _logarithmic(axis, f"mean error over that of {unit}")
    return figure, "Error of layers on the same inputs"


def _dense_line(axis: Axes, results: Results) -> None:
    # one, once it is measured
    for dense in (r["perplexity"] for c, r in results if c.row == "dense"):
        axis.axhline(dense, color="#999999", ls=":", lw=1.5, label=f"dense, {dense:.1f}")


def _logarithmic(axis: Axes, label: str) -> None:
    """A logarithmic y axis, and the legend beside it."""
    axis.set_yscale("log")
    _plain(axis.yaxis)
    low, high = axis.get_ylim()
    _few_ticks(axis, low, high)
    axis.set_ylabel(f"{label} (log; lower is better)")
    axis.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _rows_by_pattern(
    experiment: Experiment, values: dict[tuple[str, str], float]
) -> tuple[Figure, Axes]:
    """Lines over the sparsities, and points at N:M patterns in a column of their own."""
    figure, (axis,) = _figure(9.5, 5.6, below=0.65 if experiment.measure == "accuracy" else 0.45)
    plain = [p for p in experiment.patterns if ":" not in p]
    grouped = [p for p in experiment.patterns if ":" in p]
    places = {p: float(number) for number, p in enumerate(plain)}
    places |= {p: len(plain) + 0.3 + number for number, p in enumerate(grouped)}
    for number, row in enumerate(experiment.rows):
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        if not any((row, p) in values for p in experiment.patterns):
            continue
        there = [p for p in plain if (row, p) in values]
        axis.plot(
            [places[p] for p in there], [values[row, p] for p in there], label=row, lw=1.6, **style
        )
        shift = 0.05 * (number - (len(experiment.rows) - 1) / 2)
        there = [p for p in grouped if (row, p) in values]
        axis.plot(
            [places[p] + shift for p in there], [values[row, p] for p in there], ls="", **style
        )
    axis.set_xticks(list(places.values()), [pattern_name(p) for p in places])
    if plain and grouped:
        axis.axvline(len(plain) - 0.35, color="#cccccc", lw=1)
    axis.set_xlabel("zeros in the linears")
    return figure, axis


def _crossed(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    figure, (axis,) = _figure(8.5, 4.8)
    found = {c.row: r["perplexity"] for c, r in results if c.row != "dense"}
    split = {row: [part.rsplit(" ", 1)[0] for part in row.split(", ")] for row in found}
    updates = list(dict.fromkeys(update for _, update in split.values()))
    chosen = list(dict.fromkeys(mask for mask, _ in split.values()))
    for row, value in found.items():
        mask, update = split[row]
        x = chosen.index(mask) + 0.38 * (updates.index(update) - (len(updates) - 1) / 2)
        color = {"SparseGPT": "#26418f", "ADMM": "#d1495b"}[update]
        first = mask == chosen[0]
        axis.bar(x, value, 0.34, color=color, label=f"{update} update" if first else None)
        axis.annotate(f"{value:.1f}", (x, value), ha="center", va="bottom", fontsize=10)
    axis.set_xticks(range(len(chosen)), [f"{mask} mask" for mask in chosen])
    axis.set_ylabel("perplexity (lower is better)")
    axis.grid(axis="x", visible=False)
    axis.set_ylim(0, 1.18 * max(found.values()))
    axis.legend(frameon=False, fontsize=9, ncols=2)
    return figure, f"Masks crossed with weight updates, {pattern_name(experiment.patterns[0])}"


def _accuracies(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    """Accuracies by task with standard errors; one panel a pattern."""
    tasks = [*results[0][1]["quality"]["tasks"], "mean"]
    patterns = list(dict.fromkeys(cell.pattern for cell, _ in results if cell.pattern))
    figure, axes = _figure(max(9.5, 4.2 * len(patterns)), 5.6, 1, len(patterns), below=0.62)
    colors = {
        "dense": "#888888",
        "Wanda": "#c08a00",
        "SparseGPT": "#26418f",
        "ADMM-Grad": "#d1495b",
    }
    for axis, pattern in zip(axes, patterns, strict=True):
        shown = [(cell.row, result) for cell, result in results if cell.pattern in ("", pattern)]
        for number, (row, result) in enumerate(shown):
            found = [
                result["quality"]["tasks"].get(task, result["quality"]["mean_accuracy"])
                for task in tasks
            ]
            places = [place + 0.18 * (number - (len(shown) - 1) / 2) for place in range(len(tasks))]
            values = [100 * metrics["acc"] for metrics in found]
            errors = [100 * metrics.get("acc_stderr", 0.0) for metrics in found]
            axis.errorbar(
                values,
                places,
                xerr=errors,
                fmt=MARKERS[number],
                color=colors.get(row, COLORS[number]),
                label=row,
                lw=1.3,
            )
        axis.set_yticks(range(len(tasks)), tasks)
        axis.axhline(len(tasks) - 1.5, color="#cccccc", lw=1)
        axis.invert_yaxis()
        axis.set_title(f"{pattern_name(pattern)} zeros", fontsize=10)
        axis.set_xlabel("accuracy, %, with standard errors")
    axes[-1].legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure, "Zero-shot accuracy"


def _tuned_alike(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    """A panel a pattern, in it a line a method, over what is added to it."""
    patterns = [p for p in experiment.patterns if any(c.pattern == p for c, _ in results)]
    figure, axes = _figure(13, 4 + 3.6 * (len(patterns) > 3), 1 + (len(patterns) > 3), 3)
    methods = [row for row in experiment.rows if "," not in row and row not in ("fast", "best")]
    added = ("", ", tuned 66k", ", importance", ", importance, tuned 66k")
    added += (", importance, tuned 250k",)
    labels = [name.removeprefix(", ").replace(", ", "\n") or "as\npublished" for name in added]
    for axis in axes[len(patterns) :]:
        axis.set_visible(False)
    for axis, pattern in zip(axes, patterns, strict=False):
        found = {
            row: statistics.mean(
                r["perplexity"] for c, r in results if (c.row, c.pattern) == (row, pattern)
            )
            for row in {c.row for c, _ in results if c.pattern == pattern}
        }
        for number, method in enumerate(methods):
            points = [(x, found[method + n]) for x, n in enumerate(added) if method + n in found]
            if points:
                style = {"color": COLORS[number], "marker": MARKERS[number]}
                axis.plot(*zip(*points, strict=True), label=method, lw=1.6, **style)
        places = {"fast": 3, "best": 3, "thorough, 250k": 4}
        for (preset, place), marker in zip(places.items(), "<>*", strict=True):
            if preset in found:
                axis.plot(place, found[preset], marker, ms=9, color=COLORS[6], label=preset)
        _dense_line(axis, results)
        axis.set_yscale("log")
        _plain(axis.yaxis)
        _few_ticks(axis, *axis.get_ylim())
        axis.set_xticks(range(len(added)), labels, fontsize=7.5)
        axis.set_title(f"{pattern_name(pattern)} zeros", fontsize=10)
    axes[0].set_ylabel("perplexity (log; lower is better)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=8.5, frameon=False)
    return figure, "Methods as published, with importance, and tuned alike"


def _durations(experiment: Experiment, results: Results) -> tuple[Figure, str]:
    figure, (axis,) = _figure(9, 3.8)
    names = [c.row for c, _ in results][::-1]
    start = [0.0] * len(names)
    colors = ("#b8c4d6", "#d1495b", "#dde3ec", "#7cb342", "#26418f")
    for (phase, label), color in zip(PHASES.items(), colors, strict=True):
        values = [r["seconds"].get(phase, 0.0) for _, r in results][::-1]
        if not any(values):
            continue
        axis.barh(names, values, left=start, color=color, label=label)
        start = [s + v for s, v in zip(start, values, strict=True)]
    for name, total, (_, result) in zip(names, start, list(results)[::-1], strict=True):
        axis.text(
            total,
            name,
            f"  {total:.0f} s, solver {result['seconds']['solve']:.0f} s",
            va="center",
            fontsize=9,
        )
    axis.set_xlim(0, 1.25 * max(start))
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("seconds, all layers")
    axis.legend(frameon=False, fontsize=8.5, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
    return figure, f"Time to prune to {pattern_name(experiment.patterns[0])}"
