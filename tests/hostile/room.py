"""A working folder in which cases are tried, one after another, and put back in order after
each."""

import functools
import importlib
import os
import re
import shutil
import stat
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.hostile import answers, files, mutations
from tests.hostile.mutations import Case
from tests.hostile.targets import TARGETS, Target, alone, cases
from tests.hostile.watchdog import Limits, Outcome, Result, watch

PRELOAD = (
    "tests.hostile.room",
    "jaxprune.run",
    "jaxprune.commands.evaluate",
    "jaxprune.commands.solve",
    "jaxprune.commands.verify",
)
PRELOAD += (
    "convert.__main__",
    "transformers",
    "transformers.models.llama",
    "orbax.checkpoint",
    "datasets",
)
PRELOAD += ("lm_eval.evaluator", "lm_eval.tasks")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "critical",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
}

NOTE = "finished work is saved in "
"""Begins the one line beside warnings that may stand before or after an error."""
LONGEST = 2000 + len("error: ")
_BUILDING = Limits(600, first=600, memory=8e9)


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
        shutil.copytree(
            self.base, self._work, symlinks=True, ignore=lambda *_: ["odd", "out.unfinished"]
        )
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
        os.ftruncate(2, 0)
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
            return (
                Outcome("failed", f"message: {line}") if _unfit(line) else Outcome("refused", line)
            )
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
        if outcome.status == "succeeded":
            (answers.plausible if varied else target.check)(case, self.base)
        return outcome

    def said(self) -> str:
        """What stands on stderr, Rust's and C's messages too."""
        sys.stderr.flush()
        return os.pread(2, 10**6, 0).decode(errors="replace")

    def _changes(self, before: Mapping[str, Any], case: Case) -> str:
        """What a case has changed outside its own output; files of the user's count there too."""
        after = inventory(self._top)
        named = (
            [mutations.ARGUMENTS[edit.kind] for edit in case.edits]
            if case.target.endswith("-line")
            else []
        )

        def own(name: str) -> bool:
            if name not in before and any(
                value and name.startswith(f"work/{value}") for value in named
            ):
                return True
            return name.startswith("work/out") and "precious" not in name

        changed = [n for n in {*before, *after} if before.get(n) != after.get(n) and not own(n)]
        words = {True: "appeared", False: "changed"}
        return ", ".join(
            f"{name} {words[name not in before] if name in after else 'is gone'}"
            for name in sorted(changed)[:5]
        )

    def _restore(self) -> None:
        """Puts back what a case and its edits have changed; all of it where that is more than
        files."""
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
                    shutil.copy2(source, path, follow_symlinks=False)
            self._whole = inventory(self._top)
        except (OSError, ValueError):
            self._fill()


def inventory(folder: Path) -> dict[str, tuple[int, ...]]:
    """Relative path -> what tells whether a file was replaced, written or made accessible to
    others.

    The time of its last change is the system's own: unlike the time of the last write, nobody can
    put it back, so that equal ones mean an equal content.
    """
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
                    found[name] = (it.st_mode, it.st_ino, it.st_size, it.st_ctime_ns)

    visit(str(folder), "")
    return found


def judged(status: Any, said: str, may_deny: bool) -> Outcome:
    """What a command's exit status and its stderr amount to."""
    # progress bars
    lines = [line for line in said.splitlines() if line.strip() and not re.search(r"\d%\|", line)]
    errors = [line for line in lines if line.startswith("error: ")]
    noise = [line for line in lines if not line.startswith(("error: ", "warning: ", NOTE))]
    if "Traceback (most recent call last)" in said:
        return Outcome("failed", said)
    if noise:
        return Outcome("failed", f"noise: {noise[0][:500]}")
    if status == 0 and not errors or status == 1 and may_deny and not errors:
        return Outcome("succeeded" if status == 0 else "refused")
    if status == 2 and len(errors) == 1:
        return (
            Outcome("failed", f"message: {errors[0]}")
            if _unfit(errors[0])
            else Outcome("refused", errors[0])
        )
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


def attempt_all(
    base: Path, names: Sequence[str], count: int, seed: int, limits: Limits, workers: int = 2
) -> Iterator[Result]:
    """The results of so many cases of some targets."""
    drawn = draw(base, names, count, seed)
    yield from watch(drawn, functools.partial(enter, base), limits, workers=workers, alone=alone)


def draw(base: Path, names: Sequence[str], count: int, seed: int) -> list[str]:
    """So many cases; the files that they start from are made where they are not there."""
    (drawn,) = watch([""], functools.partial(_plan, base, names, count, seed), _BUILDING, workers=1)
    if drawn.outcome.status != "succeeded":
        raise RuntimeError(f"the files could not be made: {drawn.outcome.detail}")
    return drawn.outcome.detail.splitlines()


def _plan(
    base: Path, names: Sequence[str], count: int, seed: int, folder: Path
) -> Callable[[str], Outcome]:
    """A worker that builds what is not there, and draws cases; it keeps the heavy libraries out of
    the caller."""

    _share_compilations(base)

    def work(text: str) -> Outcome:
        if not base.exists():
            files.build(base)
        return Outcome("succeeded", "\n".join(cases(base, names, count, seed)))

    return work


def _share_compilations(base: Path) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(base.parent / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
