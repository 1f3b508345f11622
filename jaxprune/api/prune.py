"""Prunes a checkpoint into a folder: checks, prunes, evaluates, records and publishes."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import DTypeLike, Int

from convert import (
    Reader,
    Writer,
    disk_bytes,
    fill_checkpoint,
    open_checkpoint,
    parameters,
    writing,
)
from convert.casting import saving_dtype
from convert.checkpoint import config_changes
from convert.destination import Destination, destination
from convert.gguf.writing import tensor_bytes
from convert.hub import require_whole
from convert.names import naming_in
from convert.packed import estimated_bytes
from convert.paths import inputs_of, paths_of, require_apart
from convert.schema import as_text
from convert.writing import failing
from jaxprune.calibration.text_stream import TextStream
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.errors import CheckpointError, InputError, UserError
from jaxprune.evaluation.quality import Evaluator, Quality
from jaxprune.loop import other_params
from jaxprune.phases import prune_model, require_recipe, require_stream
from jaxprune.planning import fit_check
from jaxprune.planning.jit_versus_eager import jit_versus_eager
from jaxprune.processes.collective import (
    barrier,
    broadcast,
    is_first_process,
    on_first_process,
    require_same,
)
from jaxprune.recipe import Recipe
from jaxprune.reporting import record as records
from jaxprune.reporting.model_card import model_card
from jaxprune.reporting.recording_observer import RecordingObserver, write_record
from jaxprune.run_store import identity, opening, publishing
from jaxprune.run_store.context import Context
from jaxprune.solve.layer_result import LayerResult, LayerSummary
from jaxprune.solve.rules import by_rules, effective_recipe
from jaxprune.sparsity.masks import MaskWriter, digest_of, source_of
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer, Observers
from jaxprune.structure.removal import remove
from jaxprune.structure.sizes import removals, smaller_architecture

GGUF_TYPES = ("f16", "q8_0", "q5_0", "q4_0")
"""Types of GGUF files that preserve zeros. The record has their sizes."""


@dataclasses.dataclass(frozen=True)
class PruningResult:
    """A pruned checkpoint.

    Attributes:
        folder: the folder of the checkpoint.
        record: the content of its jaxprune.json.
        evaluation: "dense" and "pruned" -> measurements; empty without an evaluation.
        repeated: whether the run was already finished, and the call did nothing.
    """

    folder: Path
    record: records.Run
    evaluation: Mapping[str, Quality] = dataclasses.field(default_factory=dict)
    repeated: bool = False

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all pruned kernels."""
        return self.record.sparsity

    @property
    def layers(self) -> Sequence[LayerSummary]:
        """Results by layer; `layers[3]["mlp.down_proj"].error` is a kernel's relative error."""
        return self.record.layers


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a run besides the recipe.

    Attributes:
        masks: a file to create with the masks; None: no file.
        stream: the text to tune on, if the recipe tunes on a stream.
        seed: seed for the order of calibration windows in the distillation.
        save_dtype: the dtype of the result's weights: float16, bfloat16 or float32; None: that of
            the checkpoint, float16 for a quantized GGUF file.
        evaluator: measures the dense and the pruned checkpoint; None: no evaluation.
        timing: also prune the first layer twice, compiled and under `jax.disable_jit`, and record
            the seconds of both.
        overwrite: replace `out` and `masks` if they are unchanged earlier results.
        resume_only: fail unless there is a stopped run to resume.
        unchecked: start even if the run would not fit, and without comparing the weights with the
            hub's digests.
        config: options as text and numbers, for the record; None: the names of checkpoint and
            folder.
        inputs: option -> further paths that are read. Neither `out` nor `masks` may be there.
        begun: `time.perf_counter()` at the start of the caller's work; None: now.
    """

    masks: str | Path | Destination | None = None
    stream: TextStream | None = None
    seed: int = 0
    save_dtype: DTypeLike | None = None
    evaluator: Evaluator | None = None
    timing: bool = False
    overwrite: bool = False
    resume_only: bool = False
    unchecked: bool = False
    config: Mapping[str, Any] | None = None
    inputs: Mapping[str, Iterable[Path]] = dataclasses.field(default_factory=dict)
    begun: float | None = None


def prune(
    model: StreamedModel,
    windows: Int[np.ndarray, "w t"],
    recipe: Recipe,
    out: str | Path | Destination,
    options: RunOptions = RunOptions(),
    observer: Observer = SILENT,
) -> PruningResult | None:
    """Prunes a checkpoint into a folder in Hugging Face's format.

    The folder also has a record, a model card and a report. Progress is saved in `OUT.unfinished`.
    The same call resumes a stopped run, with byte-identical results.

    Args:
        model: the dense model, from `load`.
        windows: calibration windows, [windows, length] token ids.
        recipe: how to prune.
        out: the folder to create.
        options: options of the run.
        observer: is notified of progress.

    Returns:
        The result; None if an earlier process finished the run and only removal of its files was
        left.

    Raises:
        InputError, CheckpointError: an argument, checkpoint or folder cannot be used. Existing
            files are unchanged.
    """
    begun = time.perf_counter() if options.begun is None else options.begun
    run = _checked(model, windows, recipe, out, options)
    emptied = opening.require_free(run.place, run.masks)
    require_same(lambda: {**run.identity, "weights": identity.sample(model.reader)})
    observer = Observers(run.recorder, observer)
    observer.phase_timed("setup", time.perf_counter() - begun)
    if not options.unchecked:
        require_whole(model.reader.files)
        observer.planned(fit_check.require_fit(run.sizes()))
    folder, masks_at = run.place.path, run.masks_at
    if broadcast(emptied):
        if on_first_process(lambda: opening.remove_finished(folder, run.identity, masks_at)):
            return _finished(folder)
        run.place.check()
    with opening.open_store(folder, run.identity, masks_at, resume=options.resume_only) as store:
        if store.to_publish:
            publishing.publish(store, run.place, run.masks)
            return _finished(folder)
        weights = identity.SavedDigests(identity.checked(model.reader), store)
        context = Context(store, observer)
        files, packed = run.prune(context)
        run.evaluate(context)
        run.recorder.record.seconds["total"] = time.perf_counter() - begun
        run.measure_sizes(open_checkpoint(store.result, check=False), packed)
        weights.require_unchanged()
        require_same(lambda: {"weights": dict(weights.reader.digests)})
        made, names, fault = _describe(run.recorder, store.result)
        publishing.finish(store, files | names, masks=masks_at is not None)
        publishing.publish(store, run.place, run.masks)
    result = PruningResult(folder, made, made.evaluation)
    observer.finished(result)
    if fault:
        raise fault
    return result


def _describe(
    recorder: RecordingObserver, folder: Path
) -> tuple[records.Run, set[str], Exception | None]:
    """Writes the record, the model card and the report into the result.

    Returns:
        The record, the names of the files, and the error if the report could not be drawn.
    """
    run = recorder.run()
    if not is_first_process():
        return run, set(), None
    writing.write_text(folder / "README.md", as_text(model_card(run)))
    names, fault = write_record(folder, run, run.evaluation)
    return run, names | {"README.md"}, fault


def _finished(folder: Path) -> PruningResult | None:
    run = records.run_of(folder)
    return PruningResult(folder, run, repeated=True) if run else None


@dataclasses.dataclass(frozen=True)
class _Run:
    """A validated run, before any of its work.

    Attributes:
        model, windows, recipe, options: as for `prune`.
        place, masks: where the result and the masks are written; None: no masks.
        saved: the model with weights in the dtype of the result.
        recorder: the observer whose record becomes jaxprune.json.
        identity: everything that decides the outcome.
    """

    model: StreamedModel
    windows: Int[np.ndarray, "w t"]
    recipe: Recipe
    options: RunOptions
    place: Destination
    masks: Destination | None
    saved: StreamedModel
    recorder: RecordingObserver
    identity: Mapping[str, Any]

    def sizes(self) -> RunSizes:
        """Returns what decides whether the run fits this machine."""
        model, evaluator = self.model, self.options.evaluator
        architecture = model.architecture
        if architecture.config.routing:
            architecture = architecture.routed(mesh=None)
        removed = removals(architecture, model.reader.assets, self.recipe.structure)
        left = removed[-1].after if removed else architecture
        return RunSizes(
            spec=model.reader.spec,
            saved=self.saved.reader.spec,
            architecture=architecture,
            removals=removed,
            recipe=effective_recipe(left, self.recipe),
            windows=len(self.windows),
            length=self.windows.shape[1],
            texts=[one.shape for one in evaluator.windows.values()] if evaluator else [],
            out=self.place.path,
            scratch=model.scratch,
            devices=model.devices,
        )

    @property
    def masks_at(self) -> Path | None:
        return self.masks.path if self.masks else None

    def prune(self, context: Context) -> tuple[set[str], int]:
        """Writes the pruned checkpoint into the store; returns as `_write_checkpoint`."""
        record, saved = self.recorder.record, self.saved
        saved, record.removed = remove(saved, self.windows, self.recipe.structure, context)
        if self.options.timing:
            with context.timed("timing"):
                record.timing = jit_versus_eager(saved, self.windows, self.recipe)
        stream, seed = self.options.stream, self.options.seed
        layers = prune_model(
            saved, self.windows, self.recipe, stream=stream, seed=seed, context=context
        )
        return _write_checkpoint(saved, layers, self.recipe, context, masks=self.masks is not None)

    def evaluate(self, context: Context) -> None:
        """Evaluates the dense and the pruned checkpoint, if requested."""
        if evaluator := self.options.evaluator:
            assert context.store
            with context.timed("evaluate"), _continued_otherwise():
                pruned = self.model.sibling(context.store.result, f"pruned {self.model.short_name}")
                models = {"dense": self.model, "pruned": pruned}
                for which, quality in evaluator.measure(models, against="dense"):
                    self.recorder.record.evaluation[which] = quality

    def measure_sizes(self, result: Reader, packed: int) -> None:
        """Records the sizes of the checkpoints.

        Args:
            result: the pruned checkpoint.
            packed: approximate bytes of its params in packed form.
        """
        record, made_of = self.recorder.record, {"dense": self.model.reader, "pruned": result}
        record.disk_bytes = {which: disk_bytes(reader) for which, reader in made_of.items()}
        record.parameters = {which: parameters(reader.spec) for which, reader in made_of.items()}
        record.converted_bytes = _converted_bytes(result, packed)


def _checked(
    model: StreamedModel,
    windows: Int[np.ndarray, "w t"],
    recipe: Recipe,
    out: str | Path | Destination,
    options: RunOptions,
) -> _Run:
    """Returns a run after checks of model, windows, recipe and paths; raises as `prune`."""
    reader = identity.checked(model.reader)
    place, masks = places(out, options.masks, overwrite=options.overwrite)
    inputs = {"ckpt": inputs_of(model.source), **options.inputs}
    read = require_separate(place, masks, recipe, inputs, model.scratch)
    place = dataclasses.replace(place, inputs=read)
    masks = masks and dataclasses.replace(masks, inputs=read)
    require_stream(recipe, options.stream)
    asked = {"ckpt": model.name, "calib": "token ids", "out": str(place.path)}
    config = asked | {"seed": options.seed} | dict(options.config or {})
    model.require_tokens(windows)
    dtype = saving_dtype(reader, options.save_dtype)
    left = smaller_architecture(model.architecture, reader.assets, recipe.structure)
    require_recipe(left, recipe)
    recorder = RecordingObserver(config, recipe, windows, options.stream, dtype and dtype.name)
    given = {"masks": {"sha256": digest_of(recipe.mask)}} if recipe.mask else {}
    stored = {} if dtype is None else {"save_dtype": dtype.name}
    wanted = identity.of_run(
        reader, model.hf_config, model.dtype, recorder.asked() | given | stored, options.seed
    )
    saved = model if dtype is None else model.saved_as(dtype)
    return _Run(
        model=model,
        windows=windows,
        recipe=recipe,
        options=options,
        place=place,
        masks=masks,
        saved=saved,
        recorder=recorder,
        identity=wanted,
    )


def places(
    out: str | Path | Destination,
    masks: str | Path | Destination | None,
    *,
    overwrite: bool = False,
) -> tuple[Destination, Destination | None]:
    """Returns where the result of a run and its masks are written.

    Raises:
        CheckpointError: the folder or the file cannot be created there.
    """
    place = destination(out, "out", overwrite=overwrite)
    return place, masks and destination(
        masks, "save_masks", overwrite=overwrite, folder=False
    ) or None


def require_separate(
    out: Destination,
    masks: Destination | None,
    recipe: Recipe,
    inputs: Mapping[str, Iterable[Path]],
    scratch: str | Path | None = None,
) -> tuple[Path, ...]:
    """Checks that a run reads none of its outputs.

    Args:
        out: the folder of the result.
        masks: the file of the masks.
        recipe: the recipe of the run.
        inputs: option -> paths that are read.
        scratch: the folder of hidden states.

    Returns:
        All paths that are read.

    Raises:
        InputError: an input and an output overlap.
    """
    read = {name: list(paths) for name, paths in inputs.items()}
    read["mask"] = [given] if (given := source_of(recipe.mask or "")) else []
    outputs = {"out": out.path, "out.unfinished": opening.store_folder(out.path)}
    if masks:
        outputs["save_masks"] = masks.path
    apart = read | {"scratch": paths_of(str(scratch)) if scratch else []}
    require_apart(apart, outputs, error=InputError, around="scratch")
    return tuple(path for paths in read.values() for path in paths)


def _write_checkpoint(
    model: StreamedModel,
    layers: Iterator[LayerResult],
    recipe: Recipe,
    context: Context,
    *,
    masks: bool,
) -> tuple[set[str], int]:
    """Writes checkpoint and masks into the run store.

    Returns:
        The checkpoint's files, and the approximate bytes of its params in packed form.
    """
    store, packed = context.store, 0
    assert store
    writer: Writer | None = None
    mask_writer: MaskWriter | None = None
    with contextlib.ExitStack() as stack:
        if is_first_process():
            folder = store.result
            with failing(folder):
                folder.mkdir(parents=True)
            writer = stack.enter_context(
                fill_checkpoint(
                    folder,
                    model.reader.spec,
                    model.reader.assets,
                    changes=config_changes(model.reader),
                )
            )
            if masks:
                mask_writer = MaskWriter(
                    store.masks,
                    _pruned_shapes(model, recipe),
                    naming_in(model.hf_config, model.reader.spec),
                )
        context.observer.started("pruning", model.num_layers)
        for layer in layers:
            with context.timed("write"):
                if writer:
                    writer.write(layer.params)
                    packed += estimated_bytes(layer.params)
                if mask_writer:
                    mask_writer.write(layer.index, layer.masks)
        if writer:
            with context.timed("write"):
                for paths in other_params(model.reader.spec):
                    params = model.reader.read(paths)
                    writer.write(params)
                    packed += estimated_bytes(params)
        if mask_writer:
            mask_writer.finish()
    barrier()  # the checkpoint is complete
    return writer.files if writer else set(), packed


def _converted_bytes(reader: Reader, packed: int) -> dict[str, int]:
    """Returns a pruned checkpoint's sizes in other formats; see `Run.converted_bytes`."""
    stored = sum(tensor.size * tensor.dtype.itemsize for tensor in reader.spec.values())
    sizes = {"packed": packed} if packed < stored else {}
    with contextlib.suppress(CheckpointError):  # llama.cpp does not support every model
        sizes |= {kind: tensor_bytes(reader.spec, reader.assets, kind) for kind in GGUF_TYPES}
    return sizes


def _pruned_shapes(model: StreamedModel, recipe: Recipe) -> dict[tuple[int, str], tuple[int, ...]]:
    """Returns (layer index, path) -> shape, for kernels that do not stay dense."""
    named = by_rules(model.architecture, recipe.rules)
    shapes = model.architecture.kernel_shapes(routers=True).items()
    return {
        which: shape for which, shape in shapes if which not in named or named[which] is not None
    }


@contextlib.contextmanager
def _continued_otherwise() -> Iterator[None]:
    """Adds to errors of the evaluation how to continue with the finished checkpoint.

    The evaluation's options are not part of the run's identity, so they can change.
    """
    try:
        yield
    except UserError as error:
        error.again = error.again or "with other options of the evaluation, or without it,"
        raise
