"""The command line: flags -> config -> prune -> export -> evaluate."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from convert import CheckpointError, Params, Reader, create_checkpoint, open_checkpoint
from convert.assets import load_tokenizer
from convert.staging import check_free
from jaxprune import calibration
from jaxprune.config import Config, parse
from jaxprune.errors import InputError
from jaxprune.evaluation.perplexity import perplexity
from jaxprune.masks import MaskWriter, create_masks
from jaxprune.models import model_for
from jaxprune.pipeline import linear_shapes, other_params, prune
from jaxprune.recipe import Recipe
from jaxprune.report import Record, layer_line

console = Console(highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    _quiet_libraries()
    try:
        config, recipe = parse(sys.argv[1:] if argv is None else argv)
        if config.device != "auto":
            jax.config.update("jax_platforms", {"gpu": "cuda"}.get(config.device, config.device))
        run(config, recipe)
    except (InputError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def run(config: Config, recipe: Recipe) -> Record:
    """Prunes, exports and evaluates; everything that can be checked is checked before the work starts.

    Raises:
        InputError, CheckpointError: something cannot be used.
    """
    begin = time.perf_counter()
    assert config.out and config.calib and config.eval_text
    out = check_free(config.out, overwrite=config.overwrite)
    masks_out = check_free(config.save_masks, overwrite=config.overwrite, folder=False) if config.save_masks else None
    _require_device(config)
    console.print(f"opening {config.ckpt}")
    reader = open_checkpoint(config.ckpt)
    dtype = None if config.dtype == "auto" else np.dtype(config.dtype)
    model = model_for(reader, dtype)
    pattern = recipe.patterns()
    console.print(f"preparing text: {config.calib} to calibrate, {config.eval_text} to evaluate")
    tokens, evaluation = _texts(config, reader)
    record = Record(config, recipe, tokens, evaluation=(0, 0) if evaluation is None else evaluation.shape)
    layers = prune(reader, tokens, recipe.method, pattern, dtype=dtype)
    record.spend("setup", time.perf_counter() - begin)

    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(create_checkpoint(out, reader.spec, reader.assets, overwrite=config.overwrite))
        masks: MaskWriter | None = None
        if masks_out:
            masks = stack.enter_context(create_masks(masks_out, linear_shapes(model), overwrite=config.overwrite))
        if evaluation is not None:
            _evaluate(record, "dense", reader, evaluation, dtype)
        with _progress() as progress:
            count = model.config.num_layers
            task = progress.add_task("pruning", total=count)
            for layer in layers:
                with _timed(record, "write"):
                    writer.write(layer.params)
                    if masks:
                        masks.write(layer.index, layer.masks)
                record.add(layer)
                progress.console.print(layer_line(layer, count))
                progress.advance(task)
        with _timed(record, "write"):
            for paths in other_params(reader.spec):
                writer.write(reader.read(paths))
        record.save(writer.folder)
    if evaluation is not None:
        _evaluate(record, "pruned", open_checkpoint(out), evaluation, dtype)
    record.seconds["total"] = time.perf_counter() - begin
    record.save(out)
    _print_table(record, out)
    return record


def _texts(config: Config, reader: Reader) -> tuple[np.ndarray, np.ndarray | None]:
    """Calibration and evaluation windows."""
    assert config.calib and config.eval_text and config.eval_seqlen
    needs_tokenizer = any(not t.endswith(".npy") and t != "none" for t in (config.calib, config.eval_text))
    tokenizer = load_tokenizer(reader.assets) if needs_tokenizer else None
    tokens = calibration.sample(config.calib, tokenizer, config.nsamples, config.seqlen, config.seed, pack=config.pack)
    if config.eval_text == "none":
        return tokens, None
    return tokens, calibration.evaluation_windows(config.eval_text, tokenizer, config.eval_seqlen, config.eval_windows)


def _evaluate(record: Record, which: str, reader: Reader, tokens: np.ndarray, dtype: np.dtype | None) -> None:
    with _progress() as progress, _timed(record, f"evaluate {which}"):

        def track(layers: Iterator[Params], count: int) -> Iterable[Params]:
            return progress.track(layers, total=count, description=f"perplexity, {which}")

        record.perplexity[which] = perplexity(reader, tokens, dtype=dtype, track=track)
    console.print(f"perplexity, {which}: {record.perplexity[which]:.7g}")


def _require_device(config: Config) -> None:
    """Raises InputError where JAX has no device of the wanted kind."""
    try:
        jax.devices()
    except RuntimeError as error:
        raise InputError(
            f"JAX finds no {config.device} ({str(error).splitlines()[0]}): install jaxprune[cuda] or jaxprune[tpu], or "
            "pass --device cpu"
        ) from error


@contextlib.contextmanager
def _timed(record: Record, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    record.spend(phase, time.perf_counter() - start)


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("layers")
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)


def _print_table(record: Record, out: Path) -> None:
    table = Table(show_header=False)
    for row in record.summary():
        table.add_row(*row)
    table.add_row("result", os.path.relpath(out))
    console.print(table)


def _quiet_libraries() -> None:
    """Keeps other libraries' advice and progress bars out of the run's own output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("absl", "huggingface_hub"):  # the hub's retries end in an error of ours
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
