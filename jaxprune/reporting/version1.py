"""Records and journals of version 1, which kept patterns and methods as prose: the only place that
reads prose."""

import dataclasses
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from convert.errors import DamagedError
from convert.hub import described
from convert.schema import Count, Schema, check, parse
from jaxprune import methods
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.records import Scalar
from jaxprune.recipe import Recipe
from jaxprune.recipe_parts import Importance, Tuning
from jaxprune.reporting import schema
from jaxprune.sparsity.patterns import Unstructured


class Method(Schema):
    """Which of the fields are there says what it is: a method, a crossed one, or one with a finish.

    The outermost name says all that was done, in words; a method's own name comes first.
    """

    name: str
    options: dict[str, Scalar] | None = None
    mask: "Method | None" = None
    update: "Method | None" = None
    method: "Method | None" = None
    finish: dict[str, Scalar] | None = None


class Linear(Schema):
    error: float | None
    zeros: Count
    size: int = Field(ge=1, le=2**53)
    stats: dict[str, float | None] = {}


class Layer(Schema):
    index: Count
    seconds: schema.Seconds
    linears: dict[str, Linear] = Field(min_length=1)


class Run(schema.Environment):
    kind: Literal["run"]
    config: schema.RunConfig
    method: Method
    pattern: str
    preset: str | None = None
    asymmetry: float = 0.0
    importance: Importance = Importance()
    tuning: Tuning = Tuning()
    calibration: schema.Calibration
    sparsity: float = Field(ge=0, le=1)
    evaluation: dict[Literal["dense", "pruned"], schema.Quality]
    seconds: schema.Seconds
    timing: schema.Timing | None = None
    peak_bytes: dict[str, Count] = {}
    layers: list[Layer]
    resumed_layers: Count = 0


class Measured(Schema):
    sparsity: float = Field(ge=0, le=1)
    run: Run | None
    quality: schema.Quality


class Evaluation(schema.Environment):
    kind: Literal["evaluation"]
    config: schema.Config
    against: str | None
    checkpoints: dict[str, Measured]


def upgraded(
    content: str | bytes, kind: Literal["run", "evaluation"], file: str | Path
) -> schema.Record:
    """Returns a record of version 1 as version 2 has it.

    Raises:
        UserError: it is none, or its prose is not what version 1 wrote.
    """
    if kind == "run":
        return check(schema.Run, _run(parse(Run, content, file=file), file), file=file)
    record = parse(Evaluation, content, file=file)
    checkpoints = {
        name: {
            "sparsity": one.sparsity,
            "run": _run(one.run, file) if one.run else None,
            "quality": one.quality,
        }
        for name, one in record.checkpoints.items()
    }
    return check(
        schema.Evaluation, _fields(record) | {"schema": 2, "checkpoints": checkpoints}, file=file
    )


def _fields(record: Schema) -> dict[str, Any]:
    return {name: getattr(record, name) for name in type(record).model_fields}


def _run(run: Run, file: str | Path) -> dict[str, Any]:
    pattern, off = _pattern(run, file)
    layers = [
        _fields(layer)
        | {"linears": {path: _linear(one, pattern, off) for path, one in layer.linears.items()}}
        for layer in run.layers
    ]
    return _fields(run) | {
        "schema": 2,
        "checkpoint": described(run.config.ckpt),
        "method": _method(run.method, run.preset, file),
        "pattern": pattern,
        "layers": layers,
    }


def _pattern(run: Run, file: str | Path) -> tuple[dict[str, Any], float | None]:
    """Returns the pattern, and how far off its sparsity, of six digits, may be; None: each linear
    layer had its own."""
    if match := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", run.pattern):
        return {"kind": "nm", "n": int(match[1]), "m": int(match[2])}, 0.0
    if match := re.fullmatch(r"the mask (.+)", run.pattern, re.DOTALL):
        return {"kind": "given", "mask": match[1]}, None
    match = re.fullmatch(
        r"([0-9]+(?:\.[0-9]+)?(?:e-[0-9]+)?) %( in total| per output)?", run.pattern
    )
    if not match or not float(match[1]) < 100:
        raise DamagedError(
            "its pattern is none that version 1 wrote",
            file=file,
            entry="pattern",
            found=run.pattern,
        )
    percent = float(match[1])
    off = 10.0 ** (math.floor(math.log10(percent)) - 5) / 200 if percent else 0.0
    sparsity = float(Decimal(match[1]) / 100)
    kind = "per-output" if match[2] == " per output" else "unstructured"
    if match[2] == " in total":
        linears = [linear for layer in run.layers for linear in layer.linears.values()]
        zeros, size = (
            sum(linear.zeros for linear in linears),
            sum(linear.size for linear in linears),
        )
        if size and zeros != round(sparsity * size) and abs(zeros / size - sparsity) <= off:
            sparsity = zeros / size  # the total was exact, so this gives the digits back
    return {"kind": kind, "sparsity": sparsity}, None if match[2] else off


def _linear(linear: Linear, pattern: Mapping[str, Any], off: float | None) -> dict[str, Any]:
    """Returns a linear's entry with the zeros that were wanted: those it has, unless they are not
    the pattern's."""
    wanted = linear.zeros
    if pattern["kind"] == "nm":
        wanted = linear.size // pattern["m"] * (pattern["m"] - pattern["n"])
    elif (
        off is not None
        and abs(linear.zeros - pattern["sparsity"] * linear.size) > off * linear.size + 0.5
    ):
        wanted = round(pattern["sparsity"] * linear.size)
    return _fields(linear) | {"wanted": wanted}


def _method(method: Method, preset: str | None, file: str | Path) -> dict[str, Any]:
    if method.options is not None:
        name = method.name.removeprefix(f"{preset}: ").partition(",")[0]
        return {"kind": "method", "name": name, "options": method.options}
    if method.mask and method.update:
        return {
            "kind": "crossed",
            "mask": _method(method.mask, None, file),
            "update": _method(method.update, None, file),
        }
    if method.method and method.finish is not None:
        return {
            "kind": "finished",
            "method": _method(method.method, None, file),
            "finish": method.finish,
        }
    raise DamagedError(
        "it is no method that version 1 wrote", file=file, entry="method", found=method.name
    )


def recipe_as_json(recipe: Recipe) -> dict[str, Any]:
    """Returns what version 1 wrote of a recipe, in records and journals."""
    method = _described(recipe.method) | {"name": recipe.method_text}
    parts: dict[str, Any] = {"method": method, "pattern": _prose(recipe)}
    if recipe.preset:
        parts["preset"] = recipe.preset
    if recipe.asymmetry:
        parts["asymmetry"] = recipe.asymmetry
    if recipe.importance.measured:
        parts["importance"] = dataclasses.asdict(recipe.importance)
    if recipe.tuning.tune_epochs:
        parts["tuning"] = recipe.tuning.as_json()
    return parts


def _described(method: Any) -> dict[str, Any]:
    if isinstance(method, Crossed):
        selector, updater = _described(method.selector), _described(method.updater)
        return {
            "name": f"{selector['name']} mask, {updater['name']} update",
            "mask": selector,
            "update": updater,
        }
    if isinstance(method, Finished):
        inner, finish = _described(method.method), dataclasses.asdict(method.finish)
        return {
            "name": f"{inner['name']}, {finish['steps']} steps to finish",
            "method": inner,
            "finish": finish,
        }
    return {"name": methods.name_of(method), "options": dataclasses.asdict(method)}


def _prose(recipe: Recipe) -> str:
    if not isinstance(recipe.pattern, Unstructured):
        return recipe.pattern_text
    where = " per output" * recipe.pattern.per_output + " in total" * (recipe.importance.spread > 0)
    return f"{100 * recipe.pattern.sparsity:g} %{where}"
