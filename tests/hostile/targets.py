"""Everything that reads a file of somebody else's, on tiny files: what it reads, and what a right answer is.

A target is tried in a working folder that holds all files, named relative to it. What it makes is called `out…`; all else
must be as it was. A library target returns or raises `UserError`; a command ends as `judged` allows, and what it has made
is looked at.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import stat
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.hostile import mutations
from tests.hostile.mutations import Case, Edit
from tests.hostile.watchdog import Outcome

PRELOAD = ("tests.hostile.targets", "jaxprune.run", "jaxprune.evaluate", "jaxprune.solve", "jaxprune.verify")
PRELOAD += ("convert.__main__", "transformers", "transformers.models.llama", "orbax.checkpoint.v1", "safetensors.numpy")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
}
PRUNE = "--calib text.jsonl --nsamples 3 --seqlen 16 --eval none"
MEASURE = "--eval ppl --eval-text ids.npy --eval-seqlen 16 --eval-windows 2"
NOTE = "what is finished is kept in "
"""Begins the one line beside warnings that may stand before or after an error."""
LONGEST = 2000 + len("error: ")
NEUTRAL = ("generation_config.json", "chat_template.jinja", "out.unfinished/")
"""Files that cannot change what a run makes of the weights: it ends in the same bytes, or is refused."""


class Wrong(AssertionError):
    """A success that is none."""


def require(condition: object, problem: str) -> None:
    if not condition:
        raise Wrong(problem)


# Opening and validation.


def checkpoint(path: str) -> None:
    """All that is done before a checkpoint is pruned; and its tensors are those that were announced."""
    from convert import open_checkpoint
    from convert.assets import load_tokenizer, read_config
    from convert.consistency import check
    from jaxprune.models import model_for

    reader = open_checkpoint(path)
    check(reader.spec, read_config(reader.assets))
    model = model_for(reader)
    require(model.spec.keys() == reader.spec.keys(), "the model has other params than the checkpoint")
    for name, array in reader.read(reader.spec).items():
        wanted = reader.spec[name]
        require((array.shape, array.dtype) == (wanted.shape, wanted.dtype), f"{name} is not what was announced")
    ids = load_tokenizer(reader.assets)("The cat sat on the mat.")["input_ids"]
    require(all(type(one) is int and one >= 0 for one in ids), f"token ids are {ids}")


def checkpoint_anywhere(path: str) -> None:
    """The same by an absolute path."""
    checkpoint(os.path.abspath(path))


def windows(path: str) -> None:
    from convert.assets import load_tokenizer
    from jaxprune import calibration

    tokenizer = None if path.endswith(".npy") else load_tokenizer(Path("hf"))
    for found in (
        calibration.sample(path, tokenizer, 2, 16, 0, pack=path.endswith(".txt")),
        calibration.evaluation_windows(path, tokenizer, 16, 2),
    ):
        require(found.dtype == np.int32 and found.shape[1] == 16 and 1 <= len(found) <= 2, f"{found.dtype}{found.shape}")
        require(tokenizer or _among(found, path), "ids are not those of the file")


def _among(found: np.ndarray, path: str) -> bool:
    """Whether windows are the file's: the numbers, not their low bits."""
    rows = {tuple(int(one) for one in row[:16]) for row in np.load(path)}
    return all(tuple(map(int, row)) in rows for row in found)


def masks(path: str) -> None:
    from jaxprune.masks import from_file

    stored = from_file(Path(path))
    for layer in range(2):
        for linear in ("self_attn.q_proj", "mlp.down_proj"):
            mask = stored(layer, linear)
            array = mask.read()
            require(array.dtype == bool and array.shape == tuple(mask.shape), "a mask is not what was announced")


def problem(path: str) -> None:
    from jaxprune import problems

    found = problems.load(Path(path))
    require(found.layer >= 0 and found.kernels and found.grams, "an empty problem")
    for array in (*found.kernels.values(), *found.grams.values()):
        require(array.ndim == 2 and np.isfinite(np.asarray(array, np.float64)).all(), "a matrix that is none")


def record(path: str) -> None:
    from jaxprune import report
    from jaxprune.verify import expected

    report.entries([report.load(Path(path))])  # the figures take a second: the command draws them
    if run := report.run_of(Path(path)):
        expected(run)


def rows(path: str) -> None:
    from jaxprune.evaluation.tasks import Tasks

    Tasks(["rte"], Path(path), None)


# Whole runs.


def finite(folder: str) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, by Flax path, once they are known to be finite."""
    from convert import open_checkpoint

    reader = open_checkpoint(folder)
    tensors = reader.read(reader.spec)
    for name, array in tensors.items():
        require(np.isfinite(np.asarray(array, np.float64)).all(), f"{folder}: {name} has values that are not finite")
    return tensors


def pruned(dense: str) -> Callable[[Case, Path], None]:
    """A check of `out`: all tensors finite, exact zeros, all else as in the dense checkpoint."""

    def check(case: Case, base: Path) -> None:
        found, before = finite("out"), finite(dense)
        require(found.keys() == before.keys(), "tensors were lost or added")
        for name, array in found.items():
            if "_proj.kernel" in name:
                require(2 * np.count_nonzero(array == 0) >= array.size, f"{name} has too few zeros")
            else:
                require(array.tobytes() == before[name].tobytes(), f"{name} is not the dense checkpoint's")
        require(not Path("out.unfinished").exists() or list(Path().glob("out.unfinished/precious*")), "a journal is left")
        _loads(Path("out/jaxprune.json"))
        weights = "out/model.safetensors"
        if case.edits and dense == "hf" and all(any(name in edit.file for name in NEUTRAL) for edit in case.edits):
            require(digest(Path(weights)) == digest(base / "pruned/model.safetensors"), "other bytes than undisturbed")

    return check


def converted(source: str) -> Callable[[Case, Path], None]:
    def check(case: Case, base: Path) -> None:
        from convert import open_checkpoint

        reader, made = open_checkpoint(source), open_checkpoint("out")
        tensors, copies = reader.read(reader.spec), made.read(made.spec)
        same = tensors.keys() == copies.keys() and all(a.tobytes() == copies[n].tobytes() for n, a in tensors.items())
        require(same, "the copy has other tensors")

    return check


def measured(case: Case, base: Path) -> None:
    found = _loads(Path("out/jaxprune.json"))
    for one in found["checkpoints"].values():
        for text in one["quality"]["texts"].values():
            perplexity = text["perplexity"]
            require(perplexity is None or 1 <= perplexity < math.inf, f"perplexity {perplexity}")
        for task in one["quality"]["tasks"].values():
            require(0 <= task["acc"] <= 1, f"accuracy {task['acc']}")


def solved(case: Case, base: Path) -> None:
    from jaxprune import problems

    for name, kernel in problems.load(Path("out")).kernels.items():
        require(np.isfinite(kernel).all() and 2 * np.count_nonzero(kernel == 0) >= kernel.size, f"{name} is not pruned")


def verified(case: Case, base: Path) -> None:
    finite("pruned")


def reported(case: Case, base: Path) -> None:
    text = Path("out").read_text(encoding="utf-8")
    require(text.startswith("<!doctype html>") and "</html>" in text, "a report that is none")


def _loads(path: Path) -> Any:
    def refuse(name: str) -> Any:
        raise Wrong(f"{path} has {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def nothing(case: Case, base: Path) -> None:
    """A check of commands that make nothing."""


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


def _command(module: str, line: str, check: Callable[[Case, Path], None], *files: str, may_deny: bool = False) -> Target:
    return Target(files, None, module, line, check, may_deny)


def _call(function: Callable[[str], None], path: str, *files: str) -> Target:
    return Target(files or (path,), lambda: function(path))


CALLS: Mapping[str, Target] = {
    "hf": _call(checkpoint, "hf", "hf/*"),
    "shards": _call(checkpoint, "shards", "shards/model*"),
    "gguf": _call(checkpoint, "f32.gguf"),
    "gguf-q8": _call(checkpoint, "q8.gguf"),
    "orbax": _call(checkpoint_anywhere, "orbax", "orbax/params.json", "orbax/params/**/*", "orbax/config.json"),
    "npy": _call(windows, "ids.npy"),
    "jsonl": _call(windows, "text.jsonl"),
    "gz": _call(windows, "text.json.gz"),
    "parquet": _call(windows, "text.parquet"),
    "txt": _call(windows, "text.txt"),
    "masks": _call(masks, "masks.safetensors"),
    "problem": _call(problem, "layer.safetensors"),
    "record": _call(record, "pruned", "pruned/jaxprune.json"),
    "records": _call(record, "evaluation", "evaluation/jaxprune.json"),
    "rows": _call(rows, "rows", "rows/*"),
}
RUNS: Mapping[str, Target] = {
    "run": _command("jaxprune.run", f"--ckpt hf {PRUNE} --out out", pruned("hf"), "hf/*", "text.jsonl"),
    "run-best": _command(
        "jaxprune.run",
        f"--ckpt hf --calib ids.npy --nsamples 3 --seqlen 16 {MEASURE} --preset best --out out --save-masks out.masks",
        lambda case, base: _loads(Path("out/jaxprune.json")) and finite("out") and None,
        *("hf/config.json", "hf/model.safetensors", "ids.npy"),
    ),
    "run-gguf": _command("jaxprune.run", f"--ckpt q8.gguf {PRUNE} --out out", pruned("q8.gguf"), "q8.gguf"),
    "run-orbax": _command(
        "jaxprune.run", f"--ckpt orbax {PRUNE} --out out", pruned("orbax"), "orbax/params.json", "orbax/params/**/*"
    ),
    "run-masks": _command(
        "jaxprune.run",
        f"--ckpt hf {PRUNE} --mask from-file:masks.safetensors --update exact --out out",
        lambda case, base: finite("out") and None,
        "masks.safetensors",
    ),
    "resume": _command("jaxprune.run", f"--ckpt hf {PRUNE} --out out", pruned("hf"), "out.unfinished/**/*"),
    "plan": _command("jaxprune.run", f"--ckpt hf {PRUNE} --dry-run", nothing, "hf/config.json", may_deny=True),
    "convert-hf": _command("convert.__main__", "shards out --to orbax", converted("shards"), "shards/*"),
    "convert-gguf": _command("convert.__main__", "f32.gguf out", converted("f32.gguf"), "f32.gguf"),
    "convert-orbax": _command("convert.__main__", "orbax out", converted("orbax"), "orbax/**/*"),
    "evaluate": _command(
        "jaxprune.evaluate",
        f"pruned --against hf {MEASURE} --out out",
        measured,
        *("hf/config.json", "hf/model.safetensors", "pruned/jaxprune.json", "pruned/model.safetensors", "ids.npy"),
    ),
    "tasks": _command(
        "jaxprune.evaluate", "hf --eval zero-shot --tasks rte --tasks-data rows --out out", measured, "rows/*"
    ),
    "verify": _command(
        "jaxprune.verify",
        "pruned --against hf",
        verified,
        *("pruned/jaxprune.json", "pruned/model.safetensors", "hf/model.safetensors", "pruned/config.json"),
        may_deny=True,
    ),
    "solve": _command("jaxprune.solve", "layer.safetensors --out out", solved, "layer.safetensors"),
    "report": _command(
        "jaxprune.report", "pruned evaluation --out out", reported, "pruned/jaxprune.json", "evaluation/jaxprune.json"
    ),
}
LINES = ("run", "convert-hf", "evaluate", "verify", "solve", "report")
"""Commands whose options are varied as well; what they made is then only looked at as far as it is known."""
TARGETS = CALLS | RUNS | {f"{name}-line": RUNS[name] for name in LINES}
PROCESS_WIDE = ("--device", "--devices", "--dtype")
"""Options that change the process: such a case gets one of its own."""
UNTRIED = ("--coordinator", "--processes", "--process-id", "--help", "--all", "--timing", "--overwrite", "--resume")
"""Options that wait for other hosts, or take no value."""


def alone(case: str) -> bool:
    """Whether a case needs a process of its own."""
    return any(edit.file in PROCESS_WIDE for edit in mutations.parse(case).edits)


# The working folder.


def build(base: Path) -> None:
    """Makes all files, once; the same bytes each time."""
    import gguf
    import pyarrow
    import pyarrow.parquet
    import torch

    from convert.__main__ import main as convert
    from jaxprune import Unstructured, problems
    from jaxprune.evaluate import main as evaluate
    from jaxprune.methods.magnitude import Magnitude
    from jaxprune.run import main as run
    from tests import rows as task_rows
    from tests import tiny
    from tests.convert.test_gguf import write

    torch.set_num_threads(1)
    base.mkdir(parents=True)
    with contextlib.chdir(base), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        config = tiny.config(num_hidden_layers=2)
        tiny.save(Path("hf"), config)
        Path("hf/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        Path("hf/precious").write_text("a file of the user's")
        Path("precious").write_text("another")
        tiny.save(Path("shards"), config, max_shard_size="50KB")
        write(Path("f32.gguf"), config, gguf.GGMLQuantizationType.F32)
        quantized = tiny.config(num_hidden_layers=1, hidden_size=32, intermediate_size=64)
        write(Path("q8.gguf"), quantized, gguf.GGMLQuantizationType.Q8_0)
        tiny.write_text(Path("text.jsonl"), 30)
        texts = [json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines()]
        Path("text.txt").write_text("\n".join(texts))
        Path("text.json.gz").write_bytes(mutations.gzip.compress(Path("text.jsonl").read_bytes(), mtime=0))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "text.parquet")
        np.save("ids.npy", np.random.default_rng(0).integers(0, 300, (8, 16)))
        task_rows.write(Path("rows"))
        for file in Path("rows").iterdir():
            if file.stem != "rte":
                file.unlink()
        require(convert(["hf", "orbax", "--to", "orbax"]) == 0, "convert")
        line = f"--ckpt hf {PRUNE}".split()
        require(run([*line, "--out", "pruned", "--save-masks", "masks.safetensors"]) == 0, "run")
        require(evaluate([*"pruned --against hf --out evaluation".split(), *MEASURE.split()]) == 0, "evaluate")
        from convert import open_checkpoint

        tokens = np.load("ids.npy").astype(np.int32)
        (layer,) = problems.capture(
            open_checkpoint("hf"), tokens, [1], Magnitude(), Unstructured(0.5), prune_before=False
        )
        problems.save(Path("layer.safetensors"), layer)
        _interrupted([*line, "--out", "out"])
        Path("out.unfinished/precious").write_text("in a folder of ours")
        mutations.odd_paths(Path("odd"))


def _interrupted(line: list[str]) -> None:
    """A run that is stopped when all of it is written: its journal is left."""
    from unittest import mock

    from jaxprune.run import main as run

    with mock.patch("convert.hf.Writer.finish", side_effect=KeyboardInterrupt), open(os.devnull, "w") as null:
        with contextlib.redirect_stderr(null):
            require(run(line) == 130 and Path("out.unfinished").exists(), "no journal is left")


def singles(base: Path, names: Iterable[str]) -> Iterator[Case]:
    """Every case of one edit."""
    for name in names:
        target = TARGETS[name]
        if name.endswith("-line"):
            yield from (Case(name, (edit,)) for edit in _line_edits(target))
            continue
        for file in files(base, target):
            yield from (Case(name, (edit,)) for edit in mutations.edits_of(base, file))


def files(base: Path, target: Target) -> list[str]:
    """The files that a target's patterns name."""
    found = dict.fromkeys(path for pattern in target.files for path in sorted(base.glob(pattern)))
    return [str(path.relative_to(base)) for path in found if path.is_file() and "precious" not in path.name]


def _line_edits(target: Target) -> Iterator[Edit]:
    """Each value in place of each argument, and each option of the command with each value."""
    words = target.line.split()
    for kind in mutations.ARGUMENTS:
        yield from (Edit(str(place), kind) for place in range(len(words)) if not words[place].startswith("--"))
        yield from (Edit(flag, kind) for flag in _flags(target.module))


def _flags(module: str) -> list[str]:
    """A command's options, from its own help."""
    with open(os.devnull, "r+") as null, mutations.io.StringIO() as text:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(null), contextlib.suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
        found = re.findall(r"--[a-z][a-z-]+", text.getvalue())
    return [flag for flag in dict.fromkeys(found) if flag not in UNTRIED]


def cases(base: Path, names: Sequence[str], count: int, seed: int) -> list[str]:
    """Distinct cases: each target undisturbed, then single edits, drawn from each target and from each of its files in
    turn; when there are no more of them, two at a time.
    """
    chance = random.Random(seed)
    drawn = {str(Case(name)): None for name in names}
    turns = {}
    for name in names:
        by_file: dict[str, list[Case]] = {}
        for case in singles(base, [name]):
            by_file.setdefault(case.edits[0].file, []).append(case)
        for several in by_file.values():
            chance.shuffle(several)
        turns[name] = [case for turn in itertools.zip_longest(*by_file.values()) for case in turn if case]
    for turn in itertools.zip_longest(*turns.values()):
        drawn |= {str(case): None for case in turn if case}
        if len(drawn) >= count:
            return list(drawn)[:count]
    while turns and len(drawn) < count:
        name = chance.choice(names)
        first, second = (chance.choice(turns[name]).edits[0] for _ in range(2))
        drawn[str(Case(name, (first, second)))] = None
    return list(drawn)


# Trying a case.


class Room:
    """A worker's working folder, put back in order after each case.

    Args:
        base: what `build` made.
        folder: an empty one.
    """

    def __init__(self, base: Path, folder: Path) -> None:
        self.base = base
        # What is beside and above the working folder is watched as well.
        self._top = folder / "top"
        self._work = self._top / "work"
        self._fill()
        self._log = os.open(folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(self._log, 2)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        for name in ("HOME", "TMPDIR", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
            (folder / name).mkdir()
            os.environ[name] = str(folder / name)
        import datasets.config

        datasets.config.HF_DATASETS_CACHE = self._cache = folder / "HF_DATASETS_CACHE"

    def _fill(self) -> None:
        os.chdir("/")
        shutil.rmtree(self._top, ignore_errors=True)
        self._top.mkdir(parents=True)
        (self._top / "precious").write_text("above")
        shutil.copytree(self.base, self._work, symlinks=True, ignore=lambda *_: ["odd", "out.unfinished"])
        mutations.odd_paths(self._work / "odd")
        os.chdir(self._work)
        self._whole = inventory(self._top)

    def attempt(self, text: str) -> Outcome:
        """Tries a case."""
        case = mutations.parse(text)
        target = TARGETS[case.target]
        if case.target == "resume":
            shutil.copytree(self.base / "out.unfinished", "out.unfinished")
        for edit in case.edits:
            if not case.target.endswith("-line"):
                mutations.apply(Path(), edit)
        before = inventory(self._top)
        os.ftruncate(self._log, 0)
        outcome = self._call(target) if target.call else self._run(target, case)
        sys.stdout.flush()
        if outcome.status != "failed" and (changes := self._changes(before, case)):
            outcome = Outcome("failed", f"bystander: {changes}")
        self._restore()
        if not case.edits and outcome.status == "refused":
            return Outcome("failed", f"refused though nothing was changed: {outcome.detail}")
        return outcome

    def _call(self, target: Target) -> Outcome:
        assert target.call
        from convert.command import worded
        from convert.errors import UserError

        try:
            target.call()
        except UserError as error:
            line = f"error: {worded(error)}"
            return Outcome("failed", f"message: {line}") if _unfit(line) else Outcome("refused", line)
        return Outcome("succeeded")

    def _run(self, target: Target, case: Case) -> Outcome:
        words = target.line.split()
        varied = case.target.endswith("-line")
        for edit in case.edits if varied else ():
            value = mutations.ARGUMENTS[edit.kind]
            if edit.file.isdecimal():
                words[int(edit.file)] = value
            else:
                words.append(f"{edit.file}={value}")
        status: Any
        try:
            status = importlib.import_module(target.module).main(words)
        except SystemExit as error:
            status = error.code
        said = self.said()
        outcome = judged(status, said, target.may_deny)
        if outcome.status == "succeeded" and status == 0 and not varied:
            target.check(case, self.base)
        return outcome

    def said(self) -> str:
        """What stands on stderr, Rust's and C's messages too."""
        sys.stderr.flush()
        return os.pread(self._log, 10**6, 0).decode(errors="replace")

    def _changes(self, before: Mapping[str, Any], case: Case) -> str:
        """What a case has changed outside its own output; files of the user's count there too."""
        after = inventory(self._top)
        named = [mutations.ARGUMENTS[edit.kind] for edit in case.edits] if case.target.endswith("-line") else []

        def own(name: str) -> bool:
            if name not in before and any(value and name.startswith(f"work/{value}") for value in named):
                return True
            return name.startswith("work/out") and "precious" not in name

        changed = [n for n in {*before, *after} if before.get(n) != after.get(n) and not own(n)]
        words = {True: "appeared", False: "changed"}
        return ", ".join(
            f"{name} {words[name not in before] if name in after else 'is gone'}" for name in sorted(changed)[:5]
        )

    def _restore(self) -> None:
        """Puts back what a case and its edits have changed; all of it where that is more than files."""
        for name in self._cache.iterdir():
            shutil.rmtree(name, ignore_errors=True)
        try:
            os.chdir(self._work)
            after = inventory(self._top)
            changed = [n for n in {*self._whole, *after} if self._whole.get(n) != after.get(n)]
            for name in sorted(changed, key=len, reverse=True):
                path = self._top / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif name in after:
                    path.unlink(missing_ok=True)
            for name in sorted(set(changed) & self._whole.keys()):
                source, path = self.base / Path(name).relative_to("work"), self._top / name
                if source.is_dir():
                    path.mkdir(exist_ok=True)
                else:
                    shutil.copy2(source, path)
            self._whole = inventory(self._top)
        except (OSError, ValueError):
            self._fill()


def inventory(folder: Path) -> dict[str, tuple[int, ...]]:
    """Relative path -> what tells whether a file was replaced, written or made accessible to others."""
    found: dict[str, tuple[int, ...]] = {}

    def visit(path: str, prefix: str) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                it = entry.stat(follow_symlinks=False)
                name = prefix + entry.name
                if stat.S_ISDIR(it.st_mode):
                    found[name] = (it.st_mode,)
                    visit(entry.path, f"{name}/")
                else:
                    found[name] = (it.st_mode, it.st_ino, it.st_size, it.st_mtime_ns)

    visit(str(folder), "")
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def judged(status: Any, said: str, may_deny: bool) -> Outcome:
    """What a command's exit status and its stderr amount to."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    noise = [line for line in lines if not line.startswith(("error: ", "warning: ", NOTE))]
    if "Traceback (most recent call last)" in said:
        return Outcome("failed", said)
    if noise:
        return Outcome("failed", f"noise: {noise[0][:500]}")
    if status == 0 and not errors or status == 1 and may_deny and not errors:
        return Outcome("succeeded" if status == 0 else "refused")
    if status == 2 and len(errors) == 1:
        return Outcome("failed", f"message: {errors[0]}") if _unfit(errors[0]) else Outcome("refused", errors[0])
    return Outcome("failed", f"exit status {status} with {len(errors)} errors: {said[:500]}")


def _unfit(line: str) -> bool:
    return not line.removeprefix("error: ").strip() or len(line) > LONGEST or not line.isprintable()


def enter(base: Path, folder: Path) -> Callable[[str], Outcome]:
    """What `watchdog.watch` makes in each worker, once `base` is bound."""
    _share_compilations(base)
    room = Room(base, folder)

    def work(text: str) -> Outcome:
        try:
            return room.attempt(text)
        except BaseException:
            outcome = Outcome("failed", traceback.format_exc() + room.said())
            room._restore()
            return outcome

    return work


def plan(base: Path, names: Sequence[str], count: int, seed: int, folder: Path) -> Callable[[str], Outcome]:
    """A worker that builds what is not there, and draws cases; it keeps the heavy libraries out of the caller."""

    _share_compilations(base)

    def work(text: str) -> Outcome:
        if not base.exists():
            build(base)
        return Outcome("succeeded", "\n".join(cases(base, names, count, seed)))

    return work


def _share_compilations(base: Path) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(base.parent / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
