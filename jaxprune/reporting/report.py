"""One self-contained page about runs and evaluations.

Everything in it comes from the jaxprune.json of each folder.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from convert.hub import DESCRIPTIONS
from convert.ownership import UNSEALED, Destination, seal, staged, write_text
from jaxprune.evaluation.tasks import mean_accuracy
from jaxprune.reporting import figures, schema
from jaxprune.reporting.schema import MeanAccuracy, Quality, Record, Run, TextQuality

REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint of a report.

    Attributes:
        name: of the checkpoint, unique in the report.
        label: a short name.
        dense: whether it is the one that others were made from or are compared with.
        method, pattern: how it was pruned, in words; "" where that is not known.
        sparsity: zeros of the linears over their weights; None where nobody counted.
        quality: what was measured.
        run: the record of the run that made it, or None.
        number: of the checkpoint among those that are not dense; decides its colour.
    """

    name: str
    label: str
    dense: bool
    method: str
    pattern: str
    sparsity: float | None
    quality: Quality
    run: Run | None
    number: int = 0

    def text(self, name: str) -> TextQuality | None:
        """What was measured on a text; None where it was not."""
        return self.quality.texts.get(name)

    @property
    def key(self) -> str:
        """What says that two records speak of one checkpoint: how it was made, or its name."""
        if not self.run:
            return self.name
        made = {"method", "pattern", "preset", "asymmetry", "importance", "tuning", "calibration"}
        return json.dumps([self.label, self.run.config.ckpt, self.run.model_dump(include=made)], sort_keys=True)

    @property
    def accuracy(self) -> float | None:
        """The mean over the tasks, as a fraction."""
        return self.quality.mean_accuracy.acc

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of the run, by phase."""
        return {phase: value for phase, value in (self.run.seconds if self.run else {}).items() if value is not None}

    @property
    def grouped(self) -> bool:
        """Whether its pattern is N:M."""
        return self.run is not None and isinstance(self.run.pattern, schema.NM)


def entries(records: Sequence[Record]) -> list[Entry]:
    """The checkpoints of records, dense ones first; a checkpoint in several records is one entry."""
    found: dict[str, Entry] = {}
    for record in records:
        for entry in _entries(record):
            before = found.get(entry.key)
            if before is None:
                found[entry.key] = entry
            else:
                tasks = {**before.quality.tasks, **entry.quality.tasks}
                quality = Quality(
                    texts={**before.quality.texts, **entry.quality.texts},
                    tasks=tasks,
                    mean_accuracy=MeanAccuracy(**mean_accuracy(_finite(tasks))),
                )
                main = before if before.run or not entry.run else entry
                found[entry.key] = dataclasses.replace(main, quality=quality, dense=before.dense or entry.dense)
    ordered = sorted(found.values(), key=lambda entry: not entry.dense)
    labels = [entry.label for entry in ordered]
    first = sum(entry.dense for entry in ordered)
    return [
        dataclasses.replace(
            entry,
            label=entry.label if labels.count(entry.label) == 1 else _shortened(entry.name),
            number=max(0, place - first),
        )
        for place, entry in enumerate(ordered)
    ]


def page(records: Sequence[Record]) -> str:
    """The report's HTML."""
    everything = entries(records)
    texts = list(dict.fromkeys(text for entry in everything for text in entry.quality.texts))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxprune.reporting", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=_title(everything),
        entries=everything,
        runs=[entry for entry in everything if entry.run],
        texts=texts,
        tasks=list(dict.fromkeys(task for entry in everything for task in entry.quality.tasks)),
        figures=_figures(everything, texts),
        number=figures.number,
        short=figures.short,
        details=[
            (_source(record), json.dumps(_without_layers(schema.as_json(record)), indent=1)) for record in records
        ],
        hardware=sorted({record.hardware for record in records if record.hardware}),
    )


def _figures(everything: Sequence[Entry], texts: Sequence[str]) -> list[tuple[str, list[figures.Figure]]]:
    """Headings and the plots below them."""
    quality: list[figures.Figure] = []
    trade: list[figures.Figure | None] = []

    def by_sparsity(title: str, label: str, value_of: Callable[[Entry], float | None], log: bool = True) -> None:
        trade.append(figures.quality_by_sparsity(everything, f"{title} by sparsity", label, value_of, log=log))

    for text in texts:
        measured = [entry for entry in everything if entry.text(text)]
        quality.append(figures.perplexities(measured, text))
        by_sparsity(f"Perplexity of {figures.short(text)}", "perplexity", _value_of(text, "perplexity"))
        if compared := [entry for entry in measured if _value_of(text, "kl")(entry) is not None]:
            quality.append(figures.divergences(compared, text))
            by_sparsity(f"KL divergence on {figures.short(text)}", "nats a token", _value_of(text, "kl"))
    if tested := [entry for entry in everything if entry.accuracy is not None]:
        quality.append(figures.accuracies(tested))
        by_sparsity("Mean accuracy", "mean accuracy (acc)", lambda entry: entry.accuracy, log=False)
    runs = [entry for entry in everything if entry.run and entry.run.layers]
    pruning = []
    if runs:
        plots = figures.error_by_layer, figures.error_by_linear, figures.sparsity_by_layer, figures.time_by_phase
        pruning = [plot(runs) for plot in plots]
    sections: dict[str, Sequence[figures.Figure | None]]
    sections = {"Quality": quality, "Sparsity against quality": trade, "Pruning": pruning}
    kept = {heading: [plot for plot in plots if plot] for heading, plots in sections.items()}
    return [(heading, plots) for heading, plots in kept.items() if plots]


def _value_of(text: str, name: str) -> Callable[[Entry], float | None]:
    return lambda entry: getattr(entry.text(text), name, None)


def _entries(record: Record) -> list[Entry]:
    if isinstance(record, Run):
        measured = record.evaluation
        dense = [_bare(record.config.ckpt, True, 0.0, measured["dense"])] if "dense" in measured else []
        return [*dense, _pruned(record.config.out or "", record, measured.get("pruned", Quality()))]
    found = []
    for name, one in record.checkpoints.items():
        is_dense = name == record.against or (not one.run and one.sparsity < 0.01)
        if one.run and not is_dense:
            found.append(_pruned(name, one.run, one.quality))
        else:
            found.append(_bare(name, is_dense, one.sparsity, one.quality))
    return found


def _bare(name: str, dense: bool, sparsity: float, quality: Quality) -> Entry:
    """A checkpoint of whose making nothing is known."""
    pattern = "" if dense else f"{100 * sparsity:.1f} %"
    label = Path(name).name + (" (dense)" if dense else "")
    return Entry(name, label, dense, DESCRIPTIONS.get(name, ""), pattern, sparsity, quality, None)


def _pruned(name: str, run: Run, quality: Quality) -> Entry:
    return Entry(name, Path(name).name, False, run.how, run.target, run.sparsity, quality, run)


def _title(everything: Sequence[Entry]) -> str:
    pruned = [entry for entry in everything if not entry.dense]
    if len(pruned) == 1:
        (one,) = pruned
        return f"{one.label}: {one.method}, {one.pattern}" if one.method else one.label
    return f"{len(everything)} checkpoints"


def _finite(tasks: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    return {
        task: {name: value for name, value in metrics.items() if value is not None} for task, metrics in tasks.items()
    }


def _shortened(name: str) -> str:
    return "/".join(Path(name).parts[-2:])


def _source(record: Record) -> str:
    if isinstance(record, Run):
        return f"run that made {record.config.out}"
    return f"evaluation of {len(record.checkpoints)}"


def _without_layers(record: Any) -> Any:
    """A record without the figures of single layers, which the plots show."""
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
