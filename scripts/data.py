"""Makes the text and task files that the results use, from public datasets of the Hugging Face hub.

    python scripts/data.py OUT

OUT gets c4/c4-train-sample.jsonl, the first 2000 documents of C4's first training shard; the rows
of WikiText-2's validation and test splits in wikitext2/; and the rows of seven tasks of lm-eval in
tasks/. The commands of the documentation call this folder `data`. The tests find it by
`JAXPRUNE_DATA=OUT`.

Downloads are stored in the hub's cache, which resumes them after an interruption. The largest is
C4's shard, about 320 MB. Run the command again to make the files that are still missing. Files that
are already in OUT are checked and left as they are. A file that differs is an error.

Checks: the hub's cache names each source by its checksum, SHA-256 for files in LFS and Git's SHA-1
for others; the source must have it. Each product must have the SHA-256 below. That of WikiText-2's
test split is not known; only its source is checked. The tests of the project have no access to the
hub: they use a cache that they build, not the hub's own files and checksums.
"""

import argparse
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from convert.destination import destination, staged
from convert.errors import UserError
from convert.writing import write_text
from jaxprune.calibration import c4, hub_datasets
from jaxprune.errors import InputError


@dataclass(frozen=True)
class Product:
    """A file to make.

    Attributes:
        path: path in OUT.
        repository: dataset of the hub.
        file: path in the dataset, of a .json.gz file with one row a line or a .parquet file.
        fields: entries of each row, in order.
        sha256: SHA-256 of the product; None if it is unknown.
        most: number of rows from the start of the source; None: all.
    """

    path: str
    repository: str
    file: str
    fields: tuple[str, ...]
    sha256: str | None
    most: int | None = None


_CHOICES = ("choices", "answerKey")
PRODUCTS = (
    Product(
        "c4/c4-train-sample.jsonl",
        "allenai/c4",
        c4.FILES["train"],
        ("text", "timestamp", "url"),
        "37f09d0f66739edb16c3a02fc5a1a88e8d5519f691b2838914ad1dda4135fa5f",
        most=2000,
    ),
    Product(
        "wikitext2/validation.jsonl",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/validation-00000-of-00001.parquet",
        ("text",),
        "7f24169df1b7683363682a3d90f0a4c513b941eabaa2c121843b322f29b77658",
    ),
    Product(
        "wikitext2/test.jsonl",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        ("text",),
        None,
    ),
    Product(
        "tasks/boolq.jsonl",
        "aps/super_glue",
        "boolq/validation-00000-of-00001.parquet",
        ("question", "passage", "idx", "label"),
        "2f7ec4dd1d9a6b85cb131d69cbd4acd5400d4d55faf333d4e75a5a4650b9383b",
    ),
    Product(
        "tasks/rte.jsonl",
        "nyu-mll/glue",
        "rte/validation-00000-of-00001.parquet",
        ("sentence1", "sentence2", "label", "idx"),
        "aabcfc66a9822029cf4b38ff3e6d0d78f7e0fecd5232ca008f338e6c4f657eb1",
    ),
    Product(
        "tasks/hellaswag.jsonl",
        "Rowan/hellaswag",
        "data/validation-00000-of-00001.parquet",
        (
            *("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings"),
            *("source_id", "split", "split_type", "label"),
        ),
        "d5c08c3e5771307e73886dc9d2744df8ca5f372a7857f32fe77df8c58942f950",
    ),
    Product(
        "tasks/winogrande.jsonl",
        "allenai/winogrande",
        "winogrande_xl/validation-00000-of-00001.parquet",
        ("sentence", "option1", "option2", "answer"),
        "69f3d7f3a900d775339b04c7de672609c40fca573e50f594f2ae66d8782505be",
    ),
    Product(
        "tasks/arc_easy.jsonl",
        "allenai/ai2_arc",
        "ARC-Easy/test-00000-of-00001.parquet",
        ("id", "question", *_CHOICES),
        "874354cf372667530bd6cbd2d78dca2d657c5e2e746f53cf01d1e9d3a90cbc3d",
    ),
    Product(
        "tasks/arc_challenge.jsonl",
        "allenai/ai2_arc",
        "ARC-Challenge/test-00000-of-00001.parquet",
        ("id", "question", *_CHOICES),
        "03227c30fd557ad1416c2cb955eeb6dc79eeb21e0679456a1ccd42eaccc0ff87",
    ),
    Product(
        "tasks/openbookqa.jsonl",
        "allenai/openbookqa",
        "main/test-00000-of-00001.parquet",
        ("id", "question_stem", *_CHOICES),
        "bbaca15e985ba386b2f73e9659fce608cf7722a35343864dbe7115cbbda341ab",
    ),
)


def make(product: Product, out: Path) -> str:
    """Makes a product in a folder unless it is there, and returns which of both was the case.

    Raises:
        UserError: the source is missing or damaged, its rows are not those of the product, or
            another file is in the product's place.
    """
    path = out / product.path
    there = os.path.lexists(path)
    if there and product.sha256:
        _require(_sha256_of(path) == product.sha256, path)
        return "is there"
    source = _source(product)
    try:
        lines = [json.dumps(row, ensure_ascii=False) for row in _rows(product, source)]
    # pyarrow's, gzip's and json's errors for a damaged file, and missing entries of a row
    except (pyarrow.ArrowException, OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"it cannot be read ({problem})", file=source) from error
    text = "".join(f"{line}\n" for line in lines)
    found = hashlib.sha256(text.encode()).hexdigest()
    if product.sha256 not in (None, found):
        raise InputError(
            f"{product.file} of the dataset {product.repository} has other rows than the results "
            "use",
            file=path,
            found=found,
            wanted=product.sha256,
        )
    if there:
        _require(_sha256_of(path) == found, path)
        return "is there"
    with staged(destination(path, folder=False)) as made:
        write_text(made, text)
    return "made"


def _require(same: bool, path: Path) -> None:
    if not same:
        raise InputError(
            "another file is there, which is not replaced: move it, or choose another folder",
            file=path,
        )


def _sha256_of(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source(product: Product) -> Path:
    """Returns the source of a product in the hub's cache, downloaded and checked."""
    try:
        path = hub_datasets.fetch(product.repository, product.file)
    except InputError as error:
        raise InputError(
            f"missing: {product.file} of the dataset {product.repository} is not in the hub's "
            f"cache and cannot be downloaded ({type(error.__cause__).__name__})",
            file=product.path,
        ) from error
    # The cache links to a file that is named by the hub's checksum.
    blob = path.resolve()
    wanted = blob.name if path.is_symlink() else ""
    if len(wanted) == 64:
        found = _sha256_of(blob)
    elif len(wanted) == 40:
        content = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:
        return path
    if found != wanted:
        raise InputError(
            "it is damaged: remove it, and it is downloaded again", file=blob, found=found
        )
    return path


def _rows(product: Product, source: Path) -> Iterator[dict[str, Any]]:
    for row in islice(_all_rows(source), product.most):
        yield {name: row[name] for name in product.fields}


def _all_rows(source: Path) -> Iterator[dict[str, Any]]:
    if source.suffix == ".gz":
        with gzip.open(source, "rt", encoding="utf-8", newline="\n") as file:
            for line in file:
                yield json.loads(line)
    else:
        yield from parquet.read_table(source).to_pylist()


def main() -> int:
    """Makes all products, and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    failed = 0
    for number, product in enumerate(PRODUCTS, 1):
        print(f"[{number}/{len(PRODUCTS)}] {product.path}", flush=True)
        try:
            print(f"  {make(product, out)}", flush=True)
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
    if failed:
        print(f"error: {failed} of {len(PRODUCTS)} files are missing or differ", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
