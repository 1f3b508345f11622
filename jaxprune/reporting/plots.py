"""A report's plots, as SVG that takes its colours from the page, so that they follow its light or
dark look."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from jaxprune.distill.schedule import all_zeros_there
from jaxprune.models.common.functional_modules import every_expert
from jaxprune.recipe import Recipe
from jaxprune.recipe_parts import effective_tuning
from jaxprune.reporting.report_rows import Checkpoint
from jaxprune.reporting.svg import (
    AXIS,
    DENSE,
    LEAST,
    MOST,
    SERIES,
    Figure,
    display_name,
    draw,
    format_number,
    logarithmic,
    series_style,
)
from jaxprune.solve.kernel import KernelResult
from jaxprune.solve.layer_result import LayerSummary
from jaxprune.solve.quantized_layers import ERROR

LEAST_SPAN = 5
"""Percent of zeros that an axis has room for at least."""
ValueOf = Callable[[Checkpoint], float | None]
"""What of a checkpoint is plotted; None where it was not measured."""


def error_by_layer(checkpoints: Sequence[Checkpoint], *, of_quantization: bool = False) -> Figure:
    """Returns a plot: of one run every linear's error, of several the mean over linear layers.

    Args:
        checkpoints: runs.
        of_quantization: what was lost on the way to the grid, instead of what pruning lost.
    """

    def error_of(kernel: KernelResult) -> float | None:
        return kernel.stats.get(ERROR) if of_quantization else kernel.error

    def plot(axis: Axes) -> None:
        if len(checkpoints) == 1:
            layers = _layers(checkpoints[0])
            for number, name in enumerate(_linears(checkpoints)):
                kernels = [layer.kernels.get(name) for layer in layers]
                errors = [error_of(kernel) if kernel else None for kernel in kernels]
                style = {"label": _short(name), **series_style(number)}
                axis.plot(_numbers(layers), _percents(errors), **style)
        else:
            for checkpoint in checkpoints:
                layers = _layers(checkpoint)
                means = [_mean(map(error_of, layer.kernels.values())) for layer in layers]
                style = {"label": _label(checkpoint), **_style_of(checkpoint)}
                axis.plot(_numbers(layers), _percents(means), **style)
        logarithmic(axis.yaxis)
        _label_layers(axis, "relative error of the output, %")

    title = "Relative error of the quantization" if of_quantization else "Relative error"
    return draw(f"{title} by layer", 3.6, plot)


def error_by_linear(checkpoints: Sequence[Checkpoint]) -> Figure:
    """Returns a plot of the mean over the layers, and the range from the least to the largest."""
    names = _linears(checkpoints)

    def plot(axis: Axes) -> None:
        for number, checkpoint in enumerate(checkpoints):
            shift = 0.7 * ((number + 0.5) / len(checkpoints) - 0.5)
            style, means, places = _style_of(checkpoint), [], []
            for place, name in enumerate(names):
                found = [
                    layer.kernels[name].error
                    for layer in _layers(checkpoint)
                    if name in layer.kernels
                ]
                if errors := _percents(error for error in found if math.isfinite(error)):
                    axis.hlines(
                        place + shift, min(errors), max(errors), color=style["color"], lw=1.2
                    )
                    means.append(sum(errors) / len(errors))
                    places.append(place + shift)
            axis.plot(means, places, **style, ls="", label=_label(checkpoint))
        axis.set_yticks(range(len(names)), [_short(name) for name in names])
        axis.invert_yaxis()
        logarithmic(axis.xaxis)
        axis.set_xlabel("relative error of the output, %: mean and range over the layers")

    return draw(
        "Relative error by linear", max(2.8, 1.2 + 0.16 * len(names) * len(checkpoints)), plot
    )


def sparsity_by_layer(checkpoints: Sequence[Checkpoint]) -> Figure:
    def plot(axis: Axes) -> None:
        every = []
        for checkpoint in checkpoints:
            for layer in _layers(checkpoint):
                shares = [100 * linear.zeros / linear.size for linear in layer.kernels.values()]
                every += shares
                if len(checkpoints) == 1:
                    axis.plot([layer.index + 1] * len(shares), shares, ".", color=DENSE, ms=3)
            means = [100 * layer.zeros / layer.size for layer in _layers(checkpoint)]
            axis.plot(
                _numbers(_layers(checkpoint)),
                means,
                label=_label(checkpoint),
                **_style_of(checkpoint),
            )
        axis.set_ylim(max(0, min(every) - 5), min(100, max(every) + 5))
        dots = " (dots: single linear layers)" if len(checkpoints) == 1 else ""
        _label_layers(axis, f"zeros, %{dots}")

    return draw("Sparsity by layer", 3.0, plot)


def divergence_by_tokens(checkpoints: Sequence[Checkpoint]) -> Figure:
    """Returns a plot of the divergence on held-out text against the number of tuned tokens;
    dotted where zeros are still to come."""

    def plot(axis: Axes) -> None:
        late = False
        for checkpoint in checkpoints:
            points = checkpoint.run.divergences if checkpoint.run else []
            recipe = checkpoint.run.effective if checkpoint.run else Recipe()
            tuning = effective_tuning(recipe.tuning, recipe.pattern)
            whole = [point for point in points if all_zeros_there(tuning, point[0])]
            before = points[: len(points) - len(whole) + 1] if whole != points else []
            late |= bool(before)
            for part, style in ((before, {"ls": ":"}), (whole, {"label": _label(checkpoint)})):
                x, y = ([_plain(point[place]) for point in part] for place in (0, 1))
                axis.plot(x, y, **style, **_style_of(checkpoint))
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        dotted = " (dotted: zeros are still to come)" if late else ""
        axis.set_xlabel(f"tokens tuned on{dotted}")
        axis.set_ylabel("nats a token (lower is better)")

    return draw("KL divergence on held-out text", 3.0, plot)


def time_by_phase(checkpoints: Sequence[Checkpoint]) -> Figure:
    phases = list(
        dict.fromkeys(
            phase for checkpoint in checkpoints for phase in checkpoint.seconds if phase != "total"
        )
    )

    def plot(axis: Axes) -> None:
        start = [0.0] * len(checkpoints)
        for number, phase in enumerate(phases):
            values = [_plain(checkpoint.seconds.get(phase, 0.0)) for checkpoint in checkpoints]
            axis.barh(
                range(len(checkpoints)),
                values,
                left=start,
                label=display_name(phase),
                color=SERIES[number % len(SERIES)],
            )
            start = [a + b for a, b in zip(start, values, strict=True)]
        for place, total in enumerate(start):
            axis.text(total, place, f"  {total:.0f} s", va="center", fontsize=8)
        _rows(axis, checkpoints)
        axis.set_xlim(0, 1.2 * max(*start, 1e-3))
        axis.set_xlabel("seconds")

    return draw("Time by phase", 1.6 + 0.35 * len(checkpoints), plot)


def quality_by_checkpoint(
    checkpoints: Sequence[Checkpoint], title: str, label: str, value_of: ValueOf, *, log: bool
) -> Figure:
    """Returns a plot of a point and its value for each checkpoint; None stands for infinity."""
    values = [value_of(checkpoint) for checkpoint in checkpoints]

    def plot(axis: Axes) -> None:
        known = [_plain(value) for value in values if value is not None]
        high = max([*known, 1e-9]) if known else 1.0
        low = max(min(known) / 1.25, 1e-9) if log and known else 0.0
        for place, (checkpoint, value) in enumerate(zip(checkpoints, values, strict=True)):
            style = _style_of(checkpoint) | {"marker": "o", "ms": 7}
            end = high if value is None else max(low, _plain(value))
            if value is not None:
                axis.plot([low, end], [place, place], color=style["color"], lw=1.2)
                axis.plot(end, place, **style)
            axis.text(end, place, f"   {format_number(value)}", va="center", fontsize=8)
        axis.set_xlim(low, high * (high / low) ** 0.25 if log and known else 1.2 * high)
        if log:
            logarithmic(axis.xaxis)
        _rows(axis, checkpoints)
        axis.set_xlabel(label)

    return draw(title, 1.3 + 0.3 * len(checkpoints), plot)


def accuracies(checkpoints: Sequence[Checkpoint]) -> Figure:
    """Returns a plot of the accuracy by task, with standard errors, and the mean."""
    tasks = list(
        dict.fromkeys(
            task
            for checkpoint in checkpoints
            for task, m in checkpoint.quality.tasks.items()
            if "acc" in m
        )
    )

    def plot(axis: Axes) -> None:
        for number, checkpoint in enumerate(checkpoints):
            shift = 0.7 * ((number + 0.5) / len(checkpoints) - 0.5)
            found = [checkpoint.quality.tasks.get(task, {}) for task in tasks] + [
                checkpoint.quality.mean_accuracy
            ]
            known = {
                place: metrics
                for place, metrics in enumerate(found)
                if metrics.get("acc") is not None
            }
            places = [place + shift for place in known]
            values = _percents(metrics["acc"] for metrics in known.values())
            errors = _percents(abs(metrics.get("acc_stderr") or 0.0) for metrics in known.values())
            axis.errorbar(
                values,
                places,
                xerr=errors,
                label=_label(checkpoint),
                **_style_of(checkpoint) | {"ls": ""},
            )
        axis.set_yticks(range(len(tasks) + 1), [*map(display_name, tasks), "mean"])
        axis.axhline(len(tasks) - 0.5, color=AXIS, lw=0.6)
        axis.invert_yaxis()
        axis.set_xlabel("accuracy (acc), %, with standard errors")

    return draw(
        "Zero-shot accuracy", 1.4 + (0.12 + 0.13 * len(checkpoints)) * (len(tasks) + 1), plot
    )


def quality_by_sparsity(
    checkpoints: Sequence[Checkpoint],
    title: str,
    label: str,
    value_of: ValueOf,
    *,
    log: bool = True,
) -> Figure | None:
    """Returns a line a method (a point of a checkpoint without one) over the sparsities; None where
    these are one."""
    pruned = [
        (checkpoint, value)
        for checkpoint in checkpoints
        if not checkpoint.dense and (value := value_of(checkpoint)) is not None
    ]
    if len({(round(e.sparsity, 3), e.grouped) for e, _ in pruned if e.sparsity is not None}) < 2:
        return None

    def plot(axis: Axes) -> None:
        for number, method in enumerate(
            dict.fromkeys(checkpoint.method or checkpoint.label for checkpoint, _ in pruned)
        ):
            own = [(e, value) for e, value in pruned if (e.method or e.label) == method]
            for grouped, name, style in (
                (False, display_name(method, 60), {}),
                (True, f"{display_name(method, 60)}, N:M", {"ls": "", "mfc": "none", "ms": 6}),
            ):
                points = sorted(
                    (100 * e.sparsity, _plain(value))
                    for e, value in own
                    if e.sparsity is not None and e.grouped == grouped
                )
                if points or not grouped:
                    x, y = [point[0] for point in points], [point[1] for point in points]
                    axis.plot(x, y, label=name, **series_style(number) | style)
        for checkpoint in checkpoints:
            if checkpoint.dense and (value := value_of(checkpoint)) is not None:
                axis.axhline(_plain(value), color=DENSE, ls="--", lw=1, label="dense")
        if log:
            logarithmic(axis.yaxis)
        low, high = axis.get_xlim()
        if high - low < LEAST_SPAN:
            axis.set_xlim((low + high - LEAST_SPAN) / 2, (low + high + LEAST_SPAN) / 2)
        axis.set_xlabel("zeros in the linear layers, %")
        axis.set_ylabel(label)

    return draw(title, 3.4, plot)


def quality_by_size(
    checkpoints: Sequence[Checkpoint], title: str, label: str, value_of: ValueOf
) -> Figure | None:
    """Returns a point a checkpoint by its size in 16 bits; None where all are as large, or nobody
    counted."""

    def megabytes(checkpoint: Checkpoint) -> float | None:
        size = checkpoint.bytes_in_16_bits
        return None if size is None else round(size / 1e6, 1)

    return quality_by(checkpoints, title, label, value_of, "weights in 16 bits, MB", megabytes)


def quality_by(
    checkpoints: Sequence[Checkpoint],
    title: str,
    label: str,
    value_of: ValueOf,
    cost_label: str,
    cost_of: ValueOf,
) -> Figure | None:
    """Returns a point a checkpoint by what it costs; None where all cost the same, or nobody
    counted."""
    points = [
        (checkpoint, cost, _plain(value))
        for checkpoint in checkpoints
        if (value := value_of(checkpoint)) is not None and (cost := cost_of(checkpoint))
    ]
    if len({cost for _, cost, _ in points}) < 2:
        return None

    def plot(axis: Axes) -> None:
        for checkpoint, cost, value in points:
            axis.plot(cost, value, label=_label(checkpoint), **(_style_of(checkpoint) | {"ls": ""}))
        logarithmic(axis.yaxis)
        axis.set_xlabel(cost_label)
        axis.set_ylabel(label)

    return draw(title, 3.4, plot)


def _label_layers(axis: Axes, label: str) -> None:
    """Gives the axes whole numbers of layers, and what is plotted by layer."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer")
    axis.set_ylabel(label)


def _rows(axis: Axes, checkpoints: Sequence[Checkpoint]) -> None:
    """Gives the axis one row a checkpoint, from the top."""
    axis.set_yticks(range(len(checkpoints)), [_label(checkpoint) for checkpoint in checkpoints])
    axis.set_ylim(len(checkpoints) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def _style_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns how a checkpoint looks, the same in all plots."""
    return {"color": DENSE, "marker": "o"} if checkpoint.dense else series_style(checkpoint.number)


def _label(checkpoint: Checkpoint) -> str:
    return display_name(checkpoint.label)


def _layers(checkpoint: Checkpoint) -> Sequence[LayerSummary]:
    return (
        [_with_experts_together(layer) for layer in checkpoint.run.layers] if checkpoint.run else []
    )


def _with_experts_together(layer: LayerSummary) -> LayerSummary:
    """Returns a layer with the linear layers of all experts that are called the same as one: mean
    errors."""
    grouped: dict[str, list[KernelResult]] = {}
    for path, kernel in layer.kernels.items():
        grouped.setdefault(every_expert(path), []).append(kernel)
    kernels = {path: _together(ones) for path, ones in grouped.items()}
    return dataclasses.replace(layer, kernels=kernels)


def _together(kernels: Sequence[KernelResult]) -> KernelResult:
    if len(kernels) == 1:
        return kernels[0]
    errors = [kernel.error for kernel in kernels if math.isfinite(kernel.error)]
    counts = (sum(getattr(one, name) for one in kernels) for name in ("zeros", "wanted", "size"))
    return KernelResult(sum(errors) / len(errors) if errors else math.nan, *counts)


def _numbers(layers: Sequence[LayerSummary]) -> list[int]:
    return [layer.index + 1 for layer in layers]


def _linears(checkpoints: Sequence[Checkpoint]) -> list[str]:
    return list(
        dict.fromkeys(
            name
            for checkpoint in checkpoints
            for layer in _layers(checkpoint)
            for name in layer.kernels
        )
    )


def _plain(value: float | None) -> float:
    """Returns a number that matplotlib can scale; NaN, which a plot leaves out, for None."""
    if value is None:
        return math.nan
    return 0.0 if abs(value) < LEAST else min(max(value, -MOST), MOST)


def _mean(values: Iterable[float | None]) -> float:
    known = [_plain(value) for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _percents(fractions: Iterable[float | None]) -> list[float]:
    return [100 * _plain(fraction) for fraction in fractions]


def _short(linear: str) -> str:
    return display_name(linear.rpartition(".")[2].removesuffix("_proj"))
