"""Changes of JSON: values in place of others, some of which no encoder writes, and entries that go
or come twice."""

import json
from collections.abc import Iterator
from typing import Any

VALUES = {
    "null": "null",
    "true": "true",
    "text": '"x"',
    "no-text": '""',
    "number-as-text": '"1"',
    "nul": r'"\u0000"',
    "surrogate": r'"\ud800"',
    "outside": '"../../precious"',
    "long": f'"{"x" * 300_000}"',  # more than a piece of what is tokenized
    "zero": "0",
    "one": "1",
    "negative": "-1",
    "fraction": "0.5",
    "billion": "1000000000",
    "int64": str(2**63),
    "exponent": "1e400",
    "digits": "9" * 5000,
    "nan": "NaN",
    "infinity": "-Infinity",
    "list": "[]",
    "object": "{}",
    "deep": "[" * 10**5 + "]" * 10**5,
}
DTYPES = ("F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "Q4_1")
_MARK = "@@hostile@@"


def _at(tree: Any, pointer: str) -> tuple[Any, Any]:
    """The container of a place and its key there."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    for part in way:
        tree = tree[int(part) if isinstance(tree, list) else part]
    return tree, int(last) if isinstance(tree, list) else last


def change_json(text: str, kind: str, pointer: str) -> str:
    """JSON text whose entry at a pointer (RFC 6901) is changed.

    Raises:
        ValueError, LookupError, TypeError: there is no such entry.
    """
    if not pointer:
        return VALUES[kind]
    tree = json.loads(text)
    owner, key = _at(tree, pointer)
    value = owner[key]
    if kind == "removed":
        del owner[key]
        return json.dumps(tree)
    if kind == "renamed":
        owner[f"{key}x"] = owner.pop(key)
        return json.dumps(tree)
    owner[key] = _MARK
    marked, mark = json.dumps(tree), json.dumps(_MARK)
    if kind == "twice":
        return marked.replace(mark, f"{json.dumps(value)}, {json.dumps(key)}: 0")
    if kind == "wrapped":
        return marked.replace(mark, json.dumps([value]))
    return marked.replace(mark, VALUES.get(kind) or json.dumps(kind))


def pointers(tree: Any, prefix: str = "", most: int = 4) -> Iterator[str]:
    """The places in a JSON value; of long lists, and of long objects such as vocabularies, a few
    from end to end."""
    items = (
        list(tree.items())
        if isinstance(tree, dict)
        else list(enumerate(tree))
        if isinstance(tree, list)
        else []
    )
    if len(items) > (48 if isinstance(tree, dict) else most):
        items = [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
    for key, value in items:
        place = f"{prefix}/{str(key).replace('~', '~0').replace('/', '~1')}"
        yield place
        yield from pointers(value, place, most)


def json_edits(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(kind, place) of every change of a JSON value's entries."""
    for place in pointers(tree):
        named = isinstance(_at(tree, place)[0], dict)
        for kind in [*VALUES, "removed", "wrapped", *["twice", "renamed"] * named]:
            yield kind, prefix + place
        if place.endswith("/dtype"):
            yield from ((kind, prefix + place) for kind in DTYPES)
