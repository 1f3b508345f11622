"""The checkpoints of a report, from the records that speak of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from convert.hub import DESCRIPTIONS
from jaxprune.errors import InputError
from jaxprune.evaluation.quality import Quality
from jaxprune.evaluation.text import TextQuality, short_name
from jaxprune.reporting.card import sizes_text
from jaxprune.reporting.schema import Record, Run
from jaxprune.sparsity.masks import LEAST_ZEROS
from jaxprune.sparsity.patterns import NM

SAME = 0.01
"""The most by which two perplexities of a checkpoint on the same windows differ, relatively: what
dtypes and hardware change."""
WHICH: tuple[Literal["dense", "pruned"], ...] = ("dense", "pruned")


@dataclasses.dataclass(frozen=True)
class Entry:
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


def entries(records: Sequence[Record]) -> list[Entry]:
    """Returns the checkpoints of records, dense ones first; a checkpoint in several records is one
    entry.

    Raises:
        InputError: a dense checkpoint has two perplexities on the same windows.
    """
    found: dict[str, Entry] = {}
    for entry in _with_labels([entry for record in records for entry in _entries(record)]):
        before = found.get(entry.key)
        if before is None:
            found[entry.key] = entry
        else:
            _require_same_texts(before, entry)
            quality = Quality(
                texts={**before.quality.texts, **entry.quality.texts},
                tasks={**before.quality.tasks, **entry.quality.tasks},
                groups=sorted({*before.quality.groups, *entry.quality.groups}),
                samples=entry.quality.samples or before.quality.samples,
            )
            main = before if before.run or not entry.run else entry
            found[entry.key] = dataclasses.replace(
                main,
                sparsity=entry.sparsity if main.sparsity is None else main.sparsity,
                quality=quality,
                dense=before.dense or entry.dense,
                disk_bytes=before.disk_bytes or entry.disk_bytes,
                parameters=before.parameters or entry.parameters,
            )
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


def _with_labels(found: Sequence[Entry]) -> list[Entry]:
    """Returns entries whose texts have unique short names, a name for each shape of windows: what
    was measured on other windows cannot be compared."""
    measured = dict.fromkeys(
        (name, text.windows) for entry in found for name, text in entry.quality.texts.items()
    )
    names = [name for name, _ in measured]
    short = {name: short_name(name) for name in names}

    def label(name: str, windows: tuple[int, int]) -> str:
        own = short[name] if [*short.values()].count(short[name]) == 1 else name
        return own if names.count(name) == 1 else f"{own} ({windows[0]} × {windows[1]} tokens)"

    return [
        dataclasses.replace(
            entry,
            quality=dataclasses.replace(
                entry.quality,
                texts={
                    label(name, text.windows): text for name, text in entry.quality.texts.items()
                },
            ),
        )
        for entry in found
    ]


def _require_same_texts(one: Entry, other: Entry) -> None:
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


def _entries(record: Record) -> list[Entry]:
    if isinstance(record, Run):
        measured = record.evaluation
        sizes = {
            which: (record.disk_bytes.get(which), record.parameters.get(which)) for which in WHICH
        }
        pruned = _pruned(
            record.config.out or "", record, measured.get("pruned", Quality()), *sizes["pruned"]
        )
        if "dense" not in measured:
            return [pruned]
        return [_bare(record.config.ckpt, True, None, measured["dense"], *sizes["dense"]), pruned]
    found = []
    for name, one in record.checkpoints.items():
        is_dense = name == record.against or (not one.run and one.sparsity < LEAST_ZEROS)
        if one.run and not is_dense:
            found.append(_pruned(name, one.run, one.quality, one.disk_bytes, one.parameters))
        else:
            found.append(
                _bare(name, is_dense, one.sparsity, one.quality, one.disk_bytes, one.parameters)
            )
    return found


def _bare(
    name: str,
    dense: bool,
    sparsity: float | None,
    quality: Quality,
    size: int | None,
    parameters: int | None,
) -> Entry:
    """Returns a checkpoint of whose making nothing is known."""
    pattern = "" if dense or sparsity is None else f"{100 * sparsity:.1f} %"
    label = Path(name).name + (" (dense)" if dense else "")
    return Entry(
        name,
        label,
        dense,
        DESCRIPTIONS.get(name, ""),
        pattern,
        sparsity,
        quality,
        None,
        size,
        parameters,
    )


def _pruned(
    name: str, run: Run, quality: Quality, size: int | None, parameters: int | None
) -> Entry:
    how = run.method_text, run.pattern_text
    return Entry(name, Path(name).name, False, *how, run.sparsity, quality, run, size, parameters)


def _shortened(name: str) -> str:
    return "/".join(Path(name).parts[-2:])
