"""What of a folder goes to the hub: its files, the model card with the hub's metadata, and no path
of this machine."""

import dataclasses
import fnmatch
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markupsafe import escape

from convert import packed
from convert.errors import CheckpointError
from convert.files import read_bytes, require_inside, require_regular
from convert.hub import repository_of
from jaxprune.reporting import record as records
from jaxprune.reporting.model_card import escaped
from jaxprune.reporting.record import RECORD, RECORD_BYTES, REPORT, Quality, Run
from jaxprune.sparsity.masks import FROM_CHECKPOINT

CARD = "README.md"
TASKS = "lm-eval-*.json"
TEXTS = {CARD: 2**22, RECORD: RECORD_BYTES, REPORT: 2**28, TASKS: RECORD_BYTES}
"""Files of ours that may name paths of this machine, as patterns -> the most bytes that they
hold."""


@dataclasses.dataclass(frozen=True)
class Publication:
    """What is sent.

    Attributes:
        files: path in the repository -> the file, or what is sent in its place.
        card: the model card, one of the files.
    """

    files: Mapping[str, Path | bytes]
    card: ModelCard

    def size(self, name: str) -> int:
        """Returns a file's bytes."""
        file = self.files[name]
        return len(file) if isinstance(file, bytes) else file.stat().st_size


def publication(
    folder: Path,
    repository: str,
    base: str | None,
    licence: str | None,
    licence_of: Callable[[Any], str | None],
) -> Publication:
    """Collects what is sent of a folder; hidden files stay.

    Args:
        folder: a checkpoint.
        repository: owner/name.
        base: the repository of the dense model; None: where the run's record says it.
        licence: the hub's name of the licence; None: what the card says, or that of the base.
        licence_of: the repository of a base -> its licence, where that is known.

    Raises:
        CheckpointError: a file cannot be read, or leads outside the folder.
    """
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_dir() and not any(part.startswith(".") for part in name.parts):
            require_inside(path, folder)
            require_regular(path)
            files[name.as_posix()] = path
    run = records.run_of(folder)
    own = _paths(run, base) if run else {}

    def shown(text: str) -> str:
        for path, name in own.items():
            text = re.sub(path, name.replace("\\", r"\\"), text)
        return text

    for pattern, most in TEXTS.items():
        for text in fnmatch.filter(files, pattern):
            content = shown(_text(folder / text, most))
            if pattern == TASKS:  # which names temporary files too
                content = re.sub(r'"[/~][^"\n]*/([^"/\n]+)"', r'"\1"', content)
            files[text] = content.encode()
    try:
        card = ModelCard(
            _text(folder / CARD, TEXTS[CARD]) if CARD in files else "---\ntags: []\n---\n"
        )
        library = "jaxprune" if packed.MARK in files else "transformers"
        _complete(card.data, repository, run, base, library)
        card.data.license = licence or card.data.license or licence_of(card.data.base_model)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"its metadata cannot be read ({str(error)[:200]})", file=folder / CARD
        ) from error
    card = ModelCard(shown(str(card)))
    files[CARD] = str(card).encode()
    return Publication(dict(sorted(files.items())), card)


def _text(path: Path, most: int) -> str:
    return read_bytes(path, most).decode("utf-8", "replace")


def _paths(run: Run, base: str | None) -> dict[str, str]:
    """Returns patterns of the paths of this machine that a run's record names -> their last parts,
    the longest first.

    Args:
        run: the record.
        base: a repository, which a folder here may be called after.
    """
    ckpt, mask = run.config.ckpt, run.recipe.mask or ""
    texts = [value for value in run.config.model_dump().values() if isinstance(value, str)]
    texts += [text for quality in run.evaluation.values() for text in quality.texts]
    words = {word for text in texts for word in re.split(r"[,:]", text)}
    words |= {ckpt, run.config.out or "", mask.partition(":")[2]}
    found: dict[str, str] = {}
    for word in words - {base, *filter(repository_of, (ckpt, mask.removeprefix(FROM_CHECKPOINT)))}:
        if "/" in word and (name := Path(word).name):
            for path in (word, os.path.expanduser(word)):
                found |= zip(_spellings(path), _spellings(name), strict=True)
    return {_pattern(path): found[path] for path in sorted(found, key=len, reverse=True)}


def _spellings(name: str) -> list[str]:
    """Returns a name as Markdown, JSON and HTML have it."""
    in_json = json.dumps(name)[1:-1]
    return [escaped(name), in_json, str(escape(name)), str(escape(in_json)), name]


def _pattern(path: str) -> str:
    """Returns a regular expression for a path; a short one may be part of something else."""
    return (
        re.escape(path)
        if re.match("/[^/]+/", path)
        else rf"(?<![\w.~<-]){re.escape(path)}(?![\w-])"
    )


def _complete(
    data: ModelCardData, repository: str, run: Run | None, base: str | None, library: str
) -> None:
    """Adds what the hub shows of a model; what the card's author wrote stays, but for what an
    option says."""
    data.tags = list(dict.fromkeys([*(data.tags or []), "pruned", "sparse", "jaxprune"]))
    data.library_name = data.library_name or library
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    if base:
        data.base_model = base
    if run and "pruned" in run.evaluation:
        data.model_name = repository.partition("/")[2]
        data.eval_results = _results(run.evaluation["pruned"])


def _results(quality: Quality) -> list[EvalResult]:
    """Returns what was measured, in the hub's terms."""
    found: list[tuple[str, str, str, float | None, str]] = []
    for name, text in quality.texts.items():
        windows, length = text.windows
        kind, dataset = re.split(r"[/.]", name)[0], f"{name}, {windows} windows of {length} tokens"
        divergence = "KL divergence from the dense model, nats"
        found.append((kind, dataset, "perplexity", text.perplexity, "perplexity"))
        found.append((kind, dataset, "kl_divergence", text.kl, divergence))
    for task, metrics in quality.tasks.items():
        found.append((task, f"{task}, zero-shot", "accuracy", metrics.get("acc"), "accuracy"))
    return [
        EvalResult("text-generation", kind, dataset, metric, value, metric_name=name)
        for kind, dataset, metric, value, name in found
        if value is not None
    ]


def require_repository(name: str) -> None:
    """Raises CheckpointError for what is no owner/name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", name):
        raise CheckpointError(
            "no repository of the hub has such a name", file=name, wanted="owner/name"
        )
