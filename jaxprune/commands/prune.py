"""Prune a checkpoint in one shot, layer by layer, and measure its quality."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import InputError
from convert.hub import known_names
from jaxprune.commands.run_options import Config, group_of, read
from jaxprune.commands.terminal import choose_devices, command, console, keep_memory
from jaxprune.recipe import Recipe
from jaxprune.recipe_parts import Tuning, effective_tuning

if TYPE_CHECKING:
    import numpy as np

    from convert.destination import Destination
    from jaxprune.api.prune import PruningResult
    from jaxprune.calibration.text_stream import TextStream
    from jaxprune.models import Architecture
    from jaxprune.streaming.model import StreamedModel

EXAMPLES = f"""Examples:

    jaxprune prune --ckpt smollm2-135m --sparsity 0.5 --nsamples 32 --seqlen 512
    jaxprune prune --ckpt llama-7b --preset best --sparsity 0.7 --out pruned
    jaxprune prune --ckpt ./model --method wanda --pattern 2:4 --calib text.jsonl
    jaxprune prune --config pruned/jaxprune.json --out again

Known checkpoints: {", ".join(known_names())}."""


@partial(command, group_of=group_of)
def main(argv: Sequence[str]) -> int:
    """Runs a command line."""
    _, config, recipe, sparsity = read(argv, __name__)
    for name in ("device_memory", "target"):
        if getattr(config, name) is not None and not config.dry_run:
            raise InputError(
                f"--{name.replace('_', '-')} is for jaxprune plan and --dry-run: a run uses this "
                "machine"
            )
    if config.dry_run:
        from jaxprune.commands.plan import plan

        _checked_paths(config, recipe)
        return plan(config, recipe, sparsity)
    run(config, recipe, sparsity)
    return 0


def run(config: Config, recipe: Recipe, sparsity: float | None = None) -> "PruningResult | None":
    """Prunes, exports and evaluates. All checks of the input come before the work starts.

    Args:
        config: the options of the run.
        recipe: its recipe.
        sparsity: the sparsity that the user typed, if any: see `rules.require_sparsity`.

    Returns:
        The result; None if the run was finished and only cleanup was left.

    Raises:
        InputError, CheckpointError: something cannot be used.
    """
    begun = time.perf_counter()
    # Imported here because they take a second: --help and errors in flags should not wait.
    from jaxprune.api.load import load
    from jaxprune.api.prune import RunOptions, prune
    from jaxprune.commands.progress import Progress
    from jaxprune.evaluation.quality import Evaluator

    place, masks_place, inputs = _checked_paths(config, recipe)
    assert config.out
    scratch = config.scratch_folder(config.out)
    if recipe.importance.measured or recipe.tuning.tunes:
        keep_memory(large=True)  # both compute logits
    devices = choose_devices(config.device, config.devices, config.meeting(recipe))
    measures = config.plan(config.device)
    measures.load()  # fail before the model is downloaded
    require_suitable(config, recipe, sparsity)
    console.print(f"opening {config.ckpt}")
    model = load(config.ckpt, dtype=config.computation_dtype, devices=devices, scratch=scratch)
    asked = {"calibration": config.calib, "tuning": config.tune_text}
    asked |= {"evaluation": config.eval_text, "tasks": config.tasks}
    what = ", ".join(f"{name} {text}" for name, text in asked.items() if text)
    console.print(f"preparing text: {what}")
    windows = windows_of(config, model)
    progress = Progress(
        devices, tasks=bool(measures and measures.tasks), tuning=_tuning_of(recipe, model)
    )
    with progress:
        result = prune(
            model,
            windows,
            recipe,
            place,
            RunOptions(
                masks=masks_place,
                stream=stream_of(config, recipe, model),
                resume_only=config.resume,
                seed=config.seed,
                save_dtype=config.save_dtype,
                evaluator=Evaluator(measures, model, progress) if measures else None,
                timing=config.timing is not None,
                unchecked=config.unchecked,
                config=dataclasses.asdict(config),
                inputs=inputs,
                begun=begun,
            ),
            progress,
        )
    if result is None or result.repeated:
        console.print(f"{place.path} is already finished")
    return result


def _tuning_of(recipe: Recipe, model: "StreamedModel") -> Tuning:
    """Returns the tuning of a recipe, without options that have no effect on the model."""
    from jaxprune.solve.rules import effective_recipe
    from jaxprune.structure.sizes import smaller_architecture

    pruned = smaller_architecture(model.architecture, model.reader.assets, recipe.structure)
    return effective_tuning(effective_recipe(pruned, recipe).tuning, recipe.pattern)


def _checked_paths(
    config: Config, recipe: Recipe
) -> "tuple[Destination, Destination | None, Mapping[str, Sequence[Path]]]":
    """Checks that the texts exist and that the results can be written.

    Returns:
        The destinations of the checkpoint and of the masks, and option -> the paths that it names.

    Raises:
        InputError, CheckpointError: a text is missing, or a destination is occupied.
    """
    from convert.paths import paths_of
    from jaxprune.api.prune import places, require_separate
    from jaxprune.run_store import opening

    assert config.out and config.calib
    place, masks_place = places(config.out, config.save_masks, overwrite=config.overwrite)
    inputs = config.inputs()
    inputs |= {"calib": source_paths(config.calib), "tune_text": source_paths(config.tune_text)}
    require_separate(
        place, masks_place, recipe, inputs | {"ckpt": paths_of(config.ckpt)}, config.scratch
    )
    if not opening.require_free(place, masks_place) and config.resume:
        opening.require_begun(place.path)
    return place, masks_place, inputs


def require_suitable(config: Config, recipe: Recipe, sparsity: float | None) -> "Architecture":
    """Checks that a recipe suits the checkpoint. This reads only config.json.

    Args:
        config: the options of the run; its devices are chosen already.
        recipe: its recipe.
        sparsity: the sparsity that the user typed; None: none was typed.

    Returns:
        The checkpoint's architecture.

    Raises:
        InputError: the recipe does not suit it, or its rules miss the sparsity.
        CheckpointError: the checkpoint cannot be read.
    """
    from jaxprune.phases import require_recipe
    from jaxprune.planning.estimate import shapes_of
    from jaxprune.solve.rules import require_sparsity

    *_, architecture, removed = shapes_of(
        config.ckpt, config.computation_dtype, structure=recipe.structure
    )
    left = removed[-1].after if removed else architecture
    require_recipe(left, recipe)
    if sparsity is not None and recipe.rules:
        require_sparsity(left, recipe, sparsity)
    return architecture


def source_paths(sources: str | None) -> list[Path]:
    """Returns the paths that --calib, --tune-text or --prompts names; empty if it is not given.

    Raises:
        InputError: there is no such source.
    """
    from jaxprune.calibration import path_of_source, sources_of

    paths = map(path_of_source, sources_of(sources) if sources else ())
    return [path for path in paths if path]


def windows_of(config: Config, model: "StreamedModel") -> "np.ndarray":
    """Samples the windows that a run calibrates on, int32 [nsamples, seqlen].

    Raises:
        InputError: see `calibration.calibration_windows`.
    """
    from jaxprune.calibration import calibration_windows, require_vocabulary, sources_of

    assert config.calib
    vocab_size = model.architecture.config.vocab_size
    require_vocabulary(sources_of(config.calib), config.seqlen, vocab_size)
    return calibration_windows(
        config.calib,
        _tokenizer_for(config.calib, model),
        config.nsamples,
        config.seqlen,
        config.seed,
        pack=config.pack,
    )


def stream_of(config: Config, recipe: Recipe, model: "StreamedModel") -> "TextStream | None":
    """Opens the tuning text; None if the run tunes only on the calibration windows, or not at all.

    Raises:
        InputError: see `calibration.text_stream.TextStream`.
    """
    from jaxprune.calibration.text_stream import TextStream

    if not recipe.tuning.tune_tokens:
        return None
    text = config.tune_text or config.calib
    assert text
    tokenizer, vocab_size = _tokenizer_for(text, model), model.architecture.config.vocab_size
    return TextStream(text, tokenizer, config.seqlen, config.seed, vocab_size=vocab_size)


def _tokenizer_for(sources: str, model: "StreamedModel") -> Any:
    """Returns the model's tokenizer; None if all sources are token ids."""
    from jaxprune.calibration import sources_of

    if all(source.endswith(".npy") for source in sources_of(sources)):
        return None
    return model.tokenizer
