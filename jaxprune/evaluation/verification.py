"""Proof from the stored tensors of what a pruned checkpoint claims."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from convert import Reader
from convert.assets import load_tokenizer
from jaxprune.models import model_for
from jaxprune.pruning.pipeline import linear_shapes
from jaxprune.reporting import schema
from jaxprune.reporting.schema import RECORD
from jaxprune.sparsity import patterns
from jaxprune.sparsity.patterns import NM, Pattern, Unstructured

GROUPS = (2, 4, 8)
"""Sizes of groups in which N:M is looked for."""
AXES = ("inputs", "outputs")
"""Of a kernel [in, out]; the stored tensor of a Hugging Face checkpoint is [out, in]."""


Which = tuple[int, str]
"""Index of a layer, path of a linear in it."""


class Linear(NamedTuple):
    """What one stored kernel is.

    Attributes:
        zeros: exact zeros.
        size: weights.
        found: (N, M, axis) of each N:M that it has, with N at most half of M: for each axis that of the smallest M.
    """

    zeros: int
    size: int
    found: tuple[tuple[int, int, str], ...]


class Verdict(NamedTuple):
    """The outcome.

    Attributes:
        linears: (layer index, path of the linear) -> what it is.
        problems: one line each; none if the checkpoint is what it should be.
    """

    linears: dict[Which, Linear]
    problems: list[str]


def verify(
    reader: Reader,
    *,
    against: Reader | None = None,
    pattern: Pattern | None = None,
    counts: Mapping[Which, int] | None = None,
    wanted: Mapping[Which, int] | None = None,
    total: int | None = None,
) -> Verdict:
    """Reads every tensor, one at a time.

    Args:
        reader: the pruned checkpoint.
        against: the dense one.
        pattern: that every linear must have. None: an N:M, if nine in ten linears have it.
        counts: zeros that every linear was left with; it must have exactly those.
        wanted: zeros that every linear must have at least.
        total: zeros that all linears together must have at least.

    Raises:
        InputError, CheckpointError: the checkpoint cannot be read, or is no model.
    """
    shapes = linear_shapes(model_for(reader))
    load_tokenizer(reader.assets)
    names = {f"layers.{index}.{path}.kernel": (index, path) for index, path in shapes}
    problems = _differences(reader, against) if against else []
    linears: dict[Which, Linear] = {}
    for name in reader.spec:
        array = reader.read([name])[name]
        if bad := int(np.size(array) - np.count_nonzero(np.isfinite(array))):
            problems.append(f"{name} holds {bad} values that are NaN or infinite")
        if name in names:
            linears[names[name]] = _examine(array)
            problems += [
                f"{name} {problem}" for problem in _violations(array, pattern, (wanted or {}).get(names[name]))
            ]
        elif against and name in against.spec and not _same(array, against.read([name])[name]):
            problems.append(f"{name} is not the dense checkpoint's, bit for bit")
    if counts is not None:
        problems += _miscounted(linears, counts)
    found = sum(linear.zeros for linear in linears.values())
    if total is not None and found < total:
        problems.append(f"the linears have {found} zeros in total, {total - found} fewer than were wanted")
    if pattern is None:
        problems += _outliers(linears)
    return Verdict(linears, problems)


def zeros(reader: Reader) -> dict[Which, tuple[int, int]]:
    """(layer index, path of the linear) -> its zeros, its weights."""
    counts = {}
    for index, path in linear_shapes(model_for(reader)):
        name = f"layers.{index}.{path}.kernel"
        kernel = reader.read([name])[name]
        counts[index, path] = (int(np.count_nonzero(kernel == 0)), kernel.size)
    return counts


def expected(run: schema.Run) -> dict[str, Any]:
    """What a run's record says of its checkpoint, as `verify` takes it."""
    linears = {(layer.index, path): linear for layer in run.layers for path, linear in layer.linears.items()}
    pattern = patterns.from_json(run.pattern)
    total: int | None = None
    if pattern and run.importance.spread:  # every linear had a sparsity of its own
        total = round(pattern.sparsity * sum(linear.size for linear in linears.values()))
        pattern = None
    return {
        "pattern": pattern,
        "counts": {which: linear.zeros for which, linear in linears.items()},
        "wanted": {which: linear.wanted for which, linear in linears.items()},
        "total": total,
    }


def _miscounted(linears: Mapping[Which, Linear], counts: Mapping[Which, int]) -> Iterator[str]:
    """Linears whose zeros are not those that a record counted."""
    for which in sorted(linears.keys() | counts.keys()):
        if which not in counts:
            yield f"{name_of(which)} is not in {RECORD}"
        elif which not in linears:
            yield f"{name_of(which)} is missing: {RECORD} has it"
        elif linears[which].zeros != counts[which]:
            yield f"{name_of(which)} has {linears[which].zeros} zeros, not {counts[which]} as {RECORD} says"


def name_of(which: Which) -> str:
    return f"layers.{which[0]}.{which[1]}.kernel"


def _differences(reader: Reader, dense: Reader) -> list[str]:
    """Tensors that one of the checkpoints lacks, or that have another shape or dtype."""
    problems = [f"{name} is missing: the dense checkpoint has it" for name in dense.spec if name not in reader.spec]
    for name, tensor in reader.spec.items():
        if name not in dense.spec:
            problems.append(f"{name} is surplus: the dense checkpoint lacks it")
        elif (tensor.shape, tensor.dtype) != (dense.spec[name].shape, dense.spec[name].dtype):
            wanted = dense.spec[name]
            problems.append(
                f"{name} is {tensor.dtype.name}{list(tensor.shape)}, the dense checkpoint's "
                f"{wanted.dtype.name}{list(wanted.shape)}"
            )
    return problems


def _same(a: Shaped[np.ndarray, "..."], b: Shaped[np.ndarray, "..."]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _examine(kernel: Shaped[np.ndarray, "n m"]) -> Linear:
    kept = kernel != 0
    found = []
    for axis, name in enumerate(AXES):
        for size in GROUPS:
            most = _most(kept, size, axis)
            if most is not None and 2 * most <= size:
                found.append((most, size, name))
                break
    return Linear(int(kept.size - np.count_nonzero(kept)), kept.size, tuple(found))


def _most(kept: Shaped[np.ndarray, "n m"], size: int, axis: int) -> int | None:
    """The most weights kept in a group; None where groups do not come out even."""
    return None if kept.shape[axis] % size else int(_groups(kept, size, axis).max())


def _groups(kept: Shaped[np.ndarray, "n m"], size: int, axis: int) -> np.ndarray:
    """How many of every `size` consecutive weights along an axis are kept: [groups, others]."""
    along = kept if axis == 0 else kept.T
    return along.reshape(-1, size, along.shape[1]).sum(axis=1)


def _violations(kernel: Shaped[np.ndarray, "n m"], pattern: Pattern | None, wanted: int | None) -> Iterator[str]:
    """What a kernel lacks of its pattern, and of the zeros that it had to get (None: as many as the pattern's)."""
    kept = kernel != 0
    found = int(np.count_nonzero(~kept))
    if isinstance(pattern, NM):
        if kept.shape[0] % pattern.m:
            yield f"has {kept.shape[0]} inputs, which groups of {pattern.m} do not divide"
            return
        bad = np.argwhere(_groups(kept, pattern.m, 0) > pattern.n)
        if len(bad):
            hint = ""
            if (most := _most(kept, pattern.m, 1)) is not None and most <= pattern.n:
                hint = f"; it is {pattern} along the outputs instead, as if transposed"
            group, output = bad[0]
            yield (
                f"is not {pattern} along its inputs: {len(bad)} groups keep more than {pattern.n}, the first at inputs "
                f"{group * pattern.m} to {(group + 1) * pattern.m - 1} of output {output}{hint}"
            )
    elif isinstance(pattern, Unstructured):
        least = pattern.zeros(kept.shape)
        if pattern.per_output:
            # A record of version 1 has six digits of the sparsity: what it counted decides where they are too few.
            least = min(least, least if wanted is None else wanted) // kept.shape[1]
            short = np.flatnonzero((~kept).sum(axis=0) < least)
            if len(short):
                yield f"has fewer than {least} zeros in {len(short)} outputs, the first of them {short[0]}"
        elif wanted is None and found < least:
            yield f"has {found} zeros, {least - found} fewer than {pattern} of {kept.size} weights"
    if wanted is not None and found < wanted:
        yield f"has {found} zeros, {wanted - found} fewer than were wanted of {kept.size} weights"


def _outliers(linears: Mapping[Which, Linear]) -> list[str]:
    """Linears without an N:M that nearly all the others have."""
    common = Counter(pattern for linear in linears.values() for pattern in linear.found)
    problems = []
    for (n, m, axis), count in common.items():
        if 0.9 * len(linears) <= count < len(linears):
            without = [which for which, linear in linears.items() if (n, m, axis) not in linear.found]
            problems += [
                f"{name_of(which)} is not {n}:{m} along its {axis}, as {count} others are" for which in without
            ]
    return problems
