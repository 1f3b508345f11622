"""Convert a checkpoint between formats, one decoder layer at a time."""

import dataclasses
import logging
from collections.abc import Sequence

from rich.filesize import decimal

from convert import (
    create_checkpoint,
    disk_bytes,
    is_file,
    open_checkpoint,
    parts,
    require_suitable,
    writer_for,
)
from convert.assets import read_config
from convert.consistency import check
from convert.destination import destination
from convert.errors import CheckpointError
from convert.files import leads_outside, read_bytes
from convert.hub import resolve
from convert.paths import inputs_of, require_apart
from convert.writing import write_text
from jaxprune.commands.command_line import CHECKPOINT, CommandLine, Section, make
from jaxprune.commands.terminal import command
from jaxprune.reporting import record as records
from jaxprune.reporting.record import RECORD

log = logging.getLogger(__name__)
EXACT = {"f32", "f16", "bf16"}
"""Types of GGUF files that hold a grid of few bits as it is."""
EXAMPLES = """Examples:

    jaxprune convert model.gguf ./model
    jaxprune convert ./model ./orbax --to orbax
    jaxprune convert ./pruned ./packed --to packed
    jaxprune convert ./packed ./again
    jaxprune convert ./pruned pruned.gguf --type q8_0"""


@dataclasses.dataclass(frozen=True)
class Options:
    """How the result is written."""

    to: str | None = None
    """The format to write: hf, orbax, gguf, or packed, which stores a pruned checkpoint in less
    space (default: gguf if the target's name ends in .gguf, else hf)."""
    type: str | None = None
    """The type of matrices in a GGUF file: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 (default:
    the type to which the checkpoint was quantized, else f16)."""
    zstd: int | None = None
    """zstd compression level of packed files, 1 to 22 (default: 3); 0 turns compression off."""
    overwrite: bool = False
    """Replace an earlier result, unless it has been changed since."""


@command
def main(argv: Sequence[str]) -> int:
    """Runs a command line."""
    given = CommandLine(argv, __name__).read(
        Section("Result", Options),
        positionals={"source": CHECKPOINT, "target": "The folder to create, or the file for GGUF."},
    )
    wanted = make(Options, given)
    to = wanted.to or ("gguf" if given["target"].endswith(".gguf") else "hf")
    options = {
        name: value for name in ("type", "zstd") if (value := getattr(wanted, name)) is not None
    }
    writer_for(to, options)
    if given["target"].endswith(".gguf") and not is_file(to):
        raise CheckpointError(f"{to} makes a folder", file=given["target"], options={"to": "gguf"})
    place = destination(given["target"], overwrite=wanted.overwrite, folder=not is_file(to))
    place.check()
    source = resolve(given["source"])
    place = place.with_inputs({"the source": inputs_of(source)})
    require_apart({"the source": place.inputs}, {"the target": place.path}, error=CheckpointError)
    reader = open_checkpoint(source)
    quantization = (
        made.recipe.quantize if to == "gguf" and (made := records.run_of(source)) else None
    )
    if quantization:
        options.setdefault("type", quantization)
        if options["type"].lower() not in EXACT | {quantization}:
            log.warning(
                "its linear layers were quantized to %s, and %s rounds them again",
                quantization.upper(),
                options["type"],
            )
    check(reader.spec, read_config(reader.assets))
    require_suitable(to, reader)
    with create_checkpoint(place, reader.spec, reader.assets, to=to, options=options) as writer:
        for paths in parts(reader.spec).values():
            writer.write(reader.read(paths))
        record = reader.assets / RECORD  # says of the same numbers what made them
        if not is_file(to) and record.is_file() and not leads_outside(record, reader.assets):
            write_text(writer.place / RECORD, read_bytes(record).decode("utf-8", "replace"))
            writer.files.add(RECORD)
    size = sum(t.size * t.dtype.itemsize for t in reader.spec.values())
    written = disk_bytes(open_checkpoint(place.path))
    print(
        f"{given['target']}: {len(reader.spec)} tensors, {decimal(size)}, in {decimal(written)} of "
        f"files, format {to}"
    )
    return 0
