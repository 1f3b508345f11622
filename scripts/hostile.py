"""Damaged files and odd options, for everything that reads one: each is refused in one line, or the
result is right.

    python scripts/hostile.py --cases 100000 --runs 2000        # opening and validation; whole tiny
    runs python scripts/hostile.py --cases 5000 --only gguf --seed 1 python scripts/hostile.py
    --repeat 'hf config.json:null:/hidden_size'

Anything else (a traceback, a hang, 2 GB of memory, a wrong result, a changed file of the user's) is
a failure, which comes with the case that repeats it. The exit status is 1 where there is one.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.hostile import mutations, room, targets, watchdog  # noqa: E402
from tests.hostile.watchdog import Limits, Result  # noqa: E402

OPENING, WHOLE = Limits(10, first=30), Limits(30, first=60)


@dataclasses.dataclass
class Tally:
    """Counts of a target, and failures by what is common to them."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0
    longest: float = 0.0
    peak: int = 0
    failures: dict[str, list[Result]] = dataclasses.field(default_factory=lambda: defaultdict(list))

    def add(self, result: Result) -> None:
        self.counts[result.outcome.status] += 1
        self.seconds += result.seconds
        self.longest = max(self.longest, result.seconds)
        self.peak = max(self.peak, result.peak)
        if result.outcome.status == "failed":
            self.failures[family(result)].append(result)


def family(result: Result) -> str:
    """What failures of one cause have in common: the exception's type and the innermost line of
    ours, or the kind."""
    detail = result.outcome.detail
    fatal = "Fatal Python error" in detail
    if "Traceback (most recent call last)" not in detail and not fatal:
        kind = re.sub(r"\d+(\.\d+)?|/tmp/\S+", "…", detail.splitlines()[0])[:80]
        return f"{kind} ({mutations.parse(result.case).target})"
    places = re.findall(
        r'File "[^"]*/((?:jaxprune|convert|tests)/[^"]+)", line \d+,? in (\S+)', detail
    )
    ours = [":".join(place) for place in places if not place[0].startswith("tests/")] or [
        ":".join(p) for p in places
    ]
    # a fatal error's stack begins with the innermost call
    inner = ours[0 if fatal else -1] if ours else "a library"
    return f"{'a fatal error' if fatal else raised(detail).partition(':')[0]} in {inner}"


def raised(detail: str) -> str:
    """The line that names the last exception; of other failures, the first line."""
    found = re.findall(
        r"^(?!WARNING|INFO|ERROR|error|warning)[A-Za-z_][\w.]*(?:: .*)?$", detail, re.MULTILINE
    )
    return (found[-1] if found and "Traceback" in detail else detail.partition("\n")[0])[:200]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=int, default=3000, help="for opening and validation (default: %(default)s)"
    )
    parser.add_argument(
        "--runs", type=int, default=100, help="for whole tiny runs (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of their choice (default: %(default)s)"
    )
    parser.add_argument(
        "--only", default="", help=f"targets with this in their name: {', '.join(targets.TARGETS)}"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", metavar="CASE", help="try one case, and print what became of it"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="where the undamaged files are made once"
    )
    parser.add_argument(
        "--failures", type=Path, metavar="FILE", help="write the failures there, as Markdown"
    )
    args = parser.parse_args(argv)
    watchdog.prepare(room.PRELOAD, room.ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="hostile-base-") as folder:
        base = (args.base or Path(folder)).absolute() / "base"
        if args.repeat:
            return repeat(base, args.repeat)
        tallies: dict[str, Tally] = defaultdict(Tally)
        start = time.monotonic()
        opening = [name for name in targets.CALLS if args.only in name]
        whole = [
            name for name in targets.TARGETS if name not in targets.CALLS and args.only in name
        ]
        # Stopped by Ctrl-C, it says what it has found so far.
        with contextlib.suppress(KeyboardInterrupt):
            for names, count, limits in ((opening, args.cases, OPENING), (whole, args.runs, WHOLE)):
                if names and count:
                    results = room.attempt_all(base, names, count, args.seed, limits, args.workers)
                    alone = functools.partial(
                        watchdog.watch,
                        make=functools.partial(room.enter, base),
                        limits=limits,
                        workers=1,
                    )
                    for result in watchdog.confirmed(progress(results, count), alone):
                        tallies[mutations.parse(result.case).target].add(result)
        table = summary(tallies, time.monotonic() - start)
    print(table)
    if args.failures:
        args.failures.write_text(table + "\n" + details(tallies))
    return int(any(tally.failures for tally in tallies.values()))


def repeat(base: Path, case: str) -> int:
    """Tries one case, and prints everything about it."""
    room.draw(base, [], 0, 0)
    name, edits = mutations.parse(case)
    known = targets.files(base, targets.TARGETS[name])
    if not name.endswith("-line") and (
        unknown := [edit.file for edit in edits if edit.file not in known]
    ):
        raise SystemExit(f"{name} reads no {unknown[0]}, but {', '.join(known)}")
    (result,) = watchdog.watch([case], functools.partial(room.enter, base), WHOLE, workers=1)
    print(
        f"{result.outcome.status} after {result.seconds:.1f} s, {result.peak / 1e9:.2f} GB at the "
        "peak"
    )
    print(result.outcome.detail)
    return int(result.outcome.status == "failed")


def progress(results: Iterator[Result], count: int) -> Iterator[Result]:
    """The same results, with a line that says how far it is."""
    start, failed, said = time.monotonic(), 0, 0.0
    for number, result in enumerate(results, 1):
        if result.outcome.status == "failed":
            failed += 1
            print(
                f"failed: {result.case[:300]}: {raised(result.outcome.detail)}",
                file=sys.stderr,
                flush=True,
            )
        now = time.monotonic()
        if now - said > (0.5 if sys.stderr.isatty() else 60):
            said, rate = now, number / (now - start)
            end = "\r" if sys.stderr.isatty() else "\n"
            print(
                f"{number} of {count}, {failed} failed, {rate:.1f}/s    ",
                end=end,
                file=sys.stderr,
                flush=True,
            )
        yield result


def summary(tallies: dict[str, Tally], seconds: float) -> str:
    """Tables of what happened, and each kind of failure with a case that repeats it."""
    lines = ["| target | cases | refused | succeeded | failed | mean s | longest s | peak GB |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, tally in tallies.items():
        number = tally.counts.total()
        counts = " | ".join(
            str(tally.counts[status]) for status in ("refused", "succeeded", "failed")
        )
        numbers = f"{tally.seconds / number:.3f} | {tally.longest:.1f} | {tally.peak / 1e9:.2f}"
        lines.append(f"| {name} | {number} | {counts} | {numbers} |")
    total = sum((tally.counts for tally in tallies.values()), Counter())
    lines.append(
        f"\n{total.total()} cases in {seconds:.0f} s ({total.total() / seconds:.1f}/s): "
        f"{total['refused']} refused, "
        f"{total['succeeded']} succeeded, {total['failed']} failed; at most "
        f"{max((tally.peak for tally in tallies.values()), default=0) / 1e9:.2f} GB"
    )
    if "unreadable" not in mutations.PATHS:
        lines.append("(run as root, who can read every file: unreadable ones were not tried)")
    kinds: dict[str, list[Result]] = defaultdict(list)
    for tally in tallies.values():
        for kind, results in tally.failures.items():
            kinds[kind] += results
    if kinds:
        lines += ["", f"## {len(kinds)} kinds of failure", ""]
    for kind, results in sorted(kinds.items(), key=lambda item: -len(item[1])):
        shortest = min(results, key=lambda result: len(result.case))
        lines.append(
            f"- {kind}: {len(results)} cases; {json.dumps(raised(shortest.outcome.detail))}"
        )
        lines.append(f"  `python scripts/hostile.py --repeat '{shortest.case}'`")
    return "\n".join(lines)


def details(tallies: dict[str, Tally]) -> str:
    """All that is known of the first failure of each kind of each target; some depend on what was
    tried before."""
    firsts = [results[0] for tally in tallies.values() for results in tally.failures.values()]
    return "".join(f"\n## {one.case}\n\n```\n{one.outcome.detail[-5000:]}\n```\n" for one in firsts)


if __name__ == "__main__":
    sys.exit(main())
