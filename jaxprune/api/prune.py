"""A checkpoint pruned into a folder: all is checked, pruned, measured, recorded and put in its
place."""

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
from convert.destination import Destination, destination
from convert.gguf.writing import tensor_bytes
from convert.hub import require_whole
from convert.names import naming_in
from convert.packed import estimated_bytes
from convert.paths import inputs_of, paths_of, require_apart
from convert.schema import as_text
from convert.writing import failing
from jaxprune.calibration.text_stream import TextStream
from jaxprune.errors import CheckpointError, InputError, UserError
from jaxprune.evaluation.quality import Evaluator, Quality
from jaxprune.loop import other_params
from jaxprune.phases import prune_model, require_recipe, require_stream
from jaxprune.planning import fit
from jaxprune.planning.timing import jit_versus_eager
from jaxprune.planning.work import Work
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
from jaxprune.solve.expert_removal import kept_experts, without_experts
from jaxprune.solve.layer_result import LayerResult, LayerSummary
from jaxprune.solve.targets import by_rules, effective_recipe
from jaxprune.sparsity.masks import MaskWriter, digest_of, source_of
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer, Observers

GGUF_TYPES = ("f16", "q8_0", "q5_0", "q4_0")
"""The types of GGUF files that keep zeros, whose sizes a record has."""


@dataclasses.dataclass(frozen=True)
class PruningResult:
    """A pruned checkpoint.

    Attributes:
        folder: the folder of the checkpoint.
        record: the content of its jaxprune.json.
        evaluation: "dense" and "pruned" -> what was measured; empty where nothing was.
        repeated: whether it was finished already, so that nothing was done.
    """

    folder: Path
    record: records.Run
    evaluation: Mapping[str, Quality] = dataclasses.field(default_factory=dict)
    repeated: bool = False

    @property
    def sparsity(self) -> float:
        """Zeros of all pruned kernels over their weights."""
        return self.record.sparsity

    @property
    def layers(self) -> Sequence[LayerSummary]:
        """The results of the layers; `layers[3]["mlp.down_proj"].error` is a kernel's relative
        error."""
        return self.record.layers


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a checkpoint is pruned into a folder, beside what is done to it.

    Attributes:
        masks: a file to make with the masks; None: none is made.
        stream: the text that is tuned on, where the recipe takes tokens of one.
        seed: the seed of the order of calibration windows in the distillation.
        save_dtype: the dtype that the weights of the result are stored in, float16, bfloat16 or
            float32; None: as the checkpoint stores them, float16 for a quantized GGUF file.
        evaluator: measures the dense and the pruned checkpoint; None: nothing is measured.
        timing: first prune the first layer compiled and under `jax.disable_jit`, and record the
            seconds of both.
        overwrite: replace `out` and `masks` if they are earlier results that nobody changed.
        resume_only: insist on going on with a run that was stopped.
        unchecked: begin even where the run would not fit, and without comparing weights of the hub
            with their digests.
        config: what was asked for, texts and numbers for the record; None: names of the checkpoint
            and of the folder.
        inputs: what else is read, by the name of its option: neither `out` nor `masks` may lie
            there.
        begun: `time.perf_counter()` when the work began that led here; None: now.
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
    """Prunes a checkpoint into a folder, in Hugging Face's format, with a record, a model card and
    a report.

    What is finished is saved in `OUT.unfinished` until the end: the same call goes on with a run
    that was stopped, and ends in the same bytes.

    Args:
        model: the dense model, from `load`.
        windows: calibration windows, [windows, length] token ids.
        recipe: what to do.
        out: the folder to make.
        options: how.
        observer: is told what happens.

    Returns:
        The result; None where an earlier process of the run had only to be tidied up after.

    Raises:
        InputError, CheckpointError: something cannot be used; nothing that was there before has
            changed.
    """
    begun = time.perf_counter() if options.begun is None else options.begun
    run = _checked(model, windows, recipe, out, options)
    emptied = opening.require_free(run.place, run.masks)
    require_same(lambda: {**run.identity, "weights": identity.sample(model.reader)})
    observer = Observers(run.recorder, observer)
    observer.phase_timed("setup", time.perf_counter() - begun)
    if not options.unchecked:
        require_whole(model.reader.files)
        observer.planned(fit.require_fit(run.work()))
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
        The record, the names of the files, and what kept the report from being drawn.
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
    """A run whose parts are known to fit together, before any of its work.

    Attributes:
        model, windows, recipe, options: as for `prune`.
        place, masks: where the result and the masks are to be; None: no masks.
        saved: the model as its weights are to be stored.
        recorder: the observer whose record becomes jaxprune.json.
        identity: all that decides the outcome.
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

    def work(self) -> Work:
        """Returns what has to fit this machine."""
        model, evaluator = self.model, self.options.evaluator
        architecture = model.architecture
        left = without_experts(architecture, self.recipe.experts.drop_experts)
        if architecture.config.routing:
            architecture = architecture.routed(mesh=None)
        return Work(
            spec=model.reader.spec,
            saved=self.saved.reader.spec,
            architecture=architecture,
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
        if share := self.recipe.experts.drop_experts:
            with context.timed("experts"):
                kept = kept_experts(self.model, self.windows, share, context.store)
                record.kept_experts = {str(index): experts for index, experts in kept.items()}
                saved = saved.keeping(kept)
        if self.options.timing:
            with context.timed("timing"):
                record.timing = jit_versus_eager(saved, self.windows, self.recipe)
        stream, seed = self.options.stream, self.options.seed
        layers = prune_model(
            saved, self.windows, self.recipe, stream=stream, seed=seed, context=context
        )
        return _write_checkpoint(saved, layers, self.recipe, context, masks=self.masks is not None)

    def evaluate(self, context: Context) -> None:
        """Measures the dense and the pruned checkpoint, where that is asked for."""
        if evaluator := self.options.evaluator:
            assert context.store
            with context.timed("evaluate"), _continued_otherwise():
                pruned = self.model.sibling(context.store.result, f"pruned {self.model.short_name}")
                models = {"dense": self.model, "pruned": pruned}
                for which, quality in evaluator.measure(models, against="dense"):
                    self.recorder.record.evaluation[which] = quality

    def measure_sizes(self, result: Reader, packed: int) -> None:
        """Records what the checkpoints take.

        Args:
            result: the pruned one.
            packed: about how many bytes its params would take packed.
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
    """Returns a run, once model, windows, recipe and places fit together; errors as for `prune`."""
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
    require_recipe(without_experts(model.architecture, recipe.experts.drop_experts), recipe)
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
    """Returns where the result of a run is to be, and its masks.

    Raises:
        CheckpointError: there are no such places.
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
    """Makes sure that a run reads nothing of what it makes.

    Args:
        out: where the result is to be.
        masks: where the masks are to be.
        recipe: the recipe of the run.
        inputs: option -> what is read for it.
        scratch: the folder of hidden states.

    Returns:
        All that is read.

    Raises:
        InputError: it would.
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
    """Writes checkpoint and masks to where the run store has them; returns the checkpoint's files,
    and about how many bytes its params would take packed."""
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
                    folder, model.reader.spec, model.reader.assets, changes=model.changes
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
    """Returns what a pruned checkpoint takes in other formats: `Run.converted_bytes`."""
    stored = sum(tensor.size * tensor.dtype.itemsize for tensor in reader.spec.values())
    sizes = {"packed": packed} if packed < stored else {}
    with contextlib.suppress(CheckpointError):  # llama.cpp does not have every model
        sizes |= {kind: tensor_bytes(reader.spec, reader.assets, kind) for kind in GGUF_TYPES}
    return sizes


def _pruned_shapes(model: StreamedModel, recipe: Recipe) -> dict[tuple[int, str], tuple[int, ...]]:
    """Returns (layer index, path) -> shape of the kernels that do not stay dense."""
    named = by_rules(model.architecture, recipe.rules)
    shapes = model.architecture.kernel_shapes(routers=True).items()
    return {
        which: shape for which, shape in shapes if which not in named or named[which] is not None
    }


@contextlib.contextmanager
def _continued_otherwise() -> Iterator[None]:
    """Lets errors of the evaluation say how to use the checkpoint that is finished: its options are
    not the run's."""
    try:
        yield
    except UserError as error:
        error.again = error.again or "with other options of the evaluation, or without it,"
        raise
