"""One self-contained page about runs and evaluations: `python -m jaxprune.report DIR... --out FILE`.

Everything in it comes from the jaxprune.json of each folder.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from convert.command import ArgumentParser
from convert.ownership import UNSEALED, Destination, destination, seal, staged, write_text
from convert.paths import require_apart
from jaxprune import figures
from jaxprune.console import console, run_main
from jaxprune.errors import InputError
from jaxprune.evaluation.tasks import mean_accuracy

RECORD, REPORT = "jaxprune.json", "report.html"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint of a report.

    Attributes:
        name: of the checkpoint, unique in the report.
        label: a short name.
        dense: whether it is the one that others were made from or are compared with.
        method, pattern: how it was pruned, in words; "" where that is not known.
        sparsity: zeros of the linears over their weights; None where nobody counted.
        layers: figures of the run's layers, as jaxprune.json has them; empty without a run.
        seconds: of the run, by phase.
        quality: what was measured, as `Quality.as_json` gives it.
        run: the run's record; empty without one.
        number: of the checkpoint among those that are not dense; decides its colour.
    """

    name: str
    label: str
    dense: bool
    method: str
    pattern: str
    sparsity: float | None
    layers: Sequence[Mapping[str, Any]]
    seconds: Mapping[str, float]
    quality: Mapping[str, Any]
    run: Mapping[str, Any]
    number: int = 0

    def text(self, name: str) -> Mapping[str, Any]:
        """What was measured on a text; empty where it was not."""
        return self.quality.get("texts", {}).get(name, {})

    @property
    def key(self) -> str:
        """What says that two records speak of one checkpoint: how it was made, or its name."""
        if not self.run:
            return self.name
        made = [self.run["config"]["ckpt"], self.run["method"], self.run["pattern"], self.run["calibration"]]
        return json.dumps([self.label, *made], sort_keys=True)

    @property
    def accuracy(self) -> float | None:
        """The mean over the tasks, as a fraction."""
        return self.quality.get("mean_accuracy", {}).get("acc")

    @property
    def tasks(self) -> Mapping[str, Mapping[str, float]]:
        return self.quality.get("tasks", {})


def entries(records: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The checkpoints of records, dense ones first; a checkpoint in several records is one entry.

    Args:
        records: contents of jaxprune.json files, of runs and of evaluations.
    """
    found: dict[str, Entry] = {}
    for record in records:
        for entry in _entries(record):
            before = found.get(entry.key)
            if before is None:
                found[entry.key] = entry
            else:
                quality = {**before.quality, **entry.quality}
                for part in ("texts", "tasks"):
                    quality[part] = {**before.quality.get(part, {}), **entry.quality.get(part, {})}
                quality["mean_accuracy"] = mean_accuracy(quality["tasks"])
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


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The report's HTML.

    Args:
        records: contents of jaxprune.json files, of runs and of evaluations.
    """
    everything = entries(records)
    texts = list(dict.fromkeys(text for entry in everything for text in entry.quality.get("texts", {})))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxprune", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        title=_title(everything),
        entries=everything,
        runs=[entry for entry in everything if entry.run],
        texts=texts,
        tasks=list(dict.fromkeys(task for entry in everything for task in entry.tasks)),
        figures=_figures(everything, texts),
        number=figures.number,
        short=figures.short,
        details=[(_source(record), json.dumps(_without_layers(record), indent=1)) for record in records],
        hardware=sorted({record["hardware"] for record in records}),
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
        if compared := [entry for entry in measured if entry.text(text).get("kl") is not None]:
            quality.append(figures.divergences(compared, text))
            by_sparsity(f"KL divergence on {figures.short(text)}", "nats a token", _value_of(text, "kl"))
    if tested := [entry for entry in everything if entry.accuracy is not None]:
        quality.append(figures.accuracies(tested))
        by_sparsity("Mean accuracy", "mean accuracy (acc)", lambda entry: entry.accuracy, log=False)
    runs = [entry for entry in everything if entry.layers]
    pruning = []
    if runs:
        plots = figures.error_by_layer, figures.error_by_linear, figures.sparsity_by_layer, figures.time_by_phase
        pruning = [plot(runs) for plot in plots]
    sections: dict[str, Sequence[figures.Figure | None]]
    sections = {"Quality": quality, "Sparsity against quality": trade, "Pruning": pruning}
    kept = {heading: [plot for plot in plots if plot] for heading, plots in sections.items()}
    return [(heading, plots) for heading, plots in kept.items() if plots]


def _value_of(text: str, name: str) -> Callable[[Entry], float | None]:
    return lambda entry: entry.text(text).get(name)


def _entries(record: Mapping[str, Any]) -> list[Entry]:
    if record["kind"] == "run":
        config, measured = record["config"], record["evaluation"]
        dense = [_bare(config["ckpt"], True, 0.0, measured["dense"])] if "dense" in measured else []
        return [*dense, _pruned(config["out"], record, measured.get("pruned", {}))]
    found = []
    for name, one in record["checkpoints"].items():
        is_dense = name == record["against"] or (not one["run"] and one["sparsity"] < 0.01)
        if one["run"] and not is_dense:
            found.append(_pruned(name, one["run"], one["quality"]))
        else:
            found.append(_bare(name, is_dense, one["sparsity"], one["quality"]))
    return found


def _bare(name: str, dense: bool, sparsity: float, quality: Mapping[str, Any]) -> Entry:
    """A checkpoint of whose making nothing is known."""
    pattern = "" if dense else f"{100 * sparsity:.1f} %"
    label = Path(name).name + (" (dense)" if dense else "")
    return Entry(name, label, dense, "", pattern, sparsity, [], {}, quality, {})


def _pruned(name: str, run: Mapping[str, Any], quality: Mapping[str, Any]) -> Entry:
    method = run["method"]["name"]
    return Entry(
        name=name,
        label=Path(name).name,
        dense=False,
        method=method,
        pattern=run["pattern"],
        sparsity=run["sparsity"],
        layers=run["layers"],
        seconds=run["seconds"],
        quality=quality,
        run=run,
    )


def _title(everything: Sequence[Entry]) -> str:
    pruned = [entry for entry in everything if not entry.dense]
    if len(pruned) == 1:
        (one,) = pruned
        return f"{one.label}: {one.method}, {one.pattern}" if one.method else one.label
    return f"{len(everything)} checkpoints"


def _shortened(name: str) -> str:
    return "/".join(Path(name).parts[-2:])


def _source(record: Mapping[str, Any]) -> str:
    config = record["config"]
    return (
        f"run that made {config['out']}" if record["kind"] == "run" else f"evaluation of {len(record['checkpoints'])}"
    )


def _without_layers(record: Any) -> Any:
    """A record without the figures of single layers, which the plots show."""
    if isinstance(record, Mapping):
        return {key: _without_layers(value) for key, value in record.items() if key != "layers"}
    return record


def load(folder: Path) -> dict[str, Any]:
    """The record in a folder.

    Raises:
        InputError: there is none, or it is not jaxprune's.
    """
    path = folder / RECORD if folder.is_dir() else folder
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {RECORD}: give the folder of a run or of an evaluation") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    kinds = {"run": {"config", "method", "layers", "evaluation"}, "evaluation": {"config", "checkpoints", "against"}}
    if not isinstance(record, dict) or not kinds.get(record.get("kind", ""), {"kind"}) <= record.keys():
        raise InputError(f"{path} is no record of this version of jaxprune: make it again, or move it away")
    return record


def run_of(folder: Path) -> dict[str, Any] | None:
    """The record of the run that made a checkpoint's folder; None where there is none.

    Raises:
        InputError: it cannot be read.
    """
    if not (folder / RECORD).exists():
        return None
    record = load(folder)
    return record if record["kind"] == "run" else None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_main(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="python -m jaxprune.report",
        description="One HTML page about several runs and evaluations.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="of a run, or of an evaluation")
    parser.add_argument("--out", required=True, help="the page to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an unchanged earlier page")
    args = parser.parse_args(argv)
    place = destination(args.out, "out", overwrite=args.overwrite, folder=False)
    require_apart({"the record": [folder / RECORD for folder in args.folders]}, {"out": place.path}, error=InputError)
    place.check()
    save(place, page([load(folder) for folder in args.folders]))
    console.print(os.path.relpath(place.path))


def save(place: Destination, html: str) -> None:
    """Writes a page as a file of its own.

    Raises:
        CheckpointError: there is something that is not replaced, or it cannot be written.
    """
    first, rest = html.split("\n", 1)
    with staged(place) as path:
        write_text(path, f"{first}\n<!-- {UNSEALED} -->\n{rest}")
        seal(path)


if __name__ == "__main__":
    sys.exit(main())
