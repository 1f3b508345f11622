"""A checkpoint's quality: all that is measured of it."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from convert import Reader
from convert.assets import load_tokenizer
from jaxprune import calibration
from jaxprune.commands.eval_options import EvalOptions, split
from jaxprune.commands.terminal import track
from jaxprune.errors import Change, InputError
from jaxprune.evaluation.tasks import Tasks, mean_accuracy, summarize, with_error
from jaxprune.evaluation.text import TextQuality, text_quality
from jaxprune.models import model_for
from jaxprune.streaming.stream import require_tokens


@dataclasses.dataclass
class Quality:
    """What was measured of one checkpoint.

    Attributes:
        texts: text -> what the model makes of it.
        windows: text -> windows, tokens a window.
        tasks: task -> metric -> value; see `tasks.summarize`.
        lm_eval: the results as lm-eval gives them, samples included; None without tasks.
        seconds: by what was measured; texts are measured for all checkpoints at once.
    """

    texts: dict[str, TextQuality] = dataclasses.field(default_factory=dict)
    windows: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    lm_eval: dict[str, Any] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For jaxprune.json; infinite perplexities are null, for JSON knows no infinity."""
        texts = {}
        for name, found in self.texts.items():
            values = {key: value for key, value in found._asdict().items() if value is not None}
            finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
            texts[name] = {"windows": list(self.windows[name])} | finite
        mean = mean_accuracy(self.tasks)
        return {
            "texts": texts,
            "tasks": self.tasks,
            **({"mean_accuracy": mean} if mean else {}),
            "seconds": self.seconds,
        }

    def summary(self) -> dict[str, str]:
        """What was measured -> its value, in words."""
        rows = {}
        for name, text in self.texts.items():
            windows, length = self.windows[name]
            rows[f"perplexity of {name} ({windows} x {length} tokens)"] = f"{text.perplexity:.7g}"
            if text.kl is not None and text.ratio is not None and text.top1 is not None:
                rows[f"{name}: perplexity over the dense model's"] = f"{text.ratio:.4f}"
                rows[f"{name}: KL divergence from the dense model"] = f"{text.kl:.4f} nats"
                rows[f"{name}: same most probable token"] = f"{100 * text.top1:.2f} %"
        for task, metrics in self.tasks.items():
            for metric, value in metrics.items():
                if "_stderr" not in metric:
                    name, _, filtered = metric.partition(",")
                    error = metrics.get(f"{name}_stderr{',' * bool(filtered)}{filtered}")
                    rows[f"{task}, {metric}"] = with_error(value, error)
        if mean := mean_accuracy(self.tasks):
            rows["mean acc"] = with_error(mean["acc"], mean.get("acc_stderr"))
        return rows


def table(qualities: Mapping[str, Quality]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a column for each checkpoint."""
    columns = {name: quality.summary() for name, quality in qualities.items()}
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    # What only a pruned checkpoint has comes right after the dense one's row above it.
    longest = max(columns.values(), key=len, default={})
    ordered = [*longest, *(label for label in labels if label not in longest)]
    return ["", *columns], [[label, *(column.get(label, "") for column in columns.values())] for label in ordered]


class Evaluator:
    """Texts and tasks, loaded and checked before the work starts.

    Args:
        options: what to measure, defaults filled in.
        reader: whose tokenizer makes the windows; the dense checkpoint where others are compared with it.

    Raises:
        InputError, CheckpointError: a text or a task cannot be used with this model.
    """

    def __init__(self, options: EvalOptions, reader: Reader) -> None:
        self._options = options
        self._dtype = options.computation_dtype
        self._reader = reader
        model = model_for(reader, self._dtype)
        self.windows: dict[str, np.ndarray] = {}
        if "ppl" in options.measures:
            self.windows = self._windows(reader)
            for tokens in self.windows.values():
                require_tokens(model, tokens)
        self._tasks: Tasks | None = None
        if "zero-shot" in options.measures:
            self._tasks = Tasks(split(options.tasks), options.tasks_data, options.limit)
            load_tokenizer(reader.assets)
            self._lm_of = _backend(options.backend, options.device)

    def measure(self, readers: Mapping[str, Reader], against: str | None = None) -> Iterator[tuple[str, Quality]]:
        """Each checkpoint's quality, as soon as it is known.

        Args:
            readers: name -> checkpoint.
            against: name of the dense one, with which the others are compared; None: there is none.

        Raises:
            InputError, CheckpointError: a checkpoint cannot be used, or not compared with the dense one.
        """
        qualities = self.measure_texts(readers, against)
        for name, reader in readers.items():
            self.measure_tasks(name, reader, qualities[name])
            yield name, qualities[name]

    def measure_texts(self, readers: Mapping[str, Reader], against: str | None = None) -> dict[str, Quality]:
        """Name -> what the checkpoint makes of the texts; arguments and errors as for `measure`."""
        qualities = {name: Quality() for name in readers}
        windows = {
            name: self.windows if reader is self._reader else self._windows(reader)
            for name, reader in readers.items()
            if self.windows
        }
        groups = [[name] for name in readers]
        if against is not None:
            groups = [[against, *(name for name in readers if name != against)]]
        for text in self.windows:
            for first, *others in groups:
                tokens = windows[first][text]
                if different := [name for name in others if not np.array_equal(windows[name][text], tokens)]:
                    raise InputError(
                        f"{different[0]} splits {text} into other tokens than {first}: they have different tokenizers, "
                        "so that their predictions cannot be compared",
                        options={"against": Change.OMIT},
                    )
                start = time.perf_counter()
                group = [readers[name] for name in (first, *others)]
                found = text_quality(group, tokens, dtype=self._dtype, track=track(f"perplexity, {text}"))
                for name, quality in zip((first, *others), found, strict=True):
                    qualities[name].texts[text] = quality
                    qualities[name].windows[text] = tokens.shape
                    qualities[name].seconds[f"perplexity, {text}"] = time.perf_counter() - start
        return qualities

    def measure_tasks(self, name: str, reader: Reader, quality: Quality) -> None:
        """Adds what a checkpoint makes of the tasks."""
        if self._tasks:
            start = time.perf_counter()
            dtype = np.dtype(model_for(reader, self._dtype).config.dtype)
            quality.lm_eval = self._tasks.run(self._lm_of(name, reader, dtype))
            quality.tasks = summarize(quality.lm_eval)
            quality.seconds[f"zero-shot, {self._options.backend}"] = time.perf_counter() - start

    def _windows(self, reader: Reader) -> dict[str, np.ndarray]:
        options = self._options
        assert options.eval_seqlen
        sources, vocab_size = split(options.eval_text), model_for(reader, self._dtype).config.vocab_size
        tokenizer = load_tokenizer(reader.assets) if any(not s.endswith(".npy") for s in sources) else None
        return {
            source: calibration.evaluation_windows(
                source, tokenizer, options.eval_seqlen, options.eval_windows, vocab_size=vocab_size
            )
            for source in sources
        }


def _backend(backend: str, device: str) -> Callable[[str, Reader, np.dtype], Any]:
    """(name, checkpoint, dtype) -> lm-eval's model."""
    if backend == "torch":
        try:
            from jaxprune.evaluation.torch_lm import hflm
        except ImportError as error:
            raise InputError(f"the torch backend needs PyTorch ({error}): pip install 'jaxprune[torch]'") from error
        return lambda name, reader, dtype: hflm(reader, dtype, device)
    from jaxprune.evaluation.lm import StreamedLM

    return lambda name, reader, dtype: StreamedLM(reader, dtype=dtype, track=track(f"zero-shot, {name}"))
