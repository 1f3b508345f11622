"""The options of a run. One field = one flag; the docstring under a field is the flag's help text."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from convert.hub import known_names
from jaxprune import methods, patterns
from jaxprune.errors import InputError
from jaxprune.methods import Crossed, Method


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run's outcome, but for the method's own options."""

    ckpt: str
    """The dense checkpoint: a known name such as llama-7b, a folder, a .gguf file, or owner/name on the hub."""
    out: str | None = None
    """The folder to make (default: named after checkpoint, method and pattern, in the current folder)."""
    overwrite: bool = False
    """Replace --out if it exists; it is replaced only once the new checkpoint is complete."""
    method: str = "admm"
    """How to prune; selects the mask and updates the weights."""
    mask: str | None = None
    """Select the mask with another method than --method."""
    sparsity: float | None = None
    """Fraction of weights to set to zero in every linear (default: 0.5; N:M patterns have their own)."""
    pattern: str | None = None
    """unstructured (the smallest of a whole matrix go), per-output (of each output), or N:M, such as 2:4 (N of
    every M consecutive inputs stay). Default: as the mask's method was published."""
    calib: str | None = None
    """Calibration text: c4, wikitext2, wikipedia, a file (.jsonl, .json.gz, .parquet, .txt, or .npy of token ids
    [count, length]), or a folder laid out as on the hub (default: c4; wikipedia for smollm2-135m)."""
    nsamples: int = 128
    """Calibration windows."""
    seqlen: int = 2048
    """Tokens of a calibration window."""
    pack: bool = False
    """Join documents to fill calibration windows, instead of skipping those shorter than one."""
    eval_text: str | None = None
    """Text to measure perplexity on, as --calib, or none (default: wikitext2; wikipedia for smollm2-135m, other
    articles than calibration's)."""
    eval_seqlen: int | None = None
    """Tokens of an evaluation window (default: --seqlen)."""
    eval_windows: int | None = None
    """Evaluate on the first so many windows only (default: all)."""
    seed: int = 0
    """Of the choice of calibration windows; a run is deterministic in it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the model's computation; auto is float32 on a CPU and the checkpoint's dtype elsewhere. The result is
    stored in the checkpoint's dtype in any case."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """The kind of device to run on; auto takes the best there is, gpu is CUDA's."""

    def resolved(self) -> "Config":
        """The same run with the defaults that depend on other options filled in.

        Raises:
            InputError: options that no run can have.
        """
        for name in ("nsamples", "seqlen", "eval_seqlen", "eval_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        hubless = self.ckpt == "smollm2-135m"
        per_output = methods.load(self.mask or self.method)().per_output
        full = dataclasses.replace(
            self,
            pattern=self.pattern or ("per-output" if per_output else "unstructured"),
            calib=self.calib or ("wikipedia" if hubless else "c4"),
            eval_text=self.eval_text or ("wikipedia" if hubless else "wikitext2"),
            eval_seqlen=self.eval_seqlen or self.seqlen,
        )
        return dataclasses.replace(full, out=self.out or full._default_out())

    def _default_out(self) -> str:
        how = self.method if self.mask in (None, self.method) else f"{self.mask}-{self.method}"
        pattern = self.pattern_object()
        what = f"{pattern.n}of{pattern.m}" if isinstance(pattern, patterns.NM) else f"{100 * pattern.sparsity:g}"
        return f"{Path(self.ckpt).absolute().name.removesuffix('.gguf')}-{how}-{what}"

    def pattern_object(self) -> patterns.Pattern:
        """Raises InputError for an impossible pattern."""
        assert self.pattern is not None
        return patterns.parse(self.pattern, self.sparsity)


def parse(argv: Sequence[str]) -> tuple[Config, Method]:
    """Reads a command line: the run's options, and those of the methods it names.

    Raises:
        InputError: a value that cannot be used. Unknown flags end the program with argparse's message.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--method", "--mask"):
        first.add_argument(flag)
    known, _ = first.parse_known_args(argv)
    chosen = dict.fromkeys(name for name in (known.method or Config.method, known.mask) if name)
    classes = {name: methods.load(name) for name in chosen}

    parser = argparse.ArgumentParser(
        prog="jaxprune",
        description="Prune a LLaMA-family checkpoint in one shot, layer by layer, and measure what it cost.",
        epilog=f"Known checkpoints: {', '.join(known_names())}. Methods: {', '.join(methods.names())}; "
        "--method NAME --help shows a method's own options.",
        allow_abbrev=False,
    )
    _add_fields(parser.add_argument_group("run"), Config, {"method": methods.names(), "mask": methods.names()})
    seen: set[str] = set()
    for name, cls in classes.items():
        group = parser.add_argument_group(f"method {name}", inspect.getdoc(cls))
        only_updates = known.mask not in (None, name)
        unused = {f.name for f in dataclasses.fields(cls) if only_updates and f.metadata.get("selects")}
        _add_fields(group, cls, {}, skip=seen | unused)
        seen |= {f.name for f in dataclasses.fields(cls)}
    given = vars(parser.parse_args(argv))

    def make(cls: type) -> Any:
        return cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given})

    config = make(Config)
    made = {name: make(cls) for name, cls in classes.items()}
    method = made[config.method]
    return config.resolved(), method if config.mask in (None, config.method) else Crossed(made[config.mask], method)


def _add_fields(group: Any, cls: Any, choices: dict[str, list[str]], skip: Collection[str] = ()) -> None:
    """One flag a field. Flags left out are absent from the result, so that defaults stand in one place only."""
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        flag, kind, text = f"--{field.name.replace('_', '-')}", hints[field.name], docs[field.name]
        if typing.get_origin(kind) is types.UnionType:
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        elif field.default is not dataclasses.MISSING and kind is not bool:
            text += f" (default: {field.default})"
        options: dict[str, Any] = {
            "help": text.replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "required": field.default is dataclasses.MISSING,
        }
        if kind is bool:
            group.add_argument(flag, action="store_true", **options)
        elif typing.get_origin(kind) is Literal:
            group.add_argument(flag, choices=typing.get_args(kind), **options)
        else:
            options |= {"choices": choices[field.name]} if field.name in choices else {"metavar": _metavar(kind)}
            group.add_argument(flag, type=kind, **options)


def _metavar(kind: type) -> str:
    return {int: "N", float: "X"}.get(kind, "NAME")


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring under it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), field.target.id
            docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs
