"""Prove from the stored tensors what a pruned checkpoint claims. Exit status: 0 verified, 1 not."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import open_checkpoint
from convert.command import ArgumentParser
from jaxprune.commands.flags import add_fields, make
from jaxprune.commands.terminal import console, print_table, run_main
from jaxprune.evaluation.verification import Linear, Which, expected, name_of, verify
from jaxprune.reporting import schema
from jaxprune.sparsity import patterns
from jaxprune.sparsity.patterns import NM


@dataclasses.dataclass(frozen=True)
class Options:
    """What the checkpoint has to be."""

    against: str | None = None
    """The dense checkpoint that it was made from: all but the linears must be the same, bit for bit."""
    pattern: str | None = None
    """The pattern that every linear must have: unstructured, per-output, or N:M (default: what jaxprune.json says; else
    an N:M that nearly all linears have)."""
    sparsity: float | None = None
    """The fraction of zeros that every linear must have at least (default: as --pattern)."""
    all: bool = False
    """List every linear."""


def _rows(linears: Mapping[Which, Linear], every: bool) -> Iterator[tuple[str, str, str, str]]:
    """Of each linear, or of all layers' linears of one name."""
    grouped: dict[str, list[Linear]] = {}
    for which, linear in linears.items():
        grouped.setdefault(name_of(which) if every else which[1], []).append(linear)
    for name, members in grouped.items():
        shares = [100 * linear.zeros / linear.size for linear in members]
        found = Counter(pattern for linear in members for pattern in linear.found)
        words = [
            f"{n}:{m} along {axis}" + ("" if count == len(members) else f" in {count}")
            for (n, m, axis), count in found.items()
        ]
        low, high = f"{min(shares):.4f} %", f"{max(shares):.4f} %"
        yield name, str(len(members)), low if low == high else f"{low} to {high}", ", ".join(words) or "unstructured"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0 if the checkpoint is what it should be, else 1."""
    return run_main(_main, argv)


def _main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="jaxprune verify",
        description="Prove from the stored tensors what a pruned checkpoint claims. Exit status: 0 verified, 1 not.",
    )
    parser.add_argument("checkpoint", metavar="DIR", help="a folder, a .gguf file, a known name, or owner/name")
    add_fields(parser, Options)
    given = vars(parser.parse_args(argv))
    options = make(Options, given)
    wanted: dict[str, Any] = {}
    if run := schema.run_of(Path(given["checkpoint"]).expanduser()):
        wanted = expected(run)
    if options.pattern is not None or options.sparsity is not None:
        wanted["pattern"] = patterns.parse(options.pattern or "unstructured", options.sparsity)
        wanted["wanted"] = None
    pattern = wanted.get("pattern")
    words = str(pattern) if pattern else run.target if run else ""
    reader = open_checkpoint(given["checkpoint"], check=False)  # counts what is not finite itself
    against = open_checkpoint(options.against) if options.against else None
    verdict = verify(reader, against=against, **wanted)
    print_table(_rows(verdict.linears, options.all), ("linear", "tensors", "zeros", "pattern"))
    for problem in verdict.problems:
        console.print(f"problem: {problem}")
    total = [sum(getattr(linear, name) for linear in verdict.linears.values()) for name in ("zeros", "size")]
    facts = f"{len(verdict.linears)} linears, {100 * total[0] / total[1]:.4f} % zeros"
    facts += f", {words}" * bool(words)
    facts += " along the inputs (columns of the stored [out, in])" * isinstance(pattern, NM)
    if against:
        facts += f", {len(reader.spec) - len(verdict.linears)} other tensors compared with {options.against}"
    if verdict.problems:
        console.print(f"not verified, {len(verdict.problems)} problems: {given['checkpoint']}: {facts}")
        return 1
    console.print(f"verified: {given['checkpoint']}: {facts}; every value is finite, configuration and tokenizer load")
    return 0


if __name__ == "__main__":
    sys.exit(main())
