"""python -m convert SRC DST: any readable checkpoint into any writable format, one part at a time."""

import sys
from collections.abc import Sequence

from convert import CheckpointError, create_checkpoint, formats, open_checkpoint, parts
from convert.assets import read_config
from convert.command import ArgumentParser, run
from convert.consistency import check
from convert.hub import resolve
from convert.ownership import destination
from convert.paths import inputs_of, require_apart


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    writable = [name for name, module in formats().items() if hasattr(module, "Writer")]
    parser = ArgumentParser(
        prog="python -m convert",
        description="Convert a checkpoint between formats, one decoder layer at a time.",
    )
    parser.add_argument("source", help="a folder, a .gguf file, a known name such as llama-7b, or owner/name of a hub")
    parser.add_argument("target", help="the folder to make")
    parser.add_argument("--to", default="hf", choices=writable, help="format of the target (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an unchanged earlier result")
    args = parser.parse_args(argv)
    place = destination(args.target, overwrite=args.overwrite)
    place.check()
    source = resolve(args.source)
    place.inputs = tuple(inputs_of(source))
    require_apart({"the source": place.inputs}, {"the target": place.path}, error=CheckpointError)
    reader = open_checkpoint(source)
    check(reader.spec, read_config(reader.assets))
    with create_checkpoint(place, reader.spec, reader.assets, to=args.to) as writer:
        for paths in parts(reader.spec).values():
            writer.write(reader.read(paths))
    size = sum(t.size * t.dtype.itemsize for t in reader.spec.values())
    print(f"{args.target}: {len(reader.spec)} tensors, {size / 1e9:.2f} GB, format {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
