"""Measures checkpoints, and writes records and reports of the measurements."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convert import disk_bytes, ownership, parameters
from convert.destination import Destination, destination, staged
from convert.hub import resolve
from convert.paths import inputs_of, require_apart
from convert.schema import check, plain
from jaxprune.api.load import load
from jaxprune.errors import InputError
from jaxprune.evaluation.quality import Evaluator, Measures, Quality, table
from jaxprune.evaluation.verification import zeros
from jaxprune.planning.estimate import need_of_evaluation
from jaxprune.reporting import record as records
from jaxprune.reporting.recording_observer import environment, write_record
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Measurements of checkpoints.

    Attributes:
        qualities: checkpoint -> its measurements.
        sparsity: checkpoint -> fraction of zeros in its kernels.
    """

    qualities: Mapping[str, Quality]
    sparsity: Mapping[str, float]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Returns the header and rows of a table with a column for each checkpoint."""
        header, rows = table(
            {_file_name(name): quality for name, quality in self.qualities.items()}
        )
        zeros = [f"{100 * sparsity:.4f} %" for sparsity in self.sparsity.values()]
        return header, [["zeros of the linear layers", *zeros], *rows]

    def table(self) -> str:
        """Returns this table as text."""
        header, rows = self.rows()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        )


def evaluate(
    *checkpoints: str | Path | StreamedModel,
    against: str | Path | StreamedModel | None = None,
    measures: Measures,
    out: str | Path | Destination | None = None,
    config: Mapping[str, Any] | None = None,
    observer: Observer = SILENT,
) -> Evaluation:
    """Measures dense or pruned checkpoints: perplexity, KL divergence, and accuracy on tasks.

    Args:
        checkpoints: models, or names as for `load`.
        against: the dense model to compare with; None: no comparison.
        measures: what to measure.
        out: a folder to create with a record and a report, which is updated after each checkpoint;
            None: no folder.
        config: the options of the call, for the record.
        observer: is notified of progress.

    Raises:
        InputError, CheckpointError: an argument, checkpoint or folder cannot be used.
    """
    opened = _by_name([*([] if against is None else [against]), *checkpoints])
    measures.load()  # fails before a model is downloaded
    place = None
    if out is not None:
        sources = [model.source if model else resolve(name) for name, model in opened.items()]
        place = _place(out, [path for source in sources for path in inputs_of(source)])
    models = {name: model or load(name) for name, model in opened.items()}
    runs = {name: records.run_of(model.source) for name, model in models.items()}
    first = None if against is None else _name_of(against)
    some = next(iter(models.values()))
    evaluator = Evaluator(measures, some, observer)
    if texts_of := [tokens.shape for tokens in evaluator.windows.values()]:
        observer.planned(
            need_of_evaluation(some.reader.spec, some.architecture, texts_of, len(models))
        )
    sparsity = {name: _sparsity(zeros(model).values()) for name, model in models.items()}
    asked = check(records.Config, plain(config or {}), file="", entry="config", error=InputError)
    found: dict[str, records.Measured] = {}
    qualities, fault = {}, None
    for name, quality in evaluator.measure(models, first):
        qualities[name] = quality
        found[name] = records.Measured(
            sparsity=sparsity[name],
            disk_bytes=disk_bytes(models[name].reader),
            parameters=parameters(models[name].reader.spec),
            run=runs[name],
            quality=quality,
        )
        if place:  # this result is saved even if a later measurement fails
            with staged(place) as folder:
                named = {_file_name(one): quality for one, quality in qualities.items()}
                record = records.Evaluation(
                    config=asked, against=first, checkpoints=found, **environment()
                )
                files, fault = write_record(folder, record, named)
                ownership.mark(folder, "evaluation", files)
    result = Evaluation(qualities, sparsity)
    observer.finished(result)
    if fault:
        raise fault
    return result


def _name_of(checkpoint: str | Path | StreamedModel) -> str:
    return checkpoint.name if isinstance(checkpoint, StreamedModel) else str(checkpoint)


def _by_name(
    checkpoints: Iterable[str | Path | StreamedModel],
) -> dict[str, StreamedModel | None]:
    """Returns name -> model; None for a checkpoint to load.

    Raises:
        InputError: two models or checkpoints have the same name.
    """
    opened: dict[str, StreamedModel | None] = {}
    for one in checkpoints:
        name, model = _name_of(one), one if isinstance(one, StreamedModel) else None
        if model and (opened.get(name) or model) is not model:
            raise InputError(f"two models of the same name cannot be distinguished: {name}")
        opened[name] = model or opened.get(name)
    if len(short := {_file_name(name) for name in opened}) < len(opened):
        raise InputError(
            f"checkpoints of the same name cannot be distinguished: {', '.join(sorted(short))}"
        )
    return opened


def _place(out: str | Path | Destination, inputs: Iterable[Path]) -> Destination:
    """Returns where the record is written; raises if files there would be lost."""
    place = destination(out, "out")
    place = dataclasses.replace(place, inputs=(*place.inputs, *inputs))
    require_apart({"a checkpoint": place.inputs}, {"out": place.path}, error=InputError)
    place.check()
    if records.run_of(place.path):
        raise place.occupied("it is a run's folder, whose record would be replaced")
    return place


def _sparsity(counts: Iterable[tuple[int, int]]) -> float:
    zeros, sizes = zip(*counts, strict=True)
    return sum(zeros) / sum(sizes)


def _file_name(name: str) -> str:
    return Path(name).absolute().name
