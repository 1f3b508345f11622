"""The options that repeat a record's run."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxprune import methods
from jaxprune.commands.eval_options import MEASURE_OF, split
from jaxprune.commands.options import CommandLine, real
from jaxprune.commands.recipe_options import RecipeOptions, parse
from jaxprune.errors import InputError
from jaxprune.methods.records import CrossedRecord, FinishedRecord, PlainRecord
from jaxprune.recipe import PRESETS, Recipe, RecipeRecord
from jaxprune.recipe_parts import HOW_TUNED, without_effect
from jaxprune.reporting import reading, schema
from jaxprune.sparsity import masks
from jaxprune.sparsity.patterns import NM, GivenRecord, NMRecord, UnstructuredRecord, parse_pattern

NOT_REPEATED = (
    "out overwrite resume save_masks scratch dry_run config coordinator processes process_id"
).split()
"""Options of a record's run that say where it was made, not what."""


def recorded(content: bytes, path: Path, given: Mapping[str, str]) -> Mapping[str, Any]:
    """Returns the options that repeat a record's run, by name.

    Args:
        content: the content of the record.
        path: the path of its file, for errors.
        given: flags beside it, which win.

    Raises:
        InputError, CheckpointError: it is that of an evaluation, or damaged, or no options make its
            recipe.
    """
    record = reading.read(content, path)
    if not isinstance(record, schema.Run):
        raise InputError(
            "it is the record of an evaluation", file=path, wanted="that of a run, or options"
        )
    raw = json.loads(content)
    for part in ("importance", "tuning", "experts"):
        if other := [
            name for name in raw.get(part) or () if name not in vars(getattr(record, part))
        ]:
            entry = f"{part}.{other[0]}"
            raise InputError(
                "this version of jaxprune has no such part of a recipe", file=path, entry=entry
            )
    wanted, made = record.recipe(), parse([*words(dict(of_recipe(record)).items())])
    if lost := [name for name, value in vars(wanted).items() if value != getattr(made, name)]:
        raise InputError("no options make this part of its recipe", file=path, entry=lost[0])
    options = record.config.model_dump() | dict(of_recipe(record, given))
    if "ckpt" not in given:  # another checkpoint may have another default
        options["save_dtype"] = record.save_dtype or options.get("save_dtype")
    left_out = {*NOT_REPEATED, *meaningless(record, given)}
    return {name: value for name, value in options.items() if name not in left_out}


def meaningless(recipe: RecipeRecord, given: Mapping[str, str]) -> set[str]:
    """Returns the options of a recipe's run that flags beside them leave without a meaning."""
    found: set[str] = set()
    values = {**vars(recipe.importance), **vars(recipe.tuning)}

    def on(*names: str) -> bool:
        return any(
            given[name] not in ("0", "0.0") if name in given else name not in found and values[name]
            for name in names
        )

    if (measures := given.get("eval")) is not None:
        found |= {name for name, measure in MEASURE_OF.items() if measure not in split(measures)}
    if "target" in given:
        found.add("device")
    if masks.is_stored(given.get("mask", "")):
        found |= {"pattern", "sparsity", "rule", *without_effect(None)}
    elif "pattern" in given:
        pattern = parse_pattern(given["pattern"])
        found |= {*["sparsity"] * isinstance(pattern, NM), *without_effect(pattern)}
    elif isinstance(recipe.pattern, NMRecord) and "sparsity" in given:
        try:
            parse_pattern(str(recipe.pattern), real(given["sparsity"]))
        except ValueError:
            found.add("pattern")
    if "uniform" in given:
        found.add("spread")
    if (
        "token_power" in given
        and on("token_power")
        or not on("token_power", "weigh_outputs", "spread")
    ):
        found.add("sensitivity_windows")
    if "tune_epochs" in given:
        found.add("tune_tokens")
    elif "tune_tokens" in given:
        found.add("tune_epochs")
    if not on("tune_tokens"):
        found |= {"tune_to_end", "tune_text"}
    if not on("tune_epochs", "tune_tokens"):
        found |= {*HOW_TUNED}
    return found


def words(options: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Yields options as a command line has them; what is null or false is not given."""
    for name, value in options:
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                yield flag if one is True else f"{flag}={one}"


def of_recipe(
    recipe: RecipeRecord, given: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[str, Any]]:
    """Yields the options that make a recipe, name and value; of methods, those that flags beside
    them leave."""
    method, stored_mask = recipe.method, isinstance(recipe.pattern, GivenRecord)
    if isinstance(method, FinishedRecord):
        yield "finish_steps", method.finish.get("steps")
        method = method.finished
    crossed = isinstance(method, CrossedRecord)
    parts = (
        {"mask": method.mask, "update": method.update}
        if isinstance(method, CrossedRecord)
        else {"update": method}
    )
    named = {role: part for role, part in parts.items() if isinstance(part, PlainRecord)}
    roles = {
        role if crossed or stored_mask else "method": part.name for role, part in named.items()
    }
    if isinstance(recipe.pattern, GivenRecord):
        roles["mask"] = recipe.pattern.mask
    yield from (roles := _beside(roles, given)).items()
    chosen = RecipeOptions(CommandLine([*words(roles.items())]))
    for role, cls in chosen.classes.items():
        flag_of = chosen.flag_of(role)
        for part in named.values():
            if methods.load(part.name) is cls:
                yield from (
                    (flag, value) for name, value in part.options.items() if (flag := flag_of(name))
                )
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
        changed = {
            name: value for name, value in vars(options).items() if value != getattr(usual, name)
        }
        unused = {
            *["spread"] * (not recipe.importance.spread),
            *HOW_TUNED * (not recipe.tuning.tunes),
        }
        yield from ((name, value) for name, value in changed.items() if name not in unused)
    yield "asymmetry", recipe.asymmetry
    yield "quantize", recipe.quantize
    if (
        recipe.preset
        and not recipe.importance.spread
        and isinstance(recipe.pattern, UnstructuredRecord)
    ):
        yield "uniform", recipe.pattern.kind == "unstructured"
    yield "preset", recipe.preset
    yield "skip", [rule.names for rule in recipe.rules if rule.pattern is None]
    yield (
        "rule",
        [f"{rule.names}={_pattern(rule.pattern)}" for rule in recipe.rules if rule.pattern],
    )


def _beside(roles: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Returns the methods that the flags of a record name, and others beside them, which win."""
    if "method" in given:
        roles = {role: name for role, name in roles.items() if masks.is_stored(name)}
    elif {"mask", "update"} <= given.keys():
        roles = {}
    return {
        **roles,
        **{role: given[role] for role in ("method", "mask", "update") if role in given},
    }


def _pattern(pattern: UnstructuredRecord | NMRecord) -> str:
    """Returns a rule's pattern as --rule takes it."""
    return str(pattern) if isinstance(pattern, NMRecord) else repr(pattern.sparsity)
