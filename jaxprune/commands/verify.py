"""Verify what a pruned checkpoint claims, from its tensors. Exit status: 0 verified, 1 not."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from convert.hub import resolve
from jaxprune.api.verify import verify
from jaxprune.commands.command_line import CHECKPOINT, CommandLine, Section, make
from jaxprune.commands.terminal import command, console, print_table
from jaxprune.evaluation.verification import StoredKernel, Verdict, Which, name_of
from jaxprune.models.common.functional_modules import every_expert
from jaxprune.reporting import record as records
from jaxprune.reporting.record import Run
from jaxprune.sparsity.patterns import NM, RecipePattern, parse_pattern

EXAMPLES = """Examples:

    jaxprune verify ./pruned --against llama-7b
    jaxprune verify ./pruned --pattern 2:4
    jaxprune verify ./tuned --zeros-of ./pruned"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the checkpoint has to be."""

    against: str | None = None
    """The dense checkpoint. All tensors except pruned kernels must be bitwise identical to it. Its
    tensors are first rounded to the pruned checkpoint's dtype, or to the types of a GGUF file."""
    pattern: str | None = None
    """The pattern that every linear layer must have: unstructured, per-output, or N:M (default: as
    in jaxprune.json, else an N:M pattern that nearly all have)."""
    sparsity: float | None = None
    """The minimum fraction of zeros of every linear layer (default: as for --pattern)."""
    zeros_of: str | None = None
    """A pruned checkpoint. Its zeros must also be zeros here, as after fine-tuning."""
    all: bool = False
    """List every linear layer."""


MOST_PROBLEMS = 10
"""Maximum number of problems that are printed."""


def _rows(
    kernels: Mapping[Which, StoredKernel], every: bool
) -> Iterator[tuple[str, str, str, str]]:
    """Yields a row of each linear, or of all layers' linear layers of one name."""
    grouped: dict[str, list[StoredKernel]] = {}
    for which, linear in kernels.items():
        grouped.setdefault(name_of(which) if every else every_expert(which[1]), []).append(linear)
    for name, members in grouped.items():
        shares = [100 * linear.zeros / linear.size for linear in members]
        found = Counter(pattern for linear in members for pattern in linear.found)
        words = [
            f"{n}:{m} along {axis}" + ("" if count == len(members) else f" in {count}")
            for (n, m, axis), count in found.items()
        ]
        low, high = f"{min(shares):.4f} %", f"{max(shares):.4f} %"
        yield (
            name,
            str(len(members)),
            low if low == high else f"{low} to {high}",
            ", ".join(words) or "unstructured",
        )


@command
def main(argv: Sequence[str]) -> int:
    """Runs a command line; the exit status is 0 if the checkpoint is what it should be, else 1."""
    given = CommandLine(argv, __name__).read(
        Section("Requirements", Options), positionals={"checkpoint": CHECKPOINT}
    )
    wanted = make(Options, given)
    name, pattern = given["checkpoint"], None
    if wanted.pattern is not None or wanted.sparsity is not None:
        pattern = parse_pattern(wanted.pattern or "unstructured", wanted.sparsity)
    source = resolve(name)
    run = records.run_of(source)
    claimed = pattern or (_pattern_of(run) if run else None)
    verdict = verify(source, against=wanted.against, pattern=pattern, zeros_of=wanted.zeros_of)
    print_table(_rows(verdict.kernels, wanted.all), ("linear layer", "tensors", "zeros", "pattern"))
    for problem in verdict.problems[:MOST_PROBLEMS]:
        console.print(f"problem: {problem}")
    if (more := len(verdict.problems) - MOST_PROBLEMS) > 0:
        console.print(f"and {more} problems more")
    facts = ", ".join(_facts(verdict, wanted, run, claimed))
    if verdict.problems:
        console.print(f"not verified, {len(verdict.problems)} problems: {name}: {facts}")
        return 1
    verb = "verified"
    if not (run or claimed or wanted.against or wanted.zeros_of):
        verb, facts = "read", f"{facts}, without a run's record or a --pattern to verify"
    loads = (
        "configuration and tokenizer load"
        if verdict.tokenizer
        else "the configuration loads, there is no tokenizer"
    )
    console.print(f"{verb}: {name}: {facts}; every value is finite, {loads}")
    return 0


def _pattern_of(run: Run) -> RecipePattern | None:
    """Returns the pattern that a run's record claims for all linear layers, if any."""
    recipe = run.recipe
    if run.patterns_of_all or recipe.importance.max_deviation or recipe.mask:
        return None
    return recipe.pattern


def _facts(
    verdict: Verdict, wanted: Options, run: Run | None, claimed: RecipePattern | None
) -> Iterator[str]:
    """Yields the findings, and what they were compared with."""
    zeros, size = (
        sum(getattr(kernel, of) for kernel in verdict.kernels.values()) for of in ("zeros", "size")
    )
    yield f"{len(verdict.kernels)} linear layers"
    yield f"{100 * zeros / size:.4f} % zeros"
    if isinstance(claimed, NM):
        yield f"{claimed} along the inputs (columns of the stored [out, in])"
    elif claimed:
        yield str(claimed)
    elif run:
        yield run.pattern_text
    if wanted.against:
        dtype = f" in {verdict.dtype.name}" if verdict.dtype else ""
        yield f"{verdict.compared} other tensors compared with {wanted.against}{dtype}"
    if verdict.problems:
        return
    if run and run.recipe.quantize:
        yield f"on the grid of {run.recipe.quantize.upper()}"
    if wanted.zeros_of:
        yield f"all zeros of {wanted.zeros_of} kept"
