"""Pruned checkpoints as safetensors, packed, packed and compressed: bytes, and the speed of both
ways on one core."""

import argparse
import os
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from markdown import markdown

from convert import Reader, create_checkpoint, open_checkpoint, parts
from convert.packing import places_of
from convert.zstd import zstd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="FOLDER", help="pruned")
    parser.add_argument("--dense", help="a checkpoint whose file is compressed too, for comparison")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        # zstd and numpy have one thread, readers none beside
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    for dtype in args.dtypes:
        for checkpoint in args.checkpoints:
            rows += list(measured(checkpoint, dtype))
        if args.dense:
            with tempfile.TemporaryDirectory() as folder:
                dense = written(open_checkpoint(args.dense), Path(folder) / "dense", dtype, "hf")[0]
                size = compressed(dense, Path(folder) / "dense.tar.zst")
                rows.append(
                    [dtype, args.dense, "tar.zst of it", f"{size / 1e6:.1f} MB", "", "", ""]
                )
    print(
        "\n".join(
            markdown(
                ["dtype", "checkpoint", "as", "files", "of the pruned linears", "write", "read"],
                rows,
            )
        )
    )


def measured(checkpoint: Path, dtype: str) -> Iterator[list[str]]:
    """Yields the rows of a checkpoint, its weights rounded to a dtype."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, seconds = written(open_checkpoint(checkpoint), folder / "hf", dtype, "hf")
        dense = bytes_of(whole.spec.values())
        linears = {
            path
            for path in whole.spec
            if path.endswith(".kernel")
            and places_of(np.ascontiguousarray(whole.read([path])[path].T))
        }
        pruned = bytes_of(whole.spec[path] for path in linears)
        ways = [("safetensors", whole, seconds)]
        for level in (0, 3):
            title = f"packed, zstd {level}" if level else "packed"
            ways.append((title, *written(whole, folder / str(level), dtype, "packed", zstd=level)))
        for title, reader, seconds in ways:
            share = size_of(reader, linears) / pruned
            yield [
                dtype,
                checkpoint.name,
                title,
                f"{sum(file.stat().st_size for file in reader.files) / 1e6:.1f} MB",
                f"{share:.3f}",
                f"{dense / 1e6 / seconds:.0f} MB/s",
                f"{dense / 1e6 / read(reader):.0f} MB/s",
            ]
        size = compressed(whole, folder / "pruned.tar.zst")
        yield [
            dtype,
            checkpoint.name,
            "tar.zst of the safetensors",
            f"{size / 1e6:.1f} MB",
            "",
            "",
            "",
        ]


def written(
    source: Reader, folder: Path, dtype: str, to: str, **options: int
) -> tuple[Reader, float]:
    """Writes a checkpoint, rounded to a dtype; returns it, and the seconds without reading its
    source."""
    spec = {path: type(t)(t.shape, np.dtype(dtype)) for path, t in source.spec.items()}
    seconds = 0.0
    with create_checkpoint(folder, spec, source.assets, to=to, options=options) as writer:
        for paths in parts(spec).values():
            params = {path: array.astype(dtype) for path, array in source.read(paths).items()}
            start = time.perf_counter()
            writer.write(params)
            seconds += time.perf_counter() - start
    return open_checkpoint(folder, check=False), seconds


def read(reader: Reader) -> float:
    """Reads a checkpoint, part by part, twice; returns the seconds of the second time."""
    for _ in range(2):
        start = time.perf_counter()
        for paths in parts(reader.spec).values():
            reader.read(paths)
        seconds = time.perf_counter() - start
    return seconds


def compressed(reader: Reader, target: Path) -> int:
    """Returns the bytes of a checkpoint's files in a tar archive that zstd has compressed as
    usual."""
    with zstd.open(target, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        for file in reader.files:
            archive.add(file, file.name)
    return target.stat().st_size


def size_of(reader: Reader, paths: Iterable[str]) -> int:
    """Returns the bytes that some params take in a checkpoint's files."""
    inner = getattr(reader, "stored_bytes", None)
    return (
        sum(inner(path) for path in paths)
        if inner
        else bytes_of(reader.spec[path] for path in paths)
    )


def bytes_of(tensors: Iterable[np.ndarray]) -> int:
    return sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in tensors)


if __name__ == "__main__":
    main()
