"""A checkpoint's quality: all that is measured of it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from convert.schema import FiniteOrNull
from jaxprune import calibration
from jaxprune.errors import Change, InputError
from jaxprune.evaluation.perplexity import TextQuality, short_name, text_quality
from jaxprune.evaluation.samples import Prompts, Sample, samples
from jaxprune.evaluation.speed import Speed, measure_speed, require_engine
from jaxprune.evaluation.tasks import Tasks, groups_of, mean_accuracy, summarize, with_error
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer
from jaxprune.streaming.sweep import timed


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured.

    Attributes:
        texts: names of texts, or their files; see `calibration.evaluation_windows`.
        seqlen: tokens of a window of text.
        windows: the most windows of a text; None: all.
        tasks: names of lm-eval's tasks.
        tasks_data: a folder with the tasks' rows; None: they come from the hub or its cache.
        limit: the most rows of a task; None: all.
        backend: what runs the tasks: jax streams the model, torch holds all of it.
        device: auto, cpu or gpu: where torch runs.
        samples: tokens by which prompts are continued; 0: they are not.
        prompts: the file of the prompts; None: the dozen of `samples.PROMPTS`.
        speed: whether speed and size in other programs are measured; see `speed.measure_speed`.
    """

    texts: Sequence[str] = ()
    seqlen: int = 2048
    windows: int | None = None
    tasks: Sequence[str] = ()
    tasks_data: str | Path | None = None
    limit: int | None = None
    backend: Literal["jax", "torch"] = "jax"
    device: str = "auto"
    samples: int = 0
    prompts: str | Path | None = None
    speed: bool = False

    def __bool__(self) -> bool:
        return bool(self.texts or self.tasks or self.samples or self.speed)

    @functools.cached_property
    def loaded_tasks(self) -> Tasks | None:
        """lm-eval's tasks; None without any. InputError: they cannot be used."""
        if not self.tasks:
            return None
        return Tasks(self.tasks, self.tasks_data, self.limit, greedy=self.backend == "jax")

    @functools.cached_property
    def loaded_prompts(self) -> Prompts | None:
        """What is continued; None without samples. InputError: it cannot be used."""
        return Prompts(self.prompts) if self.samples else None

    def load(self) -> None:
        """Loads tasks and prompts, and looks for engines, before a model is opened.

        Raises:
            InputError: they cannot be used.
        """
        _ = self.loaded_tasks, self.loaded_prompts
        if self.speed:
            require_engine()


@dataclasses.dataclass
class Quality:
    """What was measured of one checkpoint.

    Attributes:
        texts: text -> what the model makes of it.
        tasks: task -> metric -> value; see `tasks.summarize`.
        groups: the names in it that are groups of tasks.
        samples: prompts and what the model makes of them.
        speed: setting -> speed and size of the checkpoint in another program.
        lm_eval: the results as lm-eval gives them, samples included; None without tasks.
        seconds: the seconds by what was measured; texts and speed are measured for all checkpoints
            at once.
    """

    texts: dict[str, TextQuality] = dataclasses.field(default_factory=dict)
    tasks: dict[str, dict[str, FiniteOrNull]] = dataclasses.field(default_factory=dict)
    groups: list[str] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    speed: dict[str, Speed] = dataclasses.field(default_factory=dict)
    lm_eval: Annotated[dict[str, Any] | None, Field(exclude=True)] = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def mean_accuracy(self) -> dict[str, float]:
        """The mean over the tasks; see `tasks.mean_accuracy`."""
        return mean_accuracy(self.tasks, self.groups)

    def summary(self) -> dict[str, str]:
        """Returns what was measured -> its value, in words."""
        rows = {}
        shorter = [*map(short_name, self.texts)]
        for (full, text), own in zip(self.texts.items(), shorter, strict=True):
            windows, length = text.windows
            name = own if shorter.count(own) == 1 else full
            rows[f"perplexity of {name} ({windows} x {length} tokens)"] = f"{text.perplexity:.7g}"
            if text.kl is not None and text.ratio is not None and text.top1 is not None:
                rows[f"{name}: perplexity over the dense model's"] = f"{text.ratio:.4f}"
                rows[f"{name}: KL divergence from the dense model"] = f"{text.kl:.4f} nats"
                rows[f"{name}: same most probable token"] = f"{100 * text.top1:.2f} %"
        for task, metrics in self.tasks.items():
            for metric, value in metrics.items():
                if "_stderr" not in metric:
                    name, comma, filtered = metric.partition(",")
                    error = metrics.get(f"{name}_stderr{comma}{filtered}")
                    rows[f"{task}, {metric}"] = with_error(value, error)
        if mean := self.mean_accuracy:
            rows["mean acc"] = with_error(mean["acc"], mean.get("acc_stderr"))
        for setting, speed in self.speed.items():
            rows |= speed.summary(setting)
        return rows


def table(qualities: Mapping[Any, Quality]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a table: a column for each checkpoint."""
    columns = {name: quality.summary() for name, quality in qualities.items()}
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    # What only a pruned checkpoint has comes right after the dense one's row above it.
    longest = max(columns.values(), key=len, default={})
    ordered = [*longest, *(label for label in labels if label not in longest)]
    return ["", *columns], [
        [label, *(column.get(label, "") for column in columns.values())] for label in ordered
    ]


class Evaluator:
    """Texts and tasks, loaded and checked before the work starts.

    Args:
        measures: what to measure.
        model: the model whose tokenizer makes the windows; the dense model where others are
            compared with it.
        observer: is notified of progress.

    Attributes:
        windows: text -> the model's windows of it.

    Raises:
        InputError, CheckpointError: a text or a task cannot be used with this model.
    """

    def __init__(
        self,
        measures: Measures,
        model: StreamedModel,
        observer: Observer = SILENT,
    ) -> None:
        self._measures, self._model, self._observer = measures, model, observer
        self._tasks, self._prompts = measures.loaded_tasks, measures.loaded_prompts
        self.windows = self._windows_of(model)
        for tokens in self.windows.values():
            model.require_tokens(tokens)
        if self._prompts:
            self._prompts.ids(model, self._measures.samples)
        if self._tasks:
            _ = model.tokenizer  # which the tasks need
            self._lm_of = _backend(self._measures, observer)

    def measure(
        self, models: Mapping[str, StreamedModel], against: str | None = None
    ) -> Iterator[tuple[str, Quality]]:
        """Yields each checkpoint's quality, as soon as it is known.

        Args:
            models: name -> checkpoint.
            against: name of the dense one, with which the others are compared; None: there is none.

        Raises:
            InputError, CheckpointError: a checkpoint cannot be used, or not compared with the dense
                one.
        """
        qualities = self.measure_texts(models, against)
        if self._measures.speed:
            seconds: dict[str, float] = {}
            with timed(seconds, "speed"):
                speeds = measure_speed(models, against, self._observer)
            for name, quality in qualities.items():
                quality.speed = speeds[name]
                quality.seconds |= seconds
        for name, model in models.items():
            self.measure_alone(model, qualities[name])
            yield name, qualities[name]

    def measure_texts(
        self, models: Mapping[str, StreamedModel], against: str | None = None
    ) -> dict[str, Quality]:
        """Returns name -> what the checkpoint makes of the texts; arguments and errors as for
        `measure`."""
        qualities = {name: Quality() for name in models}
        windows = {
            name: self.windows if model is self._model else self._windows_of(model)
            for name, model in models.items()
        }
        groups = [[name] for name in models]
        if against is not None:
            groups = [[against, *(name for name in models if name != against)]]
        for text in self.windows:
            for first, *others in groups:
                tokens = windows[first][text]
                if different := [
                    name for name in others if not np.array_equal(windows[name][text], tokens)
                ]:
                    raise InputError(
                        f"{different[0]} splits {text} into other tokens than {first}: they have "
                        "different tokenizers, so that their predictions cannot be compared",
                        options={"against": Change.OMIT},
                    )
                group = [models[name] for name in (first, *others)]
                seconds: dict[str, float] = {}
                with timed(seconds, f"perplexity, {text}"):
                    found = text_quality(group, tokens, name=text, observer=self._observer)
                for name, quality in zip((first, *others), found, strict=True):
                    qualities[name].texts[text] = quality
                    qualities[name].seconds |= seconds
        return qualities

    def measure_alone(self, model: StreamedModel, quality: Quality) -> None:
        """Adds what a checkpoint makes of the prompts and of the tasks."""
        if self._prompts:
            count = self._measures.samples
            with timed(quality.seconds, "samples"):
                quality.samples = samples(model, self._prompts, count, self._observer)
        if self._tasks:
            with timed(quality.seconds, f"zero-shot, {self._measures.backend}"):
                results = self._tasks.run(self._lm_of(model))
            quality.lm_eval = results
            quality.tasks, quality.groups = summarize(results), groups_of(results)

    def _windows_of(self, model: StreamedModel) -> dict[str, np.ndarray]:
        try:
            calibration.require_vocabulary(
                self._measures.texts, self._measures.seqlen, model.architecture.config.vocab_size
            )
            return {
                source: calibration.evaluation_windows(
                    source,
                    None if source.endswith(".npy") else model.tokenizer,
                    self._measures.seqlen,
                    self._measures.windows,
                )
                for source in self._measures.texts
            }
        except InputError as error:
            if "seqlen" in error.options:  # which is calibration's
                error.options["eval_seqlen"] = error.options.pop("seqlen")
            raise


def _backend(measures: Measures, observer: Observer) -> Callable[[StreamedModel], Any]:
    """Returns checkpoint -> lm-eval's model."""
    if measures.backend == "torch":
        try:
            from jaxprune.evaluation.torch_lm import hflm
        except ImportError as error:
            raise InputError(
                f"the torch backend needs PyTorch ({error}): pip install 'jaxprune[torch]'"
            ) from error
        return lambda model: hflm(model.reader, model.dtype, measures.device)
    from jaxprune.evaluation.lm import StreamedLM

    return lambda model: StreamedLM(model, observer=observer)
