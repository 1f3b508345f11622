"""Everything that reads a file of somebody else's: which files, by which function or command; and
cases of it."""

import contextlib
import functools
import importlib
import io
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.hostile import answers, mutations
from tests.hostile.answers import (
    converted,
    finite,
    measured,
    nothing,
    pruned,
    reported,
    solved,
    verified,
)
from tests.hostile.mutations import Case, Edit

PRUNE = "--calib text.jsonl --nsamples 3 --seqlen 16 --eval none"
MEASURE = "--eval ppl --eval-text ids.npy --eval-seqlen 16 --eval-windows 2"


class Target(NamedTuple):
    """What is tried.

    Attributes:
        files: patterns of the files that are damaged, relative to the working folder.
        call: of the library; None for a command.
        module: whose `main` it is.
        line: its arguments.
        check: of what a success has made.
        may_deny: whether exit status 1 is an answer ("not verified", "does not fit").
    """

    files: tuple[str, ...]
    call: Callable[[], None] | None = None
    module: str = ""
    line: str = ""
    check: Callable[[Case, Path], None] = nothing
    may_deny: bool = False


def _command(
    module: str, line: str, check: Callable[[Case, Path], None], *files: str, may_deny: bool = False
) -> Target:
    return Target(files, None, module, line, check, may_deny)


def _call(function: Callable[[str], None], path: str, *files: str) -> Target:
    return Target(files or (path,), lambda: function(path))


CALLS: Mapping[str, Target] = {
    "hf": _call(answers.checkpoint, "hf", "hf/*"),
    "shards": _call(answers.checkpoint, "shards", "shards/model*"),
    "gguf": _call(answers.checkpoint, "f32.gguf"),
    "gguf-q8": _call(answers.checkpoint, "q8.gguf"),
    "gguf-experts": _call(answers.checkpoint, "experts.gguf"),
    "fp8": _call(answers.checkpoint, "fp8", "fp8/*"),
    "mxfp4": _call(answers.checkpoint, "mxfp4", "mxfp4/*"),
    "orbax": _call(
        answers.checkpoint_anywhere,
        "orbax",
        "orbax/params.json",
        "orbax/params/**/*",
        "orbax/config.json",
    ),
    "packed": _call(
        answers.checkpoint, "packed", "packed/packed.json", "packed/packed/*", "packed/config.json"
    ),
    "npy": _call(answers.windows, "ids.npy"),
    "jsonl": _call(answers.windows, "text.jsonl"),
    "gz": _call(answers.windows, "text.json.gz"),
    "parquet": _call(answers.windows, "text.parquet"),
    "txt": _call(answers.windows, "text.txt"),
    "masks": _call(answers.masks, "masks.safetensors"),
    "problem": _call(answers.problem, "layer.safetensors"),
    "record": _call(answers.record, "pruned", "pruned/jaxprune.json"),
    "records": _call(answers.record, "evaluation", "evaluation/jaxprune.json"),
    "rows": _call(answers.rows, "rows", "rows/*"),
}
RUNS: Mapping[str, Target] = {
    "run": _command(
        "jaxprune.run", f"--ckpt hf {PRUNE} --out out", pruned("hf"), "hf/*", "text.jsonl"
    ),
    "run-best": _command(
        "jaxprune.run",
        f"--ckpt hf --calib ids.npy --nsamples 3 --seqlen 16 {MEASURE} --preset best --out out "
        "--save-masks out.masks",
        lambda case, base: answers.loads(Path("out/jaxprune.json")) and finite("out") and None,
        *("hf/config.json", "hf/model.safetensors", "ids.npy"),
    ),
    "run-gguf": _command(
        "jaxprune.run", f"--ckpt q8.gguf {PRUNE} --out out", pruned("q8.gguf"), "q8.gguf"
    ),
    "run-orbax": _command(
        "jaxprune.run",
        f"--ckpt orbax {PRUNE} --out out",
        pruned("orbax"),
        "orbax/params.json",
        "orbax/params/**/*",
    ),
    "run-masks": _command(
        "jaxprune.run",
        f"--ckpt hf {PRUNE} --mask from-file:masks.safetensors --update exact --out out",
        lambda case, base: finite("out") and None,
        "masks.safetensors",
    ),
    "resume": _command(
        "jaxprune.run", f"--ckpt hf {PRUNE} --out out", pruned("hf"), "out.unfinished/**/*"
    ),
    "overwrite": _command("jaxprune.run", f"--ckpt hf {PRUNE} --overwrite --out out", pruned("hf")),
    "plan": _command(
        "jaxprune.run", f"--ckpt hf {PRUNE} --dry-run", nothing, "hf/config.json", may_deny=True
    ),
    "options": _command(
        "jaxprune.commands.plan", "--config options.json", nothing, "options.json", may_deny=True
    ),
    "again": _command(
        "jaxprune.run",
        "--config pruned/jaxprune.json --out out",
        lambda case, base: finite("out") and None,
        "pruned/jaxprune.json",
    ),
    "convert-hf": _command(
        "convert.__main__", "shards out --to orbax", converted("shards"), "shards/*"
    ),
    "convert-gguf": _command("convert.__main__", "f32.gguf out", converted("f32.gguf"), "f32.gguf"),
    "convert-orbax": _command("convert.__main__", "orbax out", converted("orbax"), "orbax/**/*"),
    "convert-packed": _command(
        "convert.__main__",
        "packed out",
        converted("packed"),
        "packed/packed.json",
        "packed/packed/*",
    ),
    "evaluate": _command(
        "jaxprune.commands.evaluate",
        f"pruned --against hf {MEASURE} --out out",
        measured,
        *(
            "hf/config.json",
            "hf/model.safetensors",
            "pruned/jaxprune.json",
            "pruned/model.safetensors",
            "ids.npy",
        ),
    ),
    "tasks": _command(
        "jaxprune.commands.evaluate",
        "hf --eval zero-shot --tasks rte --tasks-data rows --out out",
        measured,
        "rows/*",
    ),
    "verify": _command(
        "jaxprune.commands.verify",
        "pruned --against hf",
        verified,
        *(
            "pruned/jaxprune.json",
            "pruned/model.safetensors",
            "hf/model.safetensors",
            "pruned/config.json",
        ),
        may_deny=True,
    ),
    "solve": _command(
        "jaxprune.commands.solve", "layer.safetensors --out out", solved, "layer.safetensors"
    ),
    "report": _command(
        "jaxprune.commands.report",
        "pruned evaluation --out out",
        reported,
        "pruned/jaxprune.json",
        "evaluation/jaxprune.json",
    ),
}
LINES = ("run", "overwrite", "plan", "convert-hf", "evaluate", "verify", "solve", "report")
"""Commands whose options are varied as well."""
TARGETS = CALLS | RUNS | {f"{name}-line": RUNS[name] for name in LINES}
PROCESS_WIDE = ("--device", "--devices")
"""Options that change the process: such a case gets one of its own."""
UNTRIED = ("--coordinator", "--processes", "--process-id", "--timing")
"""Options that wait for other hosts, or only measure."""


def alone(case: str) -> bool:
    """Whether a case needs a process of its own."""
    return any(edit.file in PROCESS_WIDE for edit in mutations.parse(case).edits)


def singles(base: Path, name: str) -> Iterator[Case]:
    """Every case of one edit."""
    target = TARGETS[name]
    edits = _line_edits(target) if name.endswith("-line") else _file_edits(base, target)
    yield from (Case(name, (edit,)) for edit in edits)


def _file_edits(base: Path, target: Target) -> Iterator[Edit]:
    for file in files(base, target):
        yield from mutations.edits_of(base, file)


def files(base: Path, target: Target) -> list[str]:
    """The files that a target's patterns name."""
    found = dict.fromkeys(path for pattern in target.files for path in sorted(base.glob(pattern)))
    return [
        str(path.relative_to(base))
        for path in found
        if path.is_file() and "precious" not in path.name
    ]


def _line_edits(target: Target) -> Iterator[Edit]:
    """Each value in place of each argument, and each option of the command with each value."""
    words = target.line.split()
    for kind in mutations.ARGUMENTS:
        yield from (
            Edit(str(place), kind)
            for place in range(len(words))
            if not words[place].startswith("--")
        )
        yield from (Edit(flag, kind) for flag in options(target.module))


@functools.cache
def options(module: str) -> dict[str, str]:
    """A command's options, from its own help: flag -> what it takes, N and X being numbers."""
    with io.StringIO() as text:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
        found = re.findall(r"^ +(--[a-z][a-z-]+) ([A-Z]+|{)", text.getvalue(), re.MULTILINE)
    return {flag: takes for flag, takes in found if flag not in UNTRIED}


def cases(base: Path, names: Sequence[str], count: int, seed: int) -> list[str]:
    """Distinct cases, as many of each target as of another: it undisturbed, then all single edits,
    of each of its files in turn; when there are no more of them, two at a time.
    """
    chance = random.Random(seed)
    drawn: dict[str, None] = {}
    turns = [_endless(base, name, chance) for name in names]
    while turns and len(drawn) < count:
        found = [next(turn, None) for turn in turns]
        turns = [turn for turn, case in zip(turns, found, strict=True) if case]
        drawn |= {str(case): None for case in found if case}
    return list(drawn)[:count]


def _endless(base: Path, name: str, chance: random.Random) -> Iterator[Case]:
    yield Case(name)
    by_file: dict[str, list[Case]] = {}
    for case in singles(base, name):
        by_file.setdefault(case.edits[0].file, []).append(case)
    for several in by_file.values():
        chance.shuffle(several)
    every = [case for turn in itertools.zip_longest(*by_file.values()) for case in turn if case]
    yield from every
    while every:
        (first,), (second,) = chance.choice(every).edits, chance.choice(every).edits
        if not name.endswith("-line") and chance.random() < 0.5:
            second = Edit(
                second.file, chance.choice(list(mutations.RANDOM)), str(chance.randrange(10**9))
            )
        yield Case(name, (first, second))
