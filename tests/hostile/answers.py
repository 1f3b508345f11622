"""What a right answer is: of each function that opens and checks a file, and of what each command
makes.

All work in the current folder, which `files.build` describes. A wrong answer raises `Wrong`.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.mutations import Case

NEUTRAL = ("generation_config.json", "chat_template.jinja", "out.unfinished/")
"""Files that cannot change what a run makes of the weights: it ends in the same bytes, or is
refused."""


class Wrong(AssertionError):
    """A success that is none."""


def require(condition: object, problem: str) -> None:
    if not condition:
        raise Wrong(problem)


# Opening and validation.


def checkpoint(path: str) -> None:
    """All that is done before a checkpoint is pruned; and its tensors are those that were
    announced."""
    from convert import open_checkpoint
    from convert.assets import load_tokenizer, read_config
    from convert.consistency import check
    from jaxprune import StreamedModel

    reader = open_checkpoint(path)
    check(reader.spec, read_config(reader.assets))
    model = StreamedModel(reader).architecture
    require(
        model.spec.keys() == reader.spec.keys(), "the model has other params than the checkpoint"
    )
    for name, array in reader.read(reader.spec).items():
        wanted = reader.spec[name]
        require(
            (array.shape, array.dtype) == (wanted.shape, wanted.dtype),
            f"{name} is not what was announced",
        )
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
        calibration.calibration_windows(path, tokenizer, 2, 16, 0, pack=path.endswith(".txt")),
        calibration.evaluation_windows(path, tokenizer, 16, 2),
    ):
        fits = found.dtype == np.int32 and found.shape[1] == 16 and 1 <= len(found) <= 2
        require(fits, f"windows are {found.dtype}{list(found.shape)}")
        require(tokenizer or _among(found, path), "ids are not those of the file")


def _among(found: np.ndarray, path: str) -> bool:
    """Whether windows are the file's: the numbers, not their low bits."""
    rows = {tuple(int(one) for one in row[:16]) for row in np.load(path)}
    return all(tuple(map(int, row)) in rows for row in found)


def masks(path: str) -> None:
    from jaxprune.sparsity.masks import from_file

    stored = from_file(Path(path))
    for layer in range(2):
        for linear in ("self_attn.q_proj", "mlp.down_proj"):
            mask = stored(layer, linear)
            array = mask.read()
            require(
                array.dtype == bool and array.shape == tuple(mask.shape),
                "a mask is not what was announced",
            )


def problem(path: str) -> None:
    from jaxprune.api import snapshot as snapshots

    found = snapshots.load(Path(path))
    require(found.layer >= 0 and found.kernels and found.grams, "an empty problem")
    for name, array in found.arrays.items():
        require(
            array.ndim == (1 if name.startswith("outputs.") else 2), f"{name} has other dimensions"
        )
        require(np.isfinite(np.asarray(array, np.float64)).all(), f"{name} is not finite")
    require(
        0 <= found.asymmetry <= 1 and all(count >= 0 for count in found.tokens.values()),
        "an impossible number",
    )
    for linear, pattern in found.patterns.items():
        require(
            0 <= pattern.zeros(found.kernels[linear].shape) <= found.kernels[linear].size,
            "an impossible pattern",
        )


def record(path: str) -> None:
    from jaxprune.reporting import record as records
    from jaxprune.reporting.report_rows import checkpoints_of

    checkpoints_of([records.load(Path(path))])  # the figures take a second: the command draws them
    if run := records.run_of(Path(path)):
        records.expected(run)


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
        require(
            np.isfinite(np.asarray(array, np.float64)).all(),
            f"{folder}: {name} has values that are not finite",
        )
    return tensors


def pruned(dense: str) -> Callable[[Case, Path], None]:
    """A check of `out`: all tensors finite, exact zeros, all else as in the dense checkpoint, in
    the result's dtype."""

    def check(case: Case, base: Path) -> None:
        found, before = finite("out"), finite(dense)
        require(found.keys() == before.keys(), "tensors were lost or added")
        for name, array in found.items():
            if "_proj.kernel" in name:
                require(2 * np.count_nonzero(array == 0) >= array.size, f"{name} has too few zeros")
            else:
                expected = before[name].astype(array.dtype)
                require(
                    array.tobytes() == expected.tobytes(), f"{name} is not the dense checkpoint's"
                )
        # what has changed in a run store stays, and a warning says so
        damaged = case.target == "resume" and case.edits
        require(damaged or not Path("out.unfinished").exists(), "a run store is left")
        loads(Path("out/jaxprune.json"))
        if dense == "hf" and all(any(name in edit.file for name in NEUTRAL) for edit in case.edits):
            weights = Path("out/model.safetensors").read_bytes()
            require(
                weights == (base / "pruned/model.safetensors").read_bytes(),
                "other bytes than undisturbed",
            )

    return check


def converted(source: str) -> Callable[[Case, Path], None]:
    def check(case: Case, base: Path) -> None:
        from convert import open_checkpoint

        reader, made = open_checkpoint(source), open_checkpoint("out")
        tensors, copies = reader.read(reader.spec), made.read(made.spec)
        same = tensors.keys() == copies.keys() and all(
            a.tobytes() == copies[n].tobytes() for n, a in tensors.items()
        )
        require(same, "the copy has other tensors")

    return check


def measured(case: Case, base: Path) -> None:
    found = loads(Path("out/jaxprune.json"))
    for one in found["checkpoints"].values():
        for text in one["quality"]["texts"].values():
            perplexity = text["perplexity"]
            require(perplexity is None or 1 <= perplexity < math.inf, f"perplexity {perplexity}")
        for task in one["quality"]["tasks"].values():
            require(0 <= task["acc"] <= 1, f"accuracy {task['acc']}")


def solved(case: Case, base: Path) -> None:
    from jaxprune.api import snapshot as snapshots
    from jaxprune.sparsity.patterns import Partly

    layer = snapshots.load(Path("out"))
    for name, kernel in layer.kernels.items():
        zeros = layer.patterns[name].zeros(kernel.shape) if layer.patterns else kernel.size / 2
        if isinstance(layer.patterns.get(name), Partly):
            zeros = 0
        require(
            np.isfinite(kernel).all() and np.count_nonzero(kernel == 0) >= zeros,
            f"{name} is not pruned",
        )


def verified(case: Case, base: Path) -> None:
    finite("pruned")


def reported(case: Case, base: Path) -> None:
    text = Path("out").read_text(encoding="utf-8")
    require(text.startswith("<!doctype html>") and "</html>" in text, "a report that is none")


def plausible(case: Case, base: Path) -> None:
    """Of a command with other options: what it has made is what it says, and no number was none."""
    from jaxprune.commands.verify import main
    from tests.hostile.targets import TARGETS, options

    takes = options(TARGETS[case.target].module)
    for flag, kind, _ in case.edits:
        require(
            kind not in ("nan", "infinity") or takes.get(flag) not in ("N", "X"),
            f"{flag} may be {kind}",
        )
    if Path("out/model.safetensors").exists():
        require(main(["out"]) == 0, "what was made is not verified")


def loads(path: Path) -> Any:
    def refuse(name: str) -> Any:
        raise Wrong(f"{path} has {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def nothing(case: Case, base: Path) -> None:
    """A check of commands that make nothing."""
