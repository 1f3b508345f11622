"""Prune a checkpoint, layer by layer, and measure what it cost."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from convert import Reader, Writer, fill_checkpoint, open_checkpoint
from convert.assets import load_tokenizer
from convert.checked import CheckedReader
from convert.hub import require_whole, resolve
from convert.ownership import Destination, destination, failing
from convert.paths import inputs_of, paths_of, require_apart
from jaxprune import calibration
from jaxprune import sharding as devices
from jaxprune.commands.config import Config, parse
from jaxprune.commands.terminal import choose_device, console, keep_memory, print_table, progress, run_main
from jaxprune.errors import InputError
from jaxprune.evaluation.quality import Evaluator, table
from jaxprune.models import model_for
from jaxprune.planning import preflight, timing
from jaxprune.pruning import identity, resume
from jaxprune.pruning.journal import Journal
from jaxprune.pruning.one_shot import prune_by_recipe
from jaxprune.pruning.pipeline import linear_shapes, other_params
from jaxprune.pruning.results import LayerResult
from jaxprune.recipe import Recipe
from jaxprune.reporting.record import Record, hardware, layer_line
from jaxprune.sparsity.masks import MaskWriter, source_of
from jaxprune.streaming import hidden_states as hidden


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
    require_separate(config, recipe)
    with hidden.kept_in(config.scratch_folder(config.out)):
        return _run(config, recipe)


def places(config: Config) -> tuple[Destination, Destination | None]:
    """Where the result of a run is to be, and its masks.

    Raises:
        CheckpointError: there are no such places.
    """
    assert config.out
    out = destination(config.out, "out", overwrite=config.overwrite)
    if config.save_masks is None:
        return out, None
    return out, destination(config.save_masks, "save_masks", overwrite=config.overwrite, folder=False)


def require_separate(config: Config, recipe: Recipe, source: Path | None = None) -> tuple[Path, ...]:
    """Makes sure that a run reads nothing of what it makes.

    Args:
        config: of the run.
        recipe: of the run.
        source: of the checkpoint, once it is known; else --ckpt, where that is a path.

    Returns:
        All that is read.

    Raises:
        InputError: it would.
    """
    out, masks = places(config)
    inputs = {name: paths_of(text) for name, text in {"calib": config.calib, "tasks_data": config.tasks_data}.items()}
    inputs["eval_text"] = [path for text in (config.eval_text or "").split(",") for path in paths_of(text)]
    inputs["mask"] = [given] if (given := source_of(recipe.mask or "")) else []
    inputs["ckpt"] = inputs_of(source) if source else paths_of(config.ckpt)
    outputs = {"out": out.path, "out.unfinished": resume.journal_folder(out.path)}
    if masks:
        outputs["save_masks"] = masks.path
    scratch = {"scratch": paths_of(config.scratch)}
    require_apart(inputs | scratch, outputs, error=InputError, around="scratch")
    return tuple(path for ones in inputs.values() for path in ones)


def _run(config: Config, recipe: Recipe) -> Record | None:
    begin = time.perf_counter()
    assert config.out and config.calib
    place, masks_place = places(config)
    bare = resume.check(place, masks_place)
    if recipe.importance.measured or recipe.tuning.tune_epochs:
        keep_memory(large=True)  # both make logits
    choose_device(config.device, config.devices, config.join)
    console.print(f"opening {config.ckpt}")
    source = resolve(config.ckpt)
    place.inputs = require_separate(config, recipe, source)
    if masks_place:
        masks_place.inputs = place.inputs
    reader = CheckedReader(open_checkpoint(source, check=False))
    dtype = config.computation_dtype
    model = model_for(reader, dtype)
    what = ", ".join(filter(None, [f"{config.calib} to calibrate", config.eval_text, config.tasks]))
    console.print(f"preparing text: {what}")
    tokens = calibration_windows(config, reader)
    evaluator = Evaluator(config, reader)
    record = Record(config, recipe, tokens)
    wanted = identity.of_run(reader, model, record.what_was_asked(), config.seed)
    record.spend("setup", time.perf_counter() - begin)
    if not config.unchecked:
        require_whole(reader.assets)
        evaluation = max((len(tokens) for tokens in evaluator.windows.values()), default=None)
        preflight.require_fit(reader.spec, model, config, recipe, evaluation)
    fault: Exception | None = None
    run = resume.run_of(wanted)
    masks_at = masks_place.path if masks_place else None
    if devices.agree(bare):
        if resume.by_first(lambda: resume.end_bare(place.path, run, masks_at)):
            console.print(f"{place.path} was finished already")
            return None
        place.check()
    with resume.open_journal(
        place.path,
        wanted,
        of_version_1=lambda: identity.of_version_1(reader, model, record.what_version_1_wrote(), config.seed),
        resume=config.resume,
    ) as journal:
        if resume.is_finished(journal, place.path, masks_at):
            resume.publish(journal, place, masks_place)
            console.print(f"{place.path} was finished already")
            return None
        weights = identity.KnownWeights(reader, journal)
        if config.timing:
            with _timed(record, "timing"):
                record.timing = timing.jit_versus_eager(reader, tokens, recipe, dtype=dtype)
            header, rows = timing.table(record.timing)
            print_table(rows, header)
        files = _export(config, record, reader, journal)
        keep_memory(large=True)  # logits from here on
        with _timed(record, "evaluate") if config.measures else contextlib.nullcontext():
            readers = {"dense": reader, "pruned": open_checkpoint(resume.result(journal))}
            for which, quality in evaluator.measure(readers, against="dense"):
                record.evaluation[which] = quality
        record.seconds["total"] = time.perf_counter() - begin
        weights.require_unchanged()
        if devices.is_first():
            names, fault = record.save(resume.result(journal))
            files |= names
        resume.finish(journal, files, run, masks_at)
        resume.publish(journal, place, masks_place)
    print_table([*record.summary(), ("result", os.path.relpath(place.path))])
    if config.measures:
        header, rows = table(record.evaluation)
        print_table(rows, header)
    if fault:
        raise fault
    return record


def _export(config: Config, record: Record, reader: Reader, journal: Journal) -> set[str]:
    """Prunes, and writes the checkpoint and the masks to where the journal wants them; the checkpoint's files."""
    recipe, dtype = record.recipe, config.computation_dtype
    model = model_for(reader, dtype)
    count = model.config.num_layers
    with contextlib.ExitStack() as stack:
        writer: Writer | None = None
        masks: MaskWriter | None = None
        if devices.is_first():
            folder = resume.result(journal)
            with failing(folder):
                folder.mkdir(parents=True)
            writer = stack.enter_context(fill_checkpoint(folder, reader.spec, reader.assets))
            if config.save_masks:
                masks = MaskWriter(resume.masks(journal), linear_shapes(model))
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
        if masks:
            masks.finish()
    devices.agree(None)  # the checkpoint is complete
    return writer.files if writer else set()


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
