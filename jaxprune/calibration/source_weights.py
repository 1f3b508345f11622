"""Several sources in proportion: which gives how many windows, and in which order."""

import math
import re
from collections.abc import Callable, Iterator, Mapping

from jaxprune.errors import InputError

_WEIGHED = re.compile(r"(.*):([^:/\\]+)")


def weights_of(text: str, exists: Callable[[str], bool]) -> dict[str, float]:
    """Returns the sources that a text such as `c4:3,chats.jsonl:1` names, each with its weight; 1
    where it says none.

    Args:
        text: names with weights, separated by commas; or one name, whatever it holds.
        exists: whether there is a source of a name.

    Raises:
        InputError: a weight is not positive, or a source is named twice.
    """
    if exists(text):
        return {text: 1.0}
    found: dict[str, float] = {}
    for part in text.split(","):
        match = None if exists(part) else _WEIGHED.fullmatch(part)
        name, weight = match.groups() if match else (part, "1")
        if not name or name in found:
            raise InputError(
                f"{text!r} names {name!r} twice"
                if name
                else f"{text!r} has a source without a name"
            )
        try:
            found[name] = float(weight)
        except ValueError:
            found[name] = math.nan
        if not 0 < found[name] < math.inf:
            raise InputError(f"the weight of {name} must be a positive number, not {weight}")
    return found


def interleaved(weights: Mapping[str, float]) -> Iterator[str]:
    """Yields sources without end, evenly, in proportion to their weights."""
    counts = dict.fromkeys(weights, 0)
    while True:
        name = min(weights, key=lambda name: (counts[name] + 0.5) / weights[name])
        counts[name] += 1
        yield name


def shares(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """Returns how many of so many windows are of each source: the nearest whole numbers of this
    total."""
    exact = {name: count * weight / sum(weights.values()) for name, weight in weights.items()}
    found = {name: math.floor(share) for name, share in exact.items()}
    # the largest remainder first
    rest = sorted(weights, key=lambda name: found[name] - exact[name])
    return found | {name: found[name] + 1 for name in rest[: count - sum(found.values())]}
