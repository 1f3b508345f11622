"""The checkpoints of a report, from the records that speak of them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from convert.hub import DESCRIPTIONS
from jaxprune.errors import InputError
from jaxprune.evaluation.perplexity import TextQuality, short_name
from jaxprune.evaluation.quality import Quality
from jaxprune.reporting.model_card import sizes_text
from jaxprune.reporting.record import Record, Run
from jaxprune.sparsity.masks import LEAST_ZEROS
from jaxprune.sparsity.patterns import NM

SAME = 0.01
"""The most by which two perplexities of a checkpoint on the same windows differ, relatively: what
dtypes and hardware change."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a report.

    Attributes:
        name: the name of the checkpoint, unique in the report.
        label: a short name.
        dense: whether it is the one that others were made from or are compared with.
        method, pattern: how it was pruned, in words; "" where that is not known.
        sparsity: zeros of the linear layers over their weights; None where nobody counted.
        quality: what was measured; texts have the names that `_with_labels` gives them.
        run: the record of the run that made it, or None.
        disk_bytes: of its files; None where nobody looked.
        parameters: numbers in it; None where nobody counted.
        number: the number of the checkpoint among those that are not dense; decides its colour.
    """

    name: str
    label: str
    dense: bool
    method: str
    pattern: str
    sparsity: float | None
    quality: Quality
    run: Run | None
    disk_bytes: int | None = None
    parameters: int | None = None
    number: int = 0

    def text(self, name: str) -> TextQuality | None:
        """Returns what was measured on a text; None where it was not."""
        return self.quality.texts.get(name)

    @property
    def key(self) -> str:
        """What says that two records speak of one checkpoint: how it was made, or its name."""
        if not self.run:
            return self.name
        made = self.run.recipe, self.run.calibration, self.run.save_dtype
        return repr((self.label, self.run.config.ckpt, *made))

    @property
    def accuracy(self) -> float | None:
        """The mean over the tasks, as a fraction."""
        return self.quality.mean_accuracy.get("acc")

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of the run, by phase."""
        return {
            phase: value
            for phase, value in (self.run.seconds if self.run else {}).items()
            if value is not None
        }

    @property
    def bytes_in_16_bits(self) -> int | None:
        """What its params take in 16 bits each, so that checkpoints of several dtypes can be
        compared."""
        return None if self.parameters is None else 2 * self.parameters

    @property
    def sizes(self) -> str:
        """What it takes in other formats, in words; "" where nobody counted."""
        return sizes_text(self.run) if self.run else ""

    @property
    def grouped(self) -> bool:
        """Whether its pattern is N:M."""
        return self.run is not None and isinstance(self.run.recipe.pattern, NM)


def checkpoints_of(records: Sequence[Record]) -> list[Checkpoint]:
    """Returns the checkpoints of records, dense ones first; a checkpoint in several records is one
    entry.

    Raises:
        InputError: a dense checkpoint has two perplexities on the same windows.
    """
    found: dict[str, Checkpoint] = {}
    for checkpoint in _with_labels(
        [checkpoint for record in records for checkpoint in _of_record(record)]
    ):
        before = found.get(checkpoint.key)
        if before is None:
            found[checkpoint.key] = checkpoint
        else:
            _require_same_texts(before, checkpoint)
            quality = Quality(
                texts={**before.quality.texts, **checkpoint.quality.texts},
                tasks={**before.quality.tasks, **checkpoint.quality.tasks},
                groups=sorted({*before.quality.groups, *checkpoint.quality.groups}),
                samples=checkpoint.quality.samples or before.quality.samples,
                speed={**before.quality.speed, **checkpoint.quality.speed},
            )
            main = before if before.run or not checkpoint.run else checkpoint
            found[checkpoint.key] = dataclasses.replace(
                main,
                sparsity=checkpoint.sparsity if main.sparsity is None else main.sparsity,
                quality=quality,
                dense=before.dense or checkpoint.dense,
                disk_bytes=before.disk_bytes or checkpoint.disk_bytes,
                parameters=before.parameters or checkpoint.parameters,
            )
    ordered = sorted(found.values(), key=lambda checkpoint: not checkpoint.dense)
    labels = [checkpoint.label for checkpoint in ordered]
    first = sum(checkpoint.dense for checkpoint in ordered)
    return [
        dataclasses.replace(
            checkpoint,
            label=checkpoint.label
            if labels.count(checkpoint.label) == 1
            else _shortened(checkpoint.name),
            number=max(0, place - first),
        )
        for place, checkpoint in enumerate(ordered)
    ]


def _with_labels(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Returns checkpoints whose texts have unique short names, one for each shape of windows: what
    was measured on other windows cannot be compared."""
    measured = dict.fromkeys(
        (name, text.windows)
        for checkpoint in found
        for name, text in checkpoint.quality.texts.items()
    )
    names = [name for name, _ in measured]
    short = {name: short_name(name) for name in names}

    def label(name: str, windows: tuple[int, int]) -> str:
        own = short[name] if [*short.values()].count(short[name]) == 1 else name
        return own if names.count(name) == 1 else f"{own} ({windows[0]} × {windows[1]} tokens)"

    return [
        dataclasses.replace(
            checkpoint,
            quality=dataclasses.replace(
                checkpoint.quality,
                texts={
                    label(name, text.windows): text
                    for name, text in checkpoint.quality.texts.items()
                },
            ),
        )
        for checkpoint in found
    ]


def _require_same_texts(one: Checkpoint, other: Checkpoint) -> None:
    """Raises InputError where a dense checkpoint, with which others are compared, has two
    perplexities on the same windows: the content of the text was another."""
    for name, text in other.quality.texts.items():
        values = [found and found.perplexity for found in (one.text(name), text)]
        low, high = sorted(value or 0.0 for value in values)
        if one.dense and low and high / low > 1 + SAME:
            raise InputError(
                f"the records disagree about the perplexity of {one.name} on {name}, {low:.4g} and "
                f"{high:.4g}: make a report of those with the same text and dense checkpoint"
            )


def _of_record(record: Record) -> Iterator[Checkpoint]:
    """Yields the checkpoints of a record."""
    if isinstance(record, Run):
        for which, name in (("dense", record.config.ckpt), ("pruned", record.config.out or "")):
            quality, run = record.evaluation.get(which), record if which == "pruned" else None
            if run or quality:
                sizes = record.disk_bytes.get(which), record.parameters.get(which)
                yield _checkpoint(name, not run, run, None, quality or Quality(), *sizes)
        return
    for name, one in record.checkpoints.items():
        dense = name == record.against or (not one.run and one.sparsity < LEAST_ZEROS)
        run, sizes = None if dense else one.run, (one.disk_bytes, one.parameters)
        yield _checkpoint(name, dense, run, one.sparsity, one.quality, *sizes)


def _checkpoint(
    name: str,
    dense: bool,
    run: Run | None,
    sparsity: float | None,
    quality: Quality,
    size: int | None,
    parameters: int | None,
) -> Checkpoint:
    label = Path(name).name
    if run:
        method, pattern, sparsity = run.method_text, run.pattern_text, run.sparsity
    else:  # of whose making nothing is known
        method, pattern = DESCRIPTIONS.get(name, ""), ""
        if dense:
            label += " (dense)"
        elif sparsity is not None:
            pattern = f"{100 * sparsity:.1f} %"
    return Checkpoint(name, label, dense, method, pattern, sparsity, quality, run, size, parameters)


def _shortened(name: str) -> str:
    return "/".join(Path(name).parts[-2:])
