"""The options that repeat a record's run."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxprune import methods
from jaxprune.commands.options import CommandLine
from jaxprune.commands.recipe_options import RecipeOptions, parse
from jaxprune.errors import InputError
from jaxprune.methods.records import CrossedRecord, FinishedRecord, PlainRecord
from jaxprune.recipe import PRESETS, Recipe, RecipeRecord
from jaxprune.reporting import reading, schema
from jaxprune.sparsity.patterns import GivenRecord, NMRecord, UnstructuredRecord

NOT_REPEATED = "out overwrite resume save_masks scratch dry_run config coordinator processes process_id".split()
"""Options of a record's run that say where it was made, not what."""


def recorded(content: bytes, path: Path) -> Mapping[str, Any]:
    """Returns the options that repeat a record's run, by name.

    Args:
        content: the content of the record.
        path: the path of its file, for errors.

    Raises:
        InputError, CheckpointError: it is that of an evaluation, or damaged, or no options make its recipe.
    """
    record = reading.read(content, path)
    if not isinstance(record, schema.Run):
        raise InputError("it is the record of an evaluation", file=path, wanted="that of a run, or options")
    wanted, made = record.recipe(), parse([*words(of_recipe(record))])
    if lost := [name for name, value in vars(wanted).items() if value != getattr(made, name)]:
        raise InputError("no options make this part of its recipe", file=path, entry=lost[0])
    options = record.config.model_dump()
    return {name: value for name, value in options.items() if name not in NOT_REPEATED} | dict(of_recipe(record))


def words(options: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Yields options as a command line has them; what is null or false is not given."""
    for name, value in options:
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                yield flag if one is True else f"{flag}={one}"


def of_recipe(recipe: RecipeRecord) -> Iterator[tuple[str, Any]]:
    """Yields the options that make a recipe: name, value."""
    method, given = recipe.method, isinstance(recipe.pattern, GivenRecord)
    if isinstance(method, FinishedRecord):
        yield "finish_steps", method.finish.get("steps")
        method = method.finished
    crossed = isinstance(method, CrossedRecord)
    parts = {"mask": method.mask, "update": method.update} if isinstance(method, CrossedRecord) else {"update": method}
    named = {role: part for role, part in parts.items() if isinstance(part, PlainRecord)}
    roles = {role if crossed or given else "method": part.name for role, part in named.items()}
    if isinstance(recipe.pattern, GivenRecord):
        roles["mask"] = recipe.pattern.mask
    yield from roles.items()
    chosen = RecipeOptions(CommandLine([*words(roles.items())]))
    for role, cls in chosen.classes.items():
        flag_of = chosen.flag_of(role)
        for part in named.values():
            if methods.load(part.name) is cls:
                yield from ((flag, value) for name, value in part.options.items() if (flag := flag_of(name)))
    if isinstance(recipe.pattern, NMRecord):
        yield "pattern", str(recipe.pattern)
    elif not isinstance(recipe.pattern, GivenRecord):
        yield "pattern", recipe.pattern.kind
        yield "sparsity", recipe.pattern.sparsity
    preset = PRESETS.get(recipe.preset or "", Recipe())
    for options, usual in (
        (recipe.importance, preset.importance),
        (recipe.tuning, preset.tuning),
        (recipe.experts, preset.experts),
    ):
        changed = {name: value for name, value in vars(options).items() if value != getattr(usual, name)}
        if not recipe.tuning.tunes:
            changed.pop("tune_pieces", None)
        yield from ((name, value) for name, value in changed.items() if value or name != "spread")
    yield "asymmetry", recipe.asymmetry
    yield "quantize", recipe.quantize
    if recipe.preset and not recipe.importance.spread and isinstance(recipe.pattern, UnstructuredRecord):
        yield "uniform", recipe.pattern.kind == "unstructured"
    yield "preset", recipe.preset
    yield "skip", [rule.names for rule in recipe.rules if rule.pattern is None]
    yield "rule", [f"{rule.names}={_pattern(rule.pattern)}" for rule in recipe.rules if rule.pattern]


def _pattern(pattern: UnstructuredRecord | NMRecord) -> str:
    """Returns a rule's pattern as --rule takes it."""
    return str(pattern) if isinstance(pattern, NMRecord) else repr(pattern.sparsity)
