"""Options in a file: `--config FILE` stands for the flags that its entries name, or for those of a record's run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from convert.files import expand, read_bytes
from convert.schema import decode, plain
from jaxprune.commands.options import peek
from jaxprune.commands.recipe_options import RecipeOptions
from jaxprune.errors import InputError
from jaxprune.methods.records import CrossedRecord, FinishedRecord, PlainRecord
from jaxprune.recipe import PRESETS, Importance, RecipeRecord, Tuning
from jaxprune.reporting import reading, schema
from jaxprune.sparsity.patterns import GivenRecord, NMRecord, UnstructuredRecord

FILE_BYTES = 2**20
"""The most that a file of options may hold; a record may hold more."""
NOT_REPEATED = "out overwrite resume save_masks scratch dry_run config coordinator processes process_id".split()
"""Options of a record's run that say where it was made, not what."""


def expanded(argv: Sequence[str]) -> list[str]:
    """Returns a command line with the flags of its --config before its own, which win.

    Raises:
        InputError: the file holds no options.
        CheckpointError: it cannot be read.
    """
    name = peek(argv, "config")
    if not name:
        return list(argv)
    path = expand(name)
    own = {word.partition("=")[0] for word in argv if word.startswith("--")}
    words: list[str] = []
    for option, value in _options(path).items():
        flag = f"--{option.replace('_', '-')}"
        if flag not in own and value is not None and value is not False:
            words += [flag] if value is True else [f"{flag}={value}"]
    return [*words, *argv]


def _options(path: Path) -> Mapping[str, Any]:
    """Returns the options of a file by name, in Python's spelling."""
    content = read_bytes(path, schema.RECORD_BYTES)
    if path.suffix == ".json":
        found: Any = decode(content, file=path, error=InputError)
        if found.get("kind") in ("run", "evaluation"):
            record = reading.read(content, path)
            if not isinstance(record, schema.Run):
                raise InputError("it is the record of an evaluation", file=path, wanted="that of a run, or options")
            return dict(of_record(record))
    elif len(content) > FILE_BYTES:
        raise InputError("it is too large to hold options", file=path, wanted=f"at most {FILE_BYTES} bytes")
    else:
        try:
            found = yaml.safe_load(content)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"it holds no options ({' '.join(str(error).split())[:200]})", file=path) from None
    if not isinstance(found, dict):
        raise InputError("it holds no options", file=path, wanted="names and values, such as sparsity: 0.7")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str | None):
            raise InputError("an option has no single value", file=path, entry=str(plain(name)), found=value)
    return {name.replace("-", "_"): value for name, value in found.items()}


def of_record(run: schema.Run) -> Iterator[tuple[str, Any]]:
    """Yields the options that repeat a run: name, value."""
    for name, value in run.config.model_dump().items():
        if name not in NOT_REPEATED and value is not None:
            yield name, value
    yield from of_recipe(run)


def of_recipe(recipe: RecipeRecord) -> Iterator[tuple[str, Any]]:
    """Yields the options that make a recipe: name, value."""
    method, given = recipe.method, isinstance(recipe.pattern, GivenRecord)
    if isinstance(method, FinishedRecord):
        yield "finish_steps", method.finish.get("steps")
        method = method.finished
    crossed = isinstance(method, CrossedRecord)
    parts = {"mask": method.mask, "update": method.update} if isinstance(method, CrossedRecord) else {"update": method}
    named = {role: part for role, part in parts.items() if isinstance(part, PlainRecord)}
    words = {role if crossed or given else "method": part.name for role, part in named.items()}
    if isinstance(recipe.pattern, GivenRecord):
        words["mask"] = recipe.pattern.mask
    yield from words.items()
    chosen = RecipeOptions([f"--{name}={value}" for name, value in words.items()])
    for role, part in named.items():
        flag_of = chosen.flag_of(role)
        yield from ((flag, value) for name, value in part.options.items() if (flag := flag_of(name)))
    if isinstance(recipe.pattern, NMRecord):
        yield "pattern", str(recipe.pattern)
    elif not isinstance(recipe.pattern, GivenRecord):
        yield "pattern", recipe.pattern.kind
        yield "sparsity", recipe.pattern.sparsity
    preset = PRESETS.get(recipe.preset or "")
    for options, usual in (
        (recipe.importance, preset.importance if preset else Importance()),
        (recipe.tuning, preset.tuning if preset else Tuning()),
    ):
        changed = {name: value for name, value in vars(options).items() if value != getattr(usual, name)}
        yield from ((name, value) for name, value in changed.items() if value or name != "spread")
    yield "asymmetry", recipe.asymmetry
    if recipe.preset and not recipe.importance.spread and isinstance(recipe.pattern, UnstructuredRecord):
        yield "uniform", recipe.pattern.kind == "unstructured"
    yield "preset", recipe.preset
