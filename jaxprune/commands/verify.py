"""Prove from the stored tensors what a pruned checkpoint claims. Exit status: 0 verified, 1 not."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from convert.hub import resolve
from jaxprune.api.verify import verify
from jaxprune.commands.options import CHECKPOINT, CommandLine, Section, make
from jaxprune.commands.terminal import command, console, print_table
from jaxprune.evaluation.verification import StoredKernel, Which, name_of
from jaxprune.models.common.functional_modules import every_expert
from jaxprune.reporting import reading
from jaxprune.sparsity.patterns import NM, parse_pattern

EXAMPLES = """Examples:

    jaxprune verify ./pruned --against llama-7b
    jaxprune verify ./pruned --pattern 2:4
    jaxprune verify ./tuned --zeros-of ./pruned"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the checkpoint has to be."""

    against: str | None = None
    """The dense checkpoint that it was made from: all but the pruned kernels must be the same, bit
    for bit. Its tensors are first rounded to the pruned checkpoint's dtype; for a GGUF file, to the
    file's types."""
    pattern: str | None = None
    """The pattern that every linear layer must have: unstructured, per-output, or N:M (default:
    what jaxprune.json says; else an N:M that nearly all have)."""
    sparsity: float | None = None
    """The fraction of zeros that every linear layer must have at least (default: as --pattern)."""
    zeros_of: str | None = None
    """A pruned checkpoint, whose zeros must be zeros here too: a fine-tuning has kept them."""
    all: bool = False
    """List every linear layer."""


MOST_PROBLEMS = 10
"""So many are printed."""


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
    """Runs a command line."""
    given = CommandLine(argv, __name__).read(
        Section("What it has to be", Options), positionals={"checkpoint": CHECKPOINT}
    )
    wanted = make(Options, given)
    name, pattern = given["checkpoint"], None
    if wanted.pattern is not None or wanted.sparsity is not None:
        pattern = parse_pattern(wanted.pattern or "unstructured", wanted.sparsity)
    source = resolve(name)
    run = reading.run_of(source)
    recipe = run.recipe if run and not run.patterns_of_all else None
    by_pattern = recipe is not None and not recipe.importance.spread and not recipe.mask
    claimed = pattern or (recipe.pattern if recipe and by_pattern else None)
    verdict = verify(source, against=wanted.against, pattern=pattern, zeros_of=wanted.zeros_of)
    print_table(_rows(verdict.kernels, wanted.all), ("linear layer", "tensors", "zeros", "pattern"))
    for problem in verdict.problems[:MOST_PROBLEMS]:
        console.print(f"problem: {problem}")
    if (more := len(verdict.problems) - MOST_PROBLEMS) > 0:
        console.print(f"and {more} problems more")
    total = [
        sum(getattr(kernel, of) for kernel in verdict.kernels.values()) for of in ("zeros", "size")
    ]
    facts = f"{len(verdict.kernels)} linear layers, {100 * total[0] / total[1]:.4f} % zeros"
    words = str(claimed) if claimed else run.pattern_text if run else ""
    facts += f", {words}" * bool(words)
    facts += " along the inputs (columns of the stored [out, in])" * isinstance(claimed, NM)
    if wanted.against:
        facts += f", {verdict.compared} other tensors compared with {wanted.against}"
        facts += f" in {verdict.dtype.name}" if verdict.dtype else ""
    if run and run.recipe.quantize and not verdict.problems:
        facts += f", on the grid of {run.recipe.quantize.upper()}"
    facts += f", all zeros of {wanted.zeros_of} kept" * bool(
        wanted.zeros_of and not verdict.problems
    )
    if verdict.problems:
        console.print(f"not verified, {len(verdict.problems)} problems: {name}: {facts}")
        return 1
    loads = (
        "configuration and tokenizer load"
        if verdict.tokenizer
        else "the configuration loads, there is no tokenizer"
    )
    nothing = not (run or claimed or wanted.against or wanted.zeros_of)
    facts += ", without a record of a run or a --pattern to prove" * nothing
    console.print(
        f"{'read' if nothing else 'verified'}: {name}: {facts}; every value is finite, {loads}"
    )
    return 0
