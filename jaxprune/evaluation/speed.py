"""Measures how fast and how small checkpoints are in other programs, on the CPU."""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from convert import Reader, fill_checkpoint, parts, require_suitable
from convert.checkpoint import config_changes
from convert.errors import CheckpointError
from convert.gguf.writing import tensor_bytes
from convert.schema import Count
from jaxprune.errors import Change, InputError
from jaxprune.evaluation import engines
from jaxprune.evaluation.engines import ENGINES, Timing
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer

PROMPT = 512
"""Tokens of the prompt, at most."""
GENERATED = 64
"""Tokens that are generated after it, at most."""
ROUNDS = 3
"""Number of measurements of each checkpoint. Checkpoints take turns."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How checkpoints are run.

    Attributes:
        engine: the name of the engine, of `engines.ENGINES`.
        to: the format that it reads.
        type: the type of the matrices.
    """

    engine: str
    to: str
    type: str

    def __str__(self) -> str:
        return f"{self.engine} {self.type.upper()}"


SETTINGS = (
    *(Setting("llama.cpp", "gguf", kind) for kind in ("f16", "q8_0", "q4_0")),
    Setting("transformers", "hf", "bf16"),
)


@dataclasses.dataclass(frozen=True)
class Speed:
    """The size and the speed of a checkpoint in one setting.

    Attributes:
        file_bytes: the bytes of its weights' files.
        peak_bytes: the peak memory of the process that ran it.
        prompt: tokens of a prompt a second; the median of all rounds.
        generated: generated tokens a second; the median of all rounds.
        prompt_ratio: `prompt` over the dense model's; the median of the rounds' ratios. None: there
            is no dense model to compare with.
        generated_ratio: `generated` over the dense model's, in the same way.
    """

    file_bytes: Count
    peak_bytes: Count
    prompt: float
    generated: float
    prompt_ratio: float | None = None
    generated_ratio: float | None = None

    def summary(self, setting: str) -> dict[str, str]:
        """Returns what was measured -> its value, in words.

        Args:
            setting: the name of the setting.
        """
        found = {
            f"{setting}: weights": f"{self.file_bytes / 1e6:,.1f} MB",
            f"{setting}: peak memory": f"{self.peak_bytes / 1e6:,.0f} MB",
        }
        for what, rate, ratio in (
            ("prompt tokens/s", self.prompt, self.prompt_ratio),
            ("generated tokens/s", self.generated, self.generated_ratio),
        ):
            over = f" ({ratio:.2f} times dense)" if ratio else ""
            found[f"{setting}: {what}"] = f"{rate:.3g}{over}"
        return found


def require_engine() -> None:
    """Raises InputError if no engine is installed."""
    if not any(engine.installed for engine in ENGINES.values()):
        raise InputError(
            "no engine is installed whose speed can be measured: pip install 'jaxprune[llama-cpp]' "
            "or 'jaxprune[torch]'",
            options={"eval": Change.OTHER},
        )


def measure_speed(
    models: Mapping[str, StreamedModel], against: str | None = None, observer: Observer = SILENT
) -> dict[str, dict[str, Speed]]:
    """Measures checkpoints in every engine that is installed.

    The checkpoints take turns, so that changes in the load of the machine meet all of them.

    Args:
        models: name -> checkpoint.
        against: name of the dense one, with which the others are compared; None: there is none.
        observer: is notified of progress.

    Returns:
        Checkpoint -> setting -> its speed. A setting that cannot hold a checkpoint is missing.

    Raises:
        InputError: an engine cannot run a checkpoint.
    """
    found: dict[str, dict[str, Speed]] = {name: {} for name in models}
    lengths = _lengths(models.values())
    for setting in SETTINGS:
        if not ENGINES[setting.engine].installed:
            continue
        with tempfile.TemporaryDirectory(prefix="jaxprune-speed-") as folder:
            places = dict(written(models, setting, Path(folder)))
            what = f"{setting}, {lengths[0]} prompt tokens and {lengths[1]} generated tokens"
            observer.started(f"speed in {what}", ROUNDS * len(places), unit="measurements")
            rounds: dict[str, list[Timing]] = {name: [] for name in places}
            for number in range(ROUNDS):
                for place, (name, file) in enumerate(places.items()):
                    rounds[name].append(_timed(setting, name, file, lengths))
                    observer.layer_visited(number * len(places) + place)
            for name, file in places.items():
                dense = rounds.get(against or "") if name != against else None
                found[name][str(setting)] = _speed(file, lengths, rounds[name], dense)
    return found


def _lengths(models: Iterable[StreamedModel]) -> tuple[int, int]:
    """Returns how many tokens are in the prompt, and how many are generated, so that they fit into
    the positions of all models."""
    limits = [limit for model in models if (limit := model.architecture.config.max_positions)]
    most = min([PROMPT + GENERATED, *limits])
    generated = min(GENERATED, most // 4)
    return min(PROMPT, most - generated), generated


def _holds(setting: Setting, reader: Reader) -> bool:
    """Returns whether a setting's format can hold a checkpoint."""
    try:
        require_suitable(setting.to, reader)
        if setting.to == "gguf":
            tensor_bytes(reader.spec, reader.assets, setting.type)
    except CheckpointError:  # llama.cpp does not support every model
        return False
    return True


def written(
    models: Mapping[str, StreamedModel], setting: Setting, folder: Path
) -> Iterator[tuple[str, Path]]:
    """Yields checkpoints and where they were written in a setting's format.

    Args:
        models: name -> checkpoint. One that the format cannot hold is left out.
        setting: the setting.
        folder: the folder, which is created.
    """
    folder.mkdir(exist_ok=True)
    for number, (name, model) in enumerate(models.items()):
        gguf = setting.to == "gguf"
        place = folder / f"{number}{'.gguf' if gguf else ''}"
        options = {"type": setting.type} if gguf else {}
        reader = model.reader if gguf else model.saved_as("bfloat16").reader
        if _holds(setting, reader):
            if not gguf:
                place.mkdir()
            with fill_checkpoint(
                place,
                reader.spec,
                reader.assets,
                to=setting.to,
                changes=config_changes(reader),
                options=options,
            ) as writer:
                for paths in parts(reader.spec).values():
                    writer.write(reader.read(paths))
            yield name, place


def _timed(setting: Setting, name: str, file: Path, lengths: tuple[int, int]) -> Timing:
    command = [sys.executable, "-m", engines.__name__, setting.engine, str(file)]
    command += map(str, lengths)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise InputError(f"{setting} cannot run {name}: {why[0]}", options={"eval": Change.OTHER})
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


def _speed(
    file: Path, lengths: tuple[int, int], rounds: list[Timing], dense: list[Timing] | None
) -> Speed:
    def ratio(field: str) -> float | None:
        if dense is None:
            return None
        pairs = zip(dense, rounds, strict=True)
        return statistics.median(getattr(one, field) / getattr(own, field) for one, own in pairs)

    files = file.glob("*.safetensors") if file.is_dir() else [file]
    return Speed(
        file_bytes=sum(one.stat().st_size for one in files),
        peak_bytes=max(one.peak_bytes for one in rounds),
        prompt=lengths[0] / statistics.median(one.prompt for one in rounds),
        generated=lengths[1] / statistics.median(one.generated for one in rounds),
        prompt_ratio=ratio("prompt"),
        generated_ratio=ratio("generated"),
    )
