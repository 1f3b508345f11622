"""Proof from the stored tensors of what a pruned checkpoint claims."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from convert import Reader
from convert.assets import has_tokenizer
from convert.casting import cast_spec, common_dtype, saving_dtype
from convert.checkpoint import rounding
from jaxprune.methods.quantization import BITS, has_grid, off_grid
from jaxprune.sparsity.masks import Masks, StoredMask
from jaxprune.sparsity.patterns import NM, Pattern, Projections, Unstructured, by_projection
from jaxprune.streaming.model import StreamedModel

GROUPS = (2, 4, 8)
"""Sizes of groups in which N:M is looked for."""
AXES = ("inputs", "outputs")
"""Of a kernel [in, out]; the stored tensor of a Hugging Face checkpoint is [out, in]."""
Which = tuple[int, str]
"""Index of a decoder layer, path of a linear layer in it."""


class StoredKernel(NamedTuple):
    """What one stored kernel is.

    Attributes:
        zeros: exact zeros.
        size: weights.
        found: (N, M, axis) of each N:M that it has, with N at most half of M: for each axis that of
            the smallest M.
        projections: zeros of each of the linear layers that lie side by side in it.
    """

    zeros: int
    size: int
    found: tuple[tuple[int, int, str], ...]
    projections: Mapping[str, int] = MappingProxyType({})


class Verdict(NamedTuple):
    """The outcome.

    Attributes:
        kernels: (layer index, path of the linear layer) -> what it is.
        problems: one line each; none if the checkpoint is what it should be.
        compared: number of tensors, others and kernels that stay dense, that were compared with the
            dense checkpoint's.
        tokenizer: whether there is a tokenizer, which loads.
        dtype: the dtype that the dense tensors were rounded to before they were compared; None:
            they have it.
    """

    kernels: dict[Which, StoredKernel]
    problems: list[str]
    compared: int = 0
    tokenizer: bool = True
    dtype: np.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a checkpoint is to be.

    Attributes:
        pattern: the pattern that every kernel must have. None: an N:M, if nine in ten kernels have
            it and there is no `total`.
        own: kernels that need not have it, but another one; None: they stay dense.
        counts: zeros that every kernel was left with; it must have exactly those.
        wanted: zeros that every kernel must have at least.
        projections: zeros of each of the linear layers that lie side by side in one, which must
            have exactly those.
        total: zeros that all kernels together must have at least.
        masks: where every kernel must be zero at least.
        reoptimized: kernels that may differ from the dense checkpoint's because units that they
            read were removed.
        solved: whether kernels were pruned, tuned or quantized.
        quantization: the type of GGUF files that must hold every kernel as it is, if it comes in
            whole blocks.
    """

    pattern: Pattern | None = None
    own: Mapping[Which, Pattern | None] = dataclasses.field(default_factory=dict)
    counts: Mapping[Which, int] | None = None
    wanted: Mapping[Which, int] | None = None
    projections: Mapping[Which, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    total: int | None = None
    masks: Masks | None = None
    reoptimized: Collection[Which] = ()
    solved: bool = True
    quantization: str | None = None


def verify(
    model: StreamedModel, claims: Claims = Claims(), against: StreamedModel | None = None
) -> Verdict:
    """Reads every tensor, one at a time, and says what is not as it should be.

    Args:
        model: pruned.
        claims: what it is to be.
        against: the dense one.

    Raises:
        InputError, CheckpointError: the checkpoint cannot be read, or is no model.
    """
    reader, dense = model.reader, against.reader if against else None
    dtype = _dtype_of_both(reader, dense) if dense else None
    tokenizer = any(map(has_tokenizer, [reader.assets, *([dense.assets] if dense else [])]))
    if tokenizer:
        _ = model.tokenizer  # which has to load
    names = {name_of(which): which for which in model.architecture.kernel_shapes()}
    every = model.architecture.kernel_shapes(routers=True)
    # routers that were pruned, too
    names |= {name_of(which): which for which in claims.counts or {} if which in every}
    problems = _differences(reader, dense, dtype) if dense else []
    kernels: dict[Which, StoredKernel] = {}
    compared = 0
    for name in reader.spec:
        array = reader.read([name])[name]
        if bad := int(np.size(array) - np.count_nonzero(np.isfinite(array))):
            problems.append(f"{name} holds {bad} values that are NaN or infinite")
        if name in names:
            which = names[name]
            kernels[which] = _examine(
                array, model.architecture.layers[which[0]].projections.get(which[1], ())
            )
            problems += [
                f"{name} {fault}" for fault in _faults(array, which, claims, finite=not bad)
            ]
            if _may_differ(which, claims):
                continue
        compared += dense is not None
        if dense and name in dense.spec:
            its_own = dense.read([name])[name]
            if not any(
                _same(array, one) for one in _as_stored(name, its_own, reader, dense, dtype)
            ):
                how = f"rounded to {dtype.name}" if dtype else "bit for bit"
                how = "as its type rounds it" if rounding(reader) else how
                problems.append(f"{name} is not the dense checkpoint's, {how}")
    if claims.counts is not None:
        problems += _miscounted(kernels, claims.counts)
        problems += _misplaced(kernels, claims.projections)
    found = sum(kernel.zeros for kernel in kernels.values())
    if claims.total is not None and found < claims.total:
        fewer = claims.total - found
        problems.append(f"the kernels have {found} zeros in total, {fewer} fewer than were wanted")
    if claims.pattern is None and claims.total is None:
        problems += _outliers(
            {which: kernel for which, kernel in kernels.items() if which not in claims.own}
        )
    return Verdict(kernels, problems, compared, tokenizer, dtype)


def _may_differ(which: Which, claims: Claims) -> bool:
    """Returns whether a kernel may differ from the dense checkpoint's."""
    dense = not claims.quantization and which in claims.own and claims.own[which] is None
    return which in claims.reoptimized or (claims.solved and not dense)


def _faults(
    array: Shaped[np.ndarray, "n m"], which: Which, claims: Claims, *, finite: bool
) -> Iterator[str]:
    """Yields what a kernel is not as it is to be."""
    pattern = claims.own.get(which, claims.pattern)
    yield from _violations(array, pattern, (claims.wanted or {}).get(which))
    yield from _moved(array, claims.masks and claims.masks(*which))
    if (kind := claims.quantization) and finite and has_grid(len(array)):
        if count := off_grid(array, BITS[kind]):
            yield f"has {count} weights off the grid of {kind.upper()}"


def zeros(model: StreamedModel) -> dict[Which, tuple[int, int]]:
    """Counts the kernels' zeros: (layer index, path of the linear layer) -> its zeros, its
    weights."""
    counts = {}
    for which in model.architecture.kernel_shapes():
        kernel = model.reader.read([name_of(which)])[name_of(which)]
        counts[which] = (int(np.count_nonzero(kernel == 0)), kernel.size)
    return counts


def _miscounted(
    kernels: Mapping[Which, StoredKernel], counts: Mapping[Which, int]
) -> Iterator[str]:
    """Yields the kernels whose zeros are not those that a record counted."""
    for which in sorted(kernels.keys() | counts.keys()):
        if which not in counts:
            yield f"{name_of(which)} is not in the record"
        elif which not in kernels:
            yield f"{name_of(which)} is missing: the record has it"
        elif kernels[which].zeros != counts[which]:
            yield (
                f"{name_of(which)} has {kernels[which].zeros} zeros, not {counts[which]} as the "
                "record says"
            )


def _misplaced(
    kernels: Mapping[Which, StoredKernel], wanted: Mapping[Which, Mapping[str, int]]
) -> Iterator[str]:
    """Yields the kernels that have as many zeros as a record counted, but not in the projections
    that it counted them."""
    for which, counted in wanted.items():
        found = kernels[which].projections if which in kernels else counted
        if found != counted and sum(found.values()) == sum(counted.values()):
            yield (
                f"{name_of(which)} has {dict(found)} zeros, not {dict(counted)} as the record says"
            )


def name_of(which: Which) -> str:
    """Returns the path of a kernel in a checkpoint."""
    return f"layers.{which[0]}.{which[1]}.kernel"


def _dtype_of_both(reader: Reader, dense: Reader) -> np.dtype | None:
    """Returns the dtype that a dense checkpoint is rounded to for a comparison; None: it stays as
    it is."""
    dtype = None if rounding(reader) else common_dtype(reader.spec)
    return None if dtype is None or cast_spec(dense.spec, dtype) == dense.spec else dtype


def _as_stored(
    name: str,
    array: np.ndarray,
    reader: Reader,
    dense: Reader,
    dtype: np.dtype | None,
) -> Iterator[np.ndarray]:
    """Yields a dense tensor as the pruned checkpoint may have it. A file of a format that rounds is
    made from the dense tensor, or from that tensor in the dtype that runs save."""
    if held := rounding(reader):
        yield held(name, array)
        dtype = saving_dtype(dense)
    with np.errstate(over="ignore"):  # infinity is no pruned checkpoint's
        cast = (
            array
            if dtype is None
            else array.astype(cast_spec({name: dense.spec[name]}, dtype)[name].dtype)
        )
    yield held(name, cast) if held else cast


def _differences(reader: Reader, dense: Reader, dtype: np.dtype | None) -> list[str]:
    """Returns the tensors that one of the checkpoints lacks, or that have another shape or
    dtype."""
    rounds = rounding(reader) is not None
    problems = [
        f"{name} is missing: the dense checkpoint has it"
        for name in dense.spec
        if name not in reader.spec
    ]
    spec = dense.spec if dtype is None else cast_spec(dense.spec, dtype)
    for name, tensor in reader.spec.items():
        if name not in spec:
            problems.append(f"{name} is surplus: the dense checkpoint lacks it")
        elif tensor.shape != spec[name].shape or not (rounds or tensor.dtype == spec[name].dtype):
            wanted = spec[name]
            problems.append(
                f"{name} is {tensor.dtype.name}{list(tensor.shape)}, the dense checkpoint's "
                f"{wanted.dtype.name}{list(wanted.shape)}"
            )
    return problems


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _examine(kernel: Shaped[np.ndarray, "n m"], projections: Projections) -> StoredKernel:
    kept = kernel != 0
    found = []
    for axis, name in enumerate(AXES):
        for size in GROUPS:
            most = _most(kept, size, axis)
            if most is not None and 2 * most <= size:
                found.append((most, size, name))
                break
    zeros = np.count_nonzero(~kept, axis=0)
    return StoredKernel(
        int(zeros.sum()), kept.size, tuple(found), by_projection(zeros, projections)
    )


def _most(kept: Shaped[np.ndarray, "n m"], size: int, axis: int) -> int | None:
    """Returns the most weights kept in a group; None where groups do not come out even."""
    return None if kept.shape[axis] % size else int(_groups(kept, size, axis).max())


def _groups(kept: Shaped[np.ndarray, "n m"], size: int, axis: int) -> np.ndarray:
    """Returns how many of every `size` consecutive weights along an axis are kept: [groups,
    others]."""
    along = kept if axis == 0 else kept.T
    return along.reshape(-1, size, along.shape[1]).sum(axis=1)


def _violations(
    kernel: Shaped[np.ndarray, "n m"], pattern: Pattern | None, wanted: int | None
) -> Iterator[str]:
    """Yields what a kernel lacks of its pattern, and of the zeros that it had to get (None: as many
    as the pattern's)."""
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
                f"is not {pattern} along its inputs: {len(bad)} groups keep more than {pattern.n}, "
                "the first at inputs "
                f"{group * pattern.m} to {(group + 1) * pattern.m - 1} of output {output}{hint}"
            )
    elif isinstance(pattern, Unstructured):
        least = pattern.zeros(kept.shape)
        if pattern.per_output:
            least //= kept.shape[1]
            short = np.flatnonzero((~kept).sum(axis=0) < least)
            if len(short):
                yield (
                    f"has fewer than {least} zeros in {len(short)} outputs, the first of them "
                    f"{short[0]}"
                )
        elif wanted is None and found < least:
            yield f"has {found} zeros, {least - found} fewer than {pattern} of {kept.size} weights"
    if wanted is not None and found < wanted:
        yield f"has {found} zeros, {wanted - found} fewer than were wanted of {kept.size} weights"


def _moved(kernel: Shaped[np.ndarray, "n m"], mask: StoredMask | None) -> Iterator[str]:
    """Yields how many weights a kernel has where a mask has none."""
    if mask is None:
        return
    if mask.shape != kernel.shape:
        yield f"is {list(kernel.shape)}, and the masks' {list(mask.shape)}"
    elif count := int(np.count_nonzero((kernel != 0) & ~mask.read())):
        yield f"has {count} weights where there were zeros"


def _outliers(kernels: Mapping[Which, StoredKernel]) -> list[str]:
    """Returns the kernels without an N:M that nearly all the others have."""
    common = Counter(pattern for kernel in kernels.values() for pattern in kernel.found)
    problems = []
    for (n, m, axis), count in common.items():
        if 0.9 * len(kernels) <= count < len(kernels):
            without = [
                which for which, kernel in kernels.items() if (n, m, axis) not in kernel.found
            ]
            problems += [
                f"{name_of(which)} is not {n}:{m} along its {axis}, as {count} others are"
                for which in without
            ]
    return problems
