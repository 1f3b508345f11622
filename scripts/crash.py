"""Kills, full disks, signals, leaping clocks and races at the file operations of small runs, for as
long as it takes.

    python scripts/crash.py [--every N] [--cases N] [--only TEXT] [--jobs N] [--repeat CASE]

Every case is named "what/line/operation": what happens to which command line (of
tests/crash/world.py), and where. It prints a table and how to repeat what failed; the exit status
is 1 where something did.
"""

import argparse
import errno
import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parent.parent))

from tests.crash import cases, places
from tests.crash.operations import available
from tests.crash.world import LINES, Worlds

Faults = list[str] | None
KILLED = "best", "admm", "overwrite", "convert", "convert-over"
HINDERED = "best", "overwrite", "convert", "convert-over"
KINDS = (
    "kill",
    "kills",
    "full",
    "read-only",
    "SIGINT",
    "SIGTERM",
    "clock",
    "race",
    "appearing",
    "place",
)
RACES = {
    "two runs": (["quick"] * 2, r"^mkdir work/out", False),
    "four runs": (["quick"] * 4, r"^mkdir work/out", False),
    "four for the masks": (["quick"] * 4, r"^rename\S* .* -> work/masks ", True),
    "a run and a conversion": (["quick", "convert"], r"^rename\S* .* -> work/out ", False),
    "two conversions": (["convert"] * 2, r"^rename\S* .* -> work/out ", False),
}


class Case(NamedTuple):
    """One thing that may go wrong.

    Attributes:
        what: happens.
        line: the command line's name, or another.
        phase: of the operation.
        where: the operation.
        run: returns what is wrong; None: the operation did not come.
    """

    what: str
    line: str
    phase: str
    where: str
    run: Callable[[], Faults]

    def __str__(self) -> str:
        return f"{self.what}/{self.line}/{self.where}"


def all_cases(worlds: Worlds, every: int, wanted_name: Callable[[str], bool]) -> list[Case]:
    """All that can go wrong, at every so many operations of each phase.

    Args:
        worlds: makes what they happen in.
        every: operations.
        wanted_name: whether a "what/line/" is wanted; the operations of others need not be counted.
    """
    found: list[Case] = []

    def add(
        what: str, line: str, wanted: cases.Wanted, case: Callable, each: int = every, **how: object
    ) -> None:
        if not wanted_name(f"{what}/{line}/"):
            return
        for phase, operations in cases.points(worlds.reference(line), wanted).items():
            for operation in operations[::each]:
                found.append(
                    Case(
                        what,
                        line,
                        phase,
                        str(operation),
                        partial(case, worlds, line, str(operation), **how),
                    )
                )

    for line in KILLED:
        add("kill", line, cases.changes, cases.killed)
        # five, one after the other
        add("kills", line, cases.changes, cases.killed, 10 * every, times=5)
    for line in HINDERED:
        add("full", line, cases.grows, cases.full)
        add("read-only", line, cases.changes, cases.full, 4 * every, error=errno.EROFS)
        add("SIGINT", line, cases.changes, cases.stopped, 4 * every, number=signal.SIGINT)
        add("SIGTERM", line, cases.changes, cases.stopped, 4 * every, number=signal.SIGTERM)
    for years in (-30, 3):
        add(f"clock {years:+} years", "best", cases.changes, cases.leapt, 20 * every, years=years)
    for name, race in RACES.items():
        found.append(Case("race", name, "", "", partial(cases.raced, worlds, *race)))
    for what in ("file", "folder", "empty folder", "link", "dangling link"):
        for line, place in (("quick", "out"), ("quick", "masks"), ("convert", "out")):
            for gate in ("^openat .*safetensors", rf"^rename\S* .* -> work/{place} "):
                run = partial(cases.appeared, worlds, line, what, gate, place)
                found.append(
                    Case("appearing", line, f"{what} at {place}", f"{what} {place} {gate}", run)
                )
    for what in places.PLACES:
        found.append(Case("place", what, "", "", partial(places.refused, worlds, what)))
    return found


def attempt(case: Case) -> tuple[Faults, float]:
    begin = time.monotonic()
    try:
        return case.run(), time.monotonic() - begin
    except Exception as error:  # goes on with the others
        return [f"{type(error).__name__}: {error}"], time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--every", type=int, default=1, help="take every so many operations of each phase"
    )
    parser.add_argument(
        "--cases", type=int, help="at most so many, from all that are found evenly (default: all)"
    )
    parser.add_argument("--only", default="", help="what happens, to which line, or in which phase")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time")
    parser.add_argument("--repeat", help="only the case of this name")
    args = parser.parse_args()
    if reason := available():
        parser.error(reason)
    folder = Path(tempfile.mkdtemp(prefix="jaxprune-crash-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    worlds, begin = Worlds(folder / "worlds"), time.monotonic()
    known = any(args.only in name for name in (*KINDS, *LINES))

    def wanted(name: str) -> bool:
        return args.repeat.startswith(name) if args.repeat else not known or args.only in name

    every = all_cases(worlds, 1 if args.repeat else args.every, wanted)
    chosen = [
        case
        for case in every
        if args.only in f"{case} {case.phase}" and args.repeat in (None, str(case))
    ]
    chosen = evenly(chosen, args.cases)
    rows: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    failed: dict[str, list[str]] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(attempt, case): case for case in chosen}
        for number, future in enumerate(as_completed(running), 1):
            case, (faults, seconds) = running[future], future.result()
            count(rows[case[:3]], faults, seconds)
            if faults:
                failed[str(case)] = faults
                print(
                    f"\n{case}: {'; '.join(faults)[:3000]}\n  repeat: {sys.argv[0]} --repeat "
                    f"'{case}'",
                    flush=True,
                )
            spent = time.monotonic() - begin
            print(
                f"\r{number} of {len(chosen)}, {len(failed)} failed, {spent:.0f} s ",
                end="",
                flush=True,
            )
    print_table(rows)
    spent = time.monotonic() - begin
    print(
        f"{len(chosen)} of {len(every)} cases in {spent:.0f} s, {len(failed)} failed; worlds are "
        f"in {folder}"
    )
    return int(bool(failed))


def evenly(every: list[Case], most: int | None) -> list[Case]:
    """Returns at most so many cases, at even distances, so that each kind has its share; None: all
    of them."""
    count = len(every) if most is None else min(most, len(every))
    return [every[number * len(every) // count] for number in range(count)]


def count(row: Counter[str], faults: Faults, seconds: float) -> None:
    row["s"] += round(seconds)
    if faults is None:
        row["not met"] += 1
        return
    row["tried"] += 1
    row["equal at the end"] += not any(
        "differ" in fault or "exit status" in fault for fault in faults
    )
    row["others' files equal"] += not any(
        "has changed" in fault or "replaced" in fault for fault in faults
    )
    row["failed"] += bool(faults)


def print_table(rows: dict[tuple[str, str, str], Counter[str]]) -> None:
    names = "tried", "equal at the end", "others' files equal", "failed", "not met", "s"
    print(
        "\n| what | line | phase | " + " | ".join(names) + " |\n" + "|---" * (3 + len(names)) + "|"
    )
    for case, row in rows.items():
        print("| " + " | ".join([*case, *(str(row[name]) for name in names)]) + " |")
    total = sum(rows.values(), Counter())
    print("| all | | | " + " | ".join(str(total[name]) for name in names) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
