"""The command line: flags -> config -> prune -> export -> evaluate."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from convert import Reader, create_checkpoint, open_checkpoint
from convert.assets import load_tokenizer
from convert.staging import check_free
from jaxprune import calibration, timing
from jaxprune.config import Config, parse
from jaxprune.console import choose_device, console, print_table, progress, run_main
from jaxprune.evaluation.quality import Evaluator, table
from jaxprune.masks import MaskWriter, create_masks
from jaxprune.models import model_for
from jaxprune.oneshot import prune_by_recipe
from jaxprune.pipeline import LayerResult, linear_shapes, other_params
from jaxprune.recipe import Recipe
from jaxprune.record import Record, layer_line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run_main(_main, argv)


def _main(argv: Sequence[str]) -> None:
    run(*parse(argv))


def run(config: Config, recipe: Recipe) -> Record:
    """Prunes, exports and evaluates; everything that can be checked is checked before the work starts.

    Raises:
        InputError, CheckpointError: something cannot be used.
    """
    begin = time.perf_counter()
    assert config.out and config.calib
    out = check_free(config.out, overwrite=config.overwrite)
    masks_out = check_free(config.save_masks, overwrite=config.overwrite, folder=False) if config.save_masks else None
    choose_device(config.device)
    console.print(f"opening {config.ckpt}")
    reader = open_checkpoint(config.ckpt)
    dtype = config.computation_dtype
    model = model_for(reader, dtype)
    what = ", ".join(filter(None, [f"{config.calib} to calibrate", config.eval_text, config.tasks]))
    console.print(f"preparing text: {what}")
    tokens = calibration_windows(config, reader)
    evaluator = Evaluator(config, reader)
    record = Record(config, recipe, tokens)
    record.spend("setup", time.perf_counter() - begin)
    if config.timing:
        with _timed(record, "timing"):
            record.timing = timing.jit_versus_eager(reader, tokens, recipe, dtype=dtype)
        header, rows = timing.table(record.timing)
        print_table(rows, header)

    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(create_checkpoint(out, reader.spec, reader.assets, overwrite=config.overwrite))
        masks: MaskWriter | None = None
        if masks_out:
            masks = stack.enter_context(create_masks(masks_out, linear_shapes(model), overwrite=config.overwrite))
        with progress() as bar:
            count = model.config.num_layers
            task = bar.add_task("pruning", total=count * recipe.tuning.rounds)

            def pruned(layer: LayerResult, final: bool) -> None:
                if final:
                    record.add(layer)
                bar.console.print(layer_line(layer, count))
                bar.advance(task)

            def tuned(epoch: int, divergence: float) -> None:
                bar.console.print(f"tuning, epoch {epoch + 1}: KL divergence {divergence:.4f} nats before its steps")

            layers = prune_by_recipe(
                reader, tokens, recipe, seed=config.seed, dtype=dtype, spend=record.spend, pruned=pruned, tuned=tuned
            )
            for layer in layers:
                with _timed(record, "write"):
                    writer.write(layer.params)
                    if masks:
                        masks.write(layer.index, layer.masks)
        with _timed(record, "write"):
            for paths in other_params(reader.spec):
                writer.write(reader.read(paths))
        record.save(writer.folder)
    with _timed(record, "evaluate") if config.measures else contextlib.nullcontext():
        for which, quality in evaluator.measure({"dense": reader, "pruned": open_checkpoint(out)}, against="dense"):
            record.evaluation[which] = quality
    record.seconds["total"] = time.perf_counter() - begin
    record.save(out)
    print_table([*record.summary(), ("result", os.path.relpath(out))])
    if config.measures:
        header, rows = table(record.evaluation)
        print_table(rows, header)
    return record


def calibration_windows(config: Config, reader: Reader) -> np.ndarray:
    """The windows that a run calibrates on, int32 [nsamples, seqlen]; errors as for `calibration.sample`."""
    assert config.calib
    tokenizer = None if config.calib.endswith(".npy") else load_tokenizer(reader.assets)
    return calibration.sample(config.calib, tokenizer, config.nsamples, config.seqlen, config.seed, pack=config.pack)


@contextlib.contextmanager
def _timed(record: Record, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    record.spend(phase, time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
