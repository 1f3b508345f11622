"""The command line: flags -> config -> prune -> export -> evaluate."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from convert import Reader, Writer, create_checkpoint, open_checkpoint
from convert.assets import load_tokenizer
from convert.hub import require_whole
from convert.staging import check_free
from jaxprune import calibration, devices, hidden, preflight, resume, timing
from jaxprune.config import Config, parse
from jaxprune.console import choose_device, console, keep_memory, print_table, progress, run_main
from jaxprune.evaluation.quality import Evaluator, table
from jaxprune.journal import Journal
from jaxprune.masks import MaskWriter, create_masks
from jaxprune.models import model_for
from jaxprune.oneshot import prune_by_recipe
from jaxprune.pipeline import linear_shapes, other_params
from jaxprune.recipe import Recipe
from jaxprune.record import Record, hardware, layer_line
from jaxprune.results import LayerResult


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_main(_main, argv)


def _main(argv: Sequence[str]) -> int:
    config, recipe = parse(argv)
    if config.dry_run:
        return dry_run(config, recipe)
    run(config, recipe)
    return 0


def dry_run(config: Config, recipe: Recipe) -> int:
    """Prints what a run would need; the exit status is 1 where it does not fit.

    Raises:
        InputError, CheckpointError: something cannot be used.
    """
    choose_device(config.device, config.devices, config.join)
    spec, model = preflight.shapes(config)
    need = preflight.need(spec, model, config, recipe)
    header, rows = preflight.table(need, config)
    print_table(rows, header)
    disk = ", ".join(f"{what} {size / preflight.GIB:.2f}" for what, size in need.disk.items() if size)
    console.print(f"disk, GiB, at most: {disk}; kept in the end: {need.kept / preflight.GIB:.2f}")
    if config.hidden == "disk":
        console.print(f"scratch, GiB, at most: {max(need.scratch.values()) / preflight.GIB:.2f}")
    if config.device_memory is None:
        console.print(f"time: from the matrix rate of {hardware()}, measured now")
    problems = list(preflight.shortages(need, config))
    for problem in problems:
        console.print(f"does not fit: {problem}")
    if not problems:
        console.print("it fits")
    return int(bool(problems))


def run(config: Config, recipe: Recipe) -> Record | None:
    """Prunes, exports and evaluates; everything that can be checked is checked before the work starts.

    Returns:
        The account of the run; None where an earlier process of the run had only to be tidied up after.

    Raises:
        InputError, CheckpointError: something cannot be used.
    """
    assert config.out
    with hidden.kept_in(config.scratch_folder(config.out)):
        return _run(config, recipe)


def _run(config: Config, recipe: Recipe) -> Record | None:
    begin = time.perf_counter()
    assert config.out and config.calib
    moving = resume.finishing(Path(config.out).expanduser().absolute())
    overwrite = config.overwrite or moving
    out = check_free(config.out, overwrite=overwrite)
    masks_out = check_free(config.save_masks, overwrite=overwrite, folder=False) if config.save_masks else None
    if recipe.importance.measured or recipe.tuning.tune_epochs:
        keep_memory(large=True)  # both make logits
    choose_device(config.device, config.devices, config.join)
    console.print(f"opening {config.ckpt}")
    reader = open_checkpoint(config.ckpt)
    dtype = config.computation_dtype
    model = model_for(reader, dtype)
    what = ", ".join(filter(None, [f"{config.calib} to calibrate", config.eval_text, config.tasks]))
    console.print(f"preparing text: {what}")
    tokens = calibration_windows(config, reader)
    evaluator = Evaluator(config, reader)
    record = Record(config, recipe, tokens)
    identity = {
        "checkpoint": resume.fingerprint(reader),
        "computation": np.dtype(model.config.dtype).name,
        "seed": config.seed,
    } | record.what_was_asked()
    record.spend("setup", time.perf_counter() - begin)
    if not config.unchecked:
        require_whole(reader.assets)
        evaluation = max((len(tokens) for tokens in evaluator.windows.values()), default=None)
        preflight.require_fit(reader.spec, model, config, recipe, evaluation)
    with resume.open_journal(out, identity, resume=config.resume) as journal:
        if devices.agree(moving and out.exists() and not resume.result(journal).exists()):
            resume.remove(journal)
            console.print(f"{out} was finished already")
            return None
        if config.timing:
            with _timed(record, "timing"):
                record.timing = timing.jit_versus_eager(reader, tokens, recipe, dtype=dtype)
            header, rows = timing.table(record.timing)
            print_table(rows, header)
        with contextlib.ExitStack() as stack:
            masks: MaskWriter | None = None
            if masks_out and devices.is_first():
                masks = stack.enter_context(create_masks(masks_out, linear_shapes(model), overwrite=overwrite))
            _export(config, record, reader, journal, masks)
            keep_memory(large=True)  # logits from here on
            with _timed(record, "evaluate") if config.measures else contextlib.nullcontext():
                readers = {"dense": reader, "pruned": open_checkpoint(resume.result(journal))}
                for which, quality in evaluator.measure(readers, against="dense"):
                    record.evaluation[which] = quality
            record.seconds["total"] = time.perf_counter() - begin
            if devices.is_first():
                record.save(resume.result(journal))
            resume.finish(journal)
        resume.publish(journal, out)
    print_table([*record.summary(), ("result", os.path.relpath(out))])
    if config.measures:
        header, rows = table(record.evaluation)
        print_table(rows, header)
    return record


def _export(config: Config, record: Record, reader: Reader, journal: Journal, masks: MaskWriter | None) -> None:
    """Prunes, and writes the checkpoint to where the journal wants it."""
    recipe, dtype = record.recipe, config.computation_dtype
    count = model_for(reader, dtype).config.num_layers
    with contextlib.ExitStack() as stack:
        writer: Writer | None = None
        if devices.is_first():
            writer = stack.enter_context(create_checkpoint(resume.result(journal), reader.spec, reader.assets))
        with progress() as bar:
            task = bar.add_task("pruning", total=count)

            def pruned(layer: LayerResult) -> None:
                record.add(layer)
                bar.console.print(layer_line(layer, count))
                bar.update(task, completed=layer.index + 1)

            def tuned(epoch: int, divergence: float) -> None:
                bar.console.print(f"tuning, epoch {epoch + 1}: KL divergence {divergence:.4f} nats before its steps")

            layers = prune_by_recipe(
                reader,
                record.tokens,
                recipe,
                seed=config.seed,
                dtype=dtype,
                journal=journal,
                spend=record.spend,
                pruned=pruned,
                tuned=tuned,
            )
            for layer in layers:
                with _timed(record, "write"):
                    if writer:
                        writer.write(layer.params)
                    if masks:
                        masks.write(layer.index, layer.masks)
        if writer:
            with _timed(record, "write"):
                for paths in other_params(reader.spec):
                    writer.write(reader.read(paths))
    devices.agree(None)  # the checkpoint is complete


def calibration_windows(config: Config, reader: Reader) -> np.ndarray:
    """The windows that a run calibrates on, int32 [nsamples, seqlen]; errors as for `calibration.sample`."""
    assert config.calib
    tokenizer = None if config.calib.endswith(".npy") else load_tokenizer(reader.assets)
    return calibration.sample(
        config.calib,
        tokenizer,
        config.nsamples,
        config.seqlen,
        config.seed,
        pack=config.pack,
        vocab_size=model_for(reader).config.vocab_size,
    )


@contextlib.contextmanager
def _timed(record: Record, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    record.spend(phase, time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
