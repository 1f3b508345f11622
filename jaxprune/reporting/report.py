"""One self-contained page about runs and evaluations.

Everything in it comes from the jaxprune.json of each folder.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jinja2

from convert.destination import Destination, staged
from convert.ownership import EMPTY_CHECKSUM, add_checksum
from convert.schema import dump
from convert.writing import write_text
from jaxprune.evaluation.perplexity import short_name
from jaxprune.reporting import plots, svg
from jaxprune.reporting.documented_runs import compared
from jaxprune.reporting.model_card import megabytes
from jaxprune.reporting.record import Record, Run
from jaxprune.reporting.report_rows import Checkpoint, checkpoints_of


def page(records: Sequence[Record]) -> str:
    """Returns the report's HTML."""
    everything = checkpoints_of(records)
    texts = list(
        dict.fromkeys(text for checkpoint in everything for text in checkpoint.quality.texts)
    )
    return _template().render(
        title=_title(everything),
        checkpoints=everything,
        runs=[checkpoint for checkpoint in everything if checkpoint.run],
        texts=texts,
        tasks=list(
            dict.fromkeys(task for checkpoint in everything for task in checkpoint.quality.tasks)
        ),
        figures=_figures(everything, texts),
        samples=_samples(everything),
        settings=_settings(everything),
        verdicts=list(_verdicts(everything, texts)),
        number=svg.format_number,
        megabytes=megabytes,
        short=short_name,
        details=[
            (_source(record), json.dumps(_without_layers(dump(record)), indent=1))
            for record in records
        ],
        hardware=sorted({record.hardware for record in records if record.hardware}),
    )


def _settings(everything: Sequence[Checkpoint]) -> list[str]:
    """Returns the settings in which the speed of some checkpoint was measured."""
    return list(dict.fromkeys(setting for one in everything for setting in one.quality.speed))


def _generated(setting: str, checkpoint: Checkpoint) -> float | None:
    speed = checkpoint.quality.speed.get(setting)
    return speed.generated if speed else None


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("jaxprune.reporting", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")


def _figures(
    everything: Sequence[Checkpoint], texts: Sequence[str]
) -> list[tuple[str, list[svg.Figure]]]:
    """Returns headings and the plots below them."""
    sections: dict[str, Iterator[svg.Figure | None]] = {
        "Quality": _quality_plots(everything, texts),
        "Quality, size and speed": _trade_off_plots(everything, texts),
        "Pruning": _pruning_plots(everything),
    }
    drawn = {heading: [one for one in found if one] for heading, found in sections.items()}
    return [(heading, found) for heading, found in drawn.items() if found]


def _quality_plots(everything: Sequence[Checkpoint], texts: Sequence[str]) -> Iterator[svg.Figure]:
    by_checkpoint = plots.quality_by_checkpoint
    for text in texts:
        measured = [one for one in everything if one.text(text)]
        perplexity, divergence = _value_of(text, "perplexity"), _value_of(text, "kl")
        title = f"Perplexity of {text}"
        yield by_checkpoint(measured, title, "perplexity (lower is better)", perplexity, log=True)
        if compared := [one for one in measured if divergence(one) is not None]:
            title = f"KL divergence from the dense model, {text}"
            label = "nats a token (lower is better)"
            yield by_checkpoint(compared, title, label, divergence, log=False)
    if tested := [one for one in everything if one.accuracy is not None]:
        yield plots.accuracies(tested)


def _trade_off_plots(
    everything: Sequence[Checkpoint], texts: Sequence[str]
) -> Iterator[svg.Figure | None]:
    by_sparsity = partial(plots.quality_by_sparsity, everything)
    for text in texts:
        title, value_of = f"Perplexity of {text}", _value_of(text, "perplexity")
        yield by_sparsity(f"{title} by sparsity", "perplexity", value_of)
        yield plots.quality_by_size(everything, f"{title} by size", "perplexity", value_of)
        for setting in _settings(everything):
            yield plots.quality_by(
                everything,
                f"{title} by speed, {setting}",
                "perplexity",
                value_of,
                "generated tokens/s",
                partial(_generated, setting),
            )
        title = f"KL divergence on {text} by sparsity"
        yield by_sparsity(title, "nats a token", _value_of(text, "kl"))
    title, label = "Mean accuracy by sparsity", "mean accuracy (acc)"
    yield by_sparsity(title, label, lambda one: one.accuracy, log=False)


def _pruning_plots(everything: Sequence[Checkpoint]) -> Iterator[svg.Figure]:
    if not (runs := [one for one in everything if one.run and one.run.layers]):
        return
    yield plots.error_by_layer(runs)
    yield plots.error_by_linear(runs)
    yield plots.sparsity_by_layer(runs)
    yield plots.time_by_phase(runs)
    if quantized := [one for one in runs if one.run and one.run.recipe.quantize]:
        yield plots.error_by_layer(quantized, of_quantization=True)
    if tuned := [one for one in runs if one.run and one.run.divergences]:
        yield plots.divergence_by_tokens(tuned)


def _verdicts(everything: Sequence[Checkpoint], texts: Sequence[str]) -> Iterator[str]:
    """Yields a sentence on each checkpoint that was compared with the dense one."""
    for checkpoint in everything:
        for text in texts:
            found = checkpoint.text(text)
            if (
                found
                and found.ratio is not None
                and found.top1 is not None
                and not checkpoint.dense
            ):
                zeros = (
                    ""
                    if checkpoint.sparsity is None
                    else f", {100 * checkpoint.sparsity:.0f} % zeros"
                )
                yield (
                    f"{checkpoint.label}{zeros}: on {text} its perplexity is {found.ratio:.2f} "
                    f"times the dense model's, and at {100 * found.top1:.0f} % of the tokens both "
                    f"find the same next one the most probable. {compared(found.ratio)}"
                )


def _samples(
    everything: Sequence[Checkpoint],
) -> list[tuple[str, list[tuple[Checkpoint, str, str]]]]:
    """Returns prompts, each with the checkpoints that continued it: what is the same as the dense
    one's, if that is the first of them, and the rest."""
    found: dict[str, list[tuple[Checkpoint, Sequence[str]]]] = {}
    for checkpoint in everything:
        for sample in checkpoint.quality.samples:
            found.setdefault(sample.prompt, []).append((checkpoint, sample.tokens))
    rows = []
    for prompt, ones in found.items():
        first = ones[0][1]
        cuts = [_common(first, tokens) if ones[0][0].dense else len(tokens) for _, tokens in ones]
        sides = [
            (checkpoint, "".join(tokens[:cut]), "".join(tokens[cut:]))
            for (checkpoint, tokens), cut in zip(ones, cuts, strict=True)
        ]
        rows.append((prompt, sides))
    return rows


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns how many tokens are the same from the first on."""
    return sum(
        1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False))
    )


def _value_of(text: str, name: str) -> Callable[[Checkpoint], float | None]:
    return lambda checkpoint: getattr(checkpoint.text(text), name, None)


def _title(everything: Sequence[Checkpoint]) -> str:
    pruned = [checkpoint for checkpoint in everything if not checkpoint.dense]
    if len(pruned) == 1:
        (one,) = pruned
        return f"{one.label}: {one.method}, {one.pattern}" if one.method else one.label
    count, kind = (len(pruned), "pruned") if pruned else (len(everything), "dense")
    return f"{count} {kind} checkpoint{'s' * (count > 1)}"


def _source(record: Record) -> str:
    if isinstance(record, Run):
        return f"run that made {record.config.out}"
    return f"evaluation of {len(record.checkpoints)}"


def _without_layers(record: Any) -> Any:
    """Returns a record without the figures of single layers, which the plots show."""
    if isinstance(record, Mapping):
        return {key: _without_layers(value) for key, value in record.items() if key != "layers"}
    return record


def save(place: Destination, html: str) -> None:
    """Writes a page as a file of its own.

    Raises:
        CheckpointError: there is something that is not replaced, or it cannot be written.
    """
    first, rest = html.split("\n", 1)
    with staged(place) as path:
        write_text(path, f"{first}\n<!-- {EMPTY_CHECKSUM} -->\n{rest}")
        add_checksum(path)
