"""A checkpoint pruned into a folder: all is checked, pruned, measured, recorded and put in its
place."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import DTypeLike, Int

from convert import (
    Reader,
    Spec,
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
from convert.schema import as_text, check, plain
from convert.writing import failing
from jaxprune.calibration.stream import TextStream
from jaxprune.errors import CheckpointError, InputError, UserError
from jaxprune.evaluation.quality import Evaluator, Quality
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
from jaxprune.pruning import identity, opening, publishing
from jaxprune.pruning.experts import kept_experts, without_experts
from jaxprune.pruning.loop import other_params
from jaxprune.pruning.results import LayerResult
from jaxprune.pruning.rules import by_rules, effective_recipe
from jaxprune.pruning.store import RunStore
from jaxprune.pruning.whole_model import prune_model, require_recipe, require_stream
from jaxprune.recipe import Recipe
from jaxprune.reporting import reading, schema
from jaxprune.reporting.card import model_card
from jaxprune.reporting.record import Record, write_record
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
    record: schema.Run
    evaluation: Mapping[str, Quality] = dataclasses.field(default_factory=dict)
    repeated: bool = False

    @property
    def sparsity(self) -> float:
        """Zeros of all pruned kernels over their weights."""
        return self.record.sparsity

    @property
    def layers(self) -> Sequence[schema.Layer]:
        """The results of the layers; `layers[3]["mlp.down_proj"].error` is a kernel's relative
        error."""
        return self.record.layers


def prune(
    model: StreamedModel,
    windows: Int[np.ndarray, "w t"],
    recipe: Recipe,
    out: str | Path | Destination,
    *,
    masks: str | Path | Destination | None = None,
    stream: TextStream | None = None,
    overwrite: bool = False,
    resume_only: bool = False,
    seed: int = 0,
    save_dtype: DTypeLike | None = None,
    evaluator: Evaluator | None = None,
    timing: bool = False,
    unchecked: bool = False,
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Iterable[Path]] = MappingProxyType({}),
    begun: float | None = None,
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
        masks: a file to make with the masks; None: none is made.
        stream: the text that is tuned on, where the recipe takes tokens of one.
        overwrite: replace `out` and `masks` if they are earlier results that nobody changed.
        resume_only: insist on going on with a run that was stopped.
        seed: the seed of the order of calibration windows in the distillation.
        save_dtype: the dtype that the weights of the result are stored in, float16, bfloat16 or
            float32; None: as the checkpoint stores them, float16 for a quantized GGUF file.
        evaluator: measures the dense and the pruned checkpoint; None: nothing is measured.
        timing: first prune the first layer compiled and under `jax.disable_jit`, and record the
            seconds of both.
        unchecked: begin even where the run would not fit, and without comparing weights of the hub
            with their digests.
        config: what was asked for, texts and numbers for the record; None: names of the checkpoint
            and of the folder.
        inputs: what else is read, by the name of its option: neither `out` nor `masks` may lie
            there.
        begun: `time.perf_counter()` when the work began that led here; None: now.
        observer: is told what happens.

    Returns:
        The result; None where an earlier process of the run had only to be tidied up after.

    Raises:
        InputError, CheckpointError: something cannot be used; nothing that was there before has
            changed.
    """
    begun = time.perf_counter() if begun is None else begun
    reader = identity.checked(model.reader)
    place, masks_place = places(out, masks, overwrite=overwrite)
    place.inputs = require_separate(
        place, masks_place, recipe, {"ckpt": inputs_of(model.source), **inputs}, model.scratch
    )
    if masks_place:
        masks_place.inputs = place.inputs
    require_stream(recipe, stream)
    emptied = opening.check(place, masks_place)
    asked = {"ckpt": model.name, "calib": "token ids", "out": str(place.path), "seed": seed}
    record = Record(asked | dict(config or {}), recipe, windows, stream)
    check(schema.RunConfig, plain(record.config), file="", entry="config", error=InputError)
    observer = Observers(record, observer)
    model.require_tokens(windows)
    dtype = saving_dtype(reader, save_dtype)
    require_recipe(without_experts(model.architecture, recipe.experts.drop_experts), recipe)
    saved = model if dtype is None else model.saved_as(dtype)
    stored = {} if dtype is None else {"save_dtype": dtype.name}
    record.save_dtype = stored.get("save_dtype")
    given = {"masks": {"sha256": digest_of(recipe.mask)}} if recipe.mask else {}
    wanted = identity.of_run(
        reader, model.hf_config, model.dtype, record.asked() | given | stored, seed
    )
    require_same(lambda: wanted | {"weights": identity.sample(reader)})
    observer.phase_timed("setup", time.perf_counter() - begun)
    if not unchecked:
        require_whole(reader.files)
        observer.planned(
            fit.require_fit(_work(model, saved.reader.spec, windows, recipe, place, evaluator))
        )
    masks_at = masks_place.path if masks_place else None
    if broadcast(emptied):
        if on_first_process(lambda: opening.tidy_up(place.path, wanted, masks_at)):
            return _finished(place.path)
        place.check()
    with opening.open_store(place.path, wanted, masks_at, resume=resume_only) as store:
        if store.unpublished:
            publishing.publish(store, place, masks_place)
            return _finished(place.path)
        weights = identity.KnownWeights(reader, store)
        if recipe.experts.drop_experts:
            with _timed(observer, "experts"):
                record.kept_experts = kept_experts(
                    model, windows, recipe.experts.drop_experts, store
                )
                saved = saved.keeping(record.kept_experts)
        if timing:
            with _timed(observer, "timing"):
                record.timing = jit_versus_eager(saved, windows, recipe)
        layers = prune_model(
            saved,
            windows,
            recipe,
            stream=stream,
            seed=seed,
            teacher=model,
            store=store,
            observer=observer,
        )
        files, packed = _write_checkpoint(
            saved, layers, recipe, store, masks_at is not None, observer
        )
        if evaluator:
            with _timed(observer, "evaluate"), _continued_otherwise():
                pruned = model.sibling(store.result, f"pruned {model.short_name}")
                for which, quality in evaluator.measure(
                    {"dense": model, "pruned": pruned}, against="dense"
                ):
                    record.evaluation[which] = quality
        record.seconds["total"] = time.perf_counter() - begun
        made_of = {"dense": reader, "pruned": open_checkpoint(store.result, check=False)}
        record.disk_bytes = {which: disk_bytes(reader) for which, reader in made_of.items()}
        record.parameters = {which: parameters(reader.spec) for which, reader in made_of.items()}
        record.converted_bytes = _converted_bytes(made_of["pruned"], packed)
        weights.require_unchanged()
        require_same(lambda: {"weights": dict(reader.digests)})
        made, names, fault = _describe(record, store.result)
        publishing.finish(store, files | names, masks=masks_at is not None)
        publishing.publish(store, place, masks_place)
    result = PruningResult(place.path, made, record.evaluation)
    observer.finished(result)
    if fault:
        raise fault
    return result


def _describe(record: Record, folder: Path) -> tuple[schema.Run, set[str], Exception | None]:
    """Writes the record, the model card and the report into the result.

    Returns:
        The record, the names of the files, and what kept the report from being drawn.
    """
    content = record.as_json()
    run = schema.run_of_json(content)
    if not is_first_process():
        return run, set(), None
    writing.write_text(folder / "README.md", as_text(model_card(run, record.evaluation)))
    names, fault = write_record(folder, content, record.evaluation)
    return run, names | {"README.md"}, fault


def _finished(folder: Path) -> PruningResult | None:
    run = reading.run_of(folder)
    return PruningResult(folder, run, repeated=True) if run else None


def _work(
    model: StreamedModel,
    saved: Spec,
    windows: Int[np.ndarray, "w t"],
    recipe: Recipe,
    place: Destination,
    evaluator: Evaluator | None,
) -> Work:
    architecture = model.architecture
    recipe = effective_recipe(without_experts(architecture, recipe.experts.drop_experts), recipe)
    if architecture.config.routing:
        architecture = architecture.routed(mesh=None)
    return Work(
        model.reader.spec,
        saved,
        architecture,
        recipe,
        len(windows),
        windows.shape[1],
        [tokens.shape for tokens in evaluator.windows.values()] if evaluator else [],
        place.path,
        model.scratch,
        model.devices,
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
    store: RunStore,
    with_masks: bool,
    observer: Observer,
) -> tuple[set[str], int]:
    """Writes checkpoint and masks to where the run store has them; returns the checkpoint's files,
    and about how many bytes its params would take packed."""
    packed = 0
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
            if with_masks:
                mask_writer = MaskWriter(
                    store.masks,
                    _pruned_shapes(model, recipe),
                    naming_in(model.hf_config, model.reader.spec),
                )
        observer.started("pruning", model.num_layers)
        for layer in layers:
            with _timed(observer, "write"):
                if writer:
                    writer.write(layer.params)
                    packed += estimated_bytes(layer.params)
                if mask_writer:
                    mask_writer.write(layer.index, layer.masks)
        if writer:
            with _timed(observer, "write"):
                for paths in other_params(model.reader.spec):
                    params = model.reader.read(paths)
                    writer.write(params)
                    packed += estimated_bytes(params)
        if mask_writer:
            mask_writer.finish()
    barrier()  # the checkpoint is complete
    return writer.files if writer else set(), packed


def _converted_bytes(reader: Reader, packed: int) -> dict[str, int]:
    """Returns what a pruned checkpoint takes in other formats, see `schema.Run.converted_bytes`."""
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


@contextlib.contextmanager
def _timed(observer: Observer, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    observer.phase_timed(phase, time.perf_counter() - start)
