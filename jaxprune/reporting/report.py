"""One self-contained page about runs and evaluations.

Everything in it comes from the jaxprune.json of each folder.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2

from convert.destination import Destination, staged
from convert.ownership import UNSEALED, seal
from convert.schema import dump
from convert.writing import write_text
from jaxprune.evaluation.text import short_name
from jaxprune.reporting import drawing, figures
from jaxprune.reporting.card import megabytes
from jaxprune.reporting.entries import Entry, entries
from jaxprune.reporting.published import compared
from jaxprune.reporting.schema import Record, Run


def page(records: Sequence[Record]) -> str:
    """Returns the report's HTML."""
    everything = entries(records)
    texts = list(dict.fromkeys(text for entry in everything for text in entry.quality.texts))
    return _template().render(
        title=_title(everything),
        entries=everything,
        runs=[entry for entry in everything if entry.run],
        texts=texts,
        tasks=list(dict.fromkeys(task for entry in everything for task in entry.quality.tasks)),
        figures=_figures(everything, texts),
        samples=_samples(everything),
        verdicts=list(_verdicts(everything, texts)),
        number=drawing.format_number,
        megabytes=megabytes,
        short=short_name,
        details=[
            (_source(record), json.dumps(_without_layers(dump(record)), indent=1))
            for record in records
        ],
        hardware=sorted({record.hardware for record in records if record.hardware}),
    )


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("jaxprune.reporting", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")


def _figures(
    everything: Sequence[Entry], texts: Sequence[str]
) -> list[tuple[str, list[drawing.Figure]]]:
    """Returns headings and the plots below them."""
    quality: list[drawing.Figure] = []
    trade: list[drawing.Figure | None] = []

    def by_sparsity(
        title: str, label: str, value_of: Callable[[Entry], float | None], log: bool = True
    ) -> None:
        trade.append(
            figures.quality_by_sparsity(
                everything, f"{title} by sparsity", label, value_of, log=log
            )
        )

    for text in texts:
        measured = [entry for entry in everything if entry.text(text)]
        quality.append(figures.perplexities(measured, text))
        value_of = _value_of(text, "perplexity")
        by_sparsity(f"Perplexity of {text}", "perplexity", value_of)
        trade.append(
            figures.quality_by_size(
                measured, f"Perplexity of {text} by size", "perplexity", value_of
            )
        )
        if compared := [entry for entry in measured if _value_of(text, "kl")(entry) is not None]:
            quality.append(figures.divergences(compared, text))
            by_sparsity(f"KL divergence on {text}", "nats a token", _value_of(text, "kl"))
    if tested := [entry for entry in everything if entry.accuracy is not None]:
        quality.append(figures.accuracies(tested))
        by_sparsity("Mean accuracy", "mean accuracy (acc)", lambda entry: entry.accuracy, log=False)
    runs = [entry for entry in everything if entry.run and entry.run.layers]
    pruning = []
    if runs:
        plots = (
            figures.error_by_layer,
            figures.error_by_linear,
            figures.sparsity_by_layer,
            figures.time_by_phase,
        )
        pruning = [plot(runs) for plot in plots]
    if quantized := [entry for entry in runs if entry.run and entry.run.recipe.quantize]:
        pruning.append(figures.error_by_layer(quantized, of_quantization=True))
    if tuned := [entry for entry in runs if entry.run and entry.run.divergences]:
        pruning.append(figures.divergence_by_tokens(tuned))
    sections: dict[str, Sequence[drawing.Figure | None]]
    sections = {"Quality": quality, "Sparsity against quality": trade, "Pruning": pruning}
    kept = {heading: [plot for plot in plots if plot] for heading, plots in sections.items()}
    return [(heading, plots) for heading, plots in kept.items() if plots]


def _verdicts(everything: Sequence[Entry], texts: Sequence[str]) -> Iterator[str]:
    """Yields a sentence on each checkpoint that was compared with the dense one."""
    for entry in everything:
        for text in texts:
            found = entry.text(text)
            if found and found.ratio is not None and found.top1 is not None and not entry.dense:
                zeros = "" if entry.sparsity is None else f", {100 * entry.sparsity:.0f} % zeros"
                times, same = (
                    f"{found.ratio:.2f} times the dense model's",
                    f"{100 * found.top1:.0f} % of the tokens",
                )
                yield (
                    f"{entry.label}{zeros}: on {text} its perplexity is {times}, and "
                    f"at {same} both "
                    f"find the same next one the most probable. {compared(found.ratio)}"
                )


def _samples(everything: Sequence[Entry]) -> list[tuple[str, list[tuple[Entry, str, str]]]]:
    """Returns prompts, each with the checkpoints that continued it: what is the same as the dense
    one's, if that is the first of them, and the rest."""
    found: dict[str, list[tuple[Entry, Sequence[str]]]] = {}
    for entry in everything:
        for sample in entry.quality.samples:
            found.setdefault(sample.prompt, []).append((entry, sample.pieces))
    rows = []
    for prompt, ones in found.items():
        first = ones[0][1]
        cuts = [_common(first, pieces) if ones[0][0].dense else len(pieces) for _, pieces in ones]
        sides = [
            (entry, "".join(pieces[:cut]), "".join(pieces[cut:]))
            for (entry, pieces), cut in zip(ones, cuts, strict=True)
        ]
        rows.append((prompt, sides))
    return rows


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns how many pieces are the same from the first on."""
    return sum(
        1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False))
    )


def _value_of(text: str, name: str) -> Callable[[Entry], float | None]:
    return lambda entry: getattr(entry.text(text), name, None)


def _title(everything: Sequence[Entry]) -> str:
    pruned = [entry for entry in everything if not entry.dense]
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
        write_text(path, f"{first}\n<!-- {UNSEALED} -->\n{rest}")
        seal(path)
