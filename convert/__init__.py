"""Files <-> arrays: checkpoints of language models as Flax params, one part at a time.

A checkpoint is a flat mapping from Flax paths to arrays: the checkpoint's own names without the
leading `model.`, with Flax's leaf names, so `model.layers.3.mlp.up_proj.weight` is
`layers.3.mlp.up_proj.kernel`. Kernels are [in, out]. `flax.traverse_util.unflatten_dict(params,
sep=".")` nests them.

A format is a module of this package that exposes a `Reader`, a `Writer`, or both:

- `Reader(path)` looks at headers only; `Reader.accepts(path)` says whether the format knows the
  path.
- `Writer(place, spec, assets)` fills an empty folder, or makes a file if its `single_file` is true.
  Further arguments, by name, are options of the format; `Writer.require_suitable(reader)`, where it
  is there, refuses what the format cannot hold.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from convert.checkpoint import Params as Params
from convert.checkpoint import Reader as Reader
from convert.checkpoint import Spec as Spec
from convert.checkpoint import Writer as Writer
from convert.checkpoint import disk_bytes as disk_bytes
from convert.checkpoint import parameters as parameters
from convert.checkpoint import part_of as part_of
from convert.checkpoint import parts as parts
from convert.destination import Destination
from convert.errors import Change
from convert.errors import CheckpointError as CheckpointError
from convert.errors import DamagedError as DamagedError


def formats() -> dict[str, ModuleType]:
    """Returns format name -> module of this package that reads or writes it."""
    others = ("__main__", "checkpoint")
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in others]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}

    def own(module: ModuleType, name: str) -> bool:
        home = getattr(getattr(module, name, None), "__module__", "")
        return f"{home}.".startswith(f"{module.__name__}.")

    return {
        name: module
        for name, module in modules.items()
        if own(module, "Reader") or own(module, "Writer")
    }


def open_checkpoint(name: str | Path, *, check: bool = True) -> Reader:
    """Opens a local checkpoint, a known name such as `llama-7b`, or a hub repository `owner/name`.

    Args:
        name: the name of the checkpoint.
        check: refuse tensors with NaN or infinity when they are read; see `checked.CheckedReader`.

    Raises:
        CheckpointError: there is no such checkpoint, it is in no known format, or it is incomplete.
    """
    from convert.checked import CheckedReader
    from convert.hub import resolve

    path = resolve(name)
    for module in formats().values():
        if hasattr(module, "Reader") and module.Reader.accepts(path):
            return CheckedReader(module.Reader(path)) if check else module.Reader(path)
    raise CheckpointError(
        f"{path} is no checkpoint: expected a folder with config.json and *.safetensors, a .gguf "
        "file, or a folder that `jaxprune convert --to orbax` or `--to packed` wrote"
    )


@contextmanager
def create_checkpoint(
    place: str | Path | Destination,
    spec: Spec,
    assets: Path,
    *,
    to: str = "hf",
    overwrite: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Writer]:
    """Writes a checkpoint that appears at its place only when it is complete; see `destination`.

    Args:
        place: a folder (of some formats a file) that does not exist, or is replaced at the end
            where `overwrite` is set and it is ours.
        spec: what will be written.
        assets: the folder whose other files (configuration, tokenizer) go with the weights.
        to: the format.
        overwrite: replace an earlier result of ours.
        options: of the format, by name.

    Raises:
        CheckpointError: there is something that is not replaced, it cannot be written, or the disk
            is too small.
    """
    from convert import ownership
    from convert.destination import destination, staged

    with staged(destination(place, overwrite=overwrite, folder=not is_file(to))) as made:
        with fill_checkpoint(made, spec, assets, to=to, options=options) as writer:
            yield writer
        if is_file(to):
            ownership.add_checksum(made)
        else:
            ownership.mark(made, "checkpoint", writer.files)


@contextmanager
def fill_checkpoint(
    place: Path,
    spec: Spec,
    assets: Path,
    *,
    to: str = "hf",
    changes: Mapping[str, Any] = MappingProxyType({}),
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Writer]:
    """Writes a checkpoint into an empty folder, or to a file; arguments and errors as for
    `create_checkpoint`.

    Args:
        place, spec, assets, to, options: see there.
        changes: entries of config.json that get other values.
    """
    from convert.assets import copy_assets
    from convert.writing import names

    writer = writer_for(to, options)(place, spec, assets)
    if not is_file(to):
        copy_assets(assets, place, changes)
        writer.files.update(names(place))
    yield writer
    writer.finish()


def writer_for(
    to: str, options: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Path, Spec, Path], Writer]:
    """Returns what writes a format; CheckpointError where it cannot be written, or has no such
    options."""
    writer = _writers().get(to)
    if writer is None:
        raise CheckpointError(f"cannot write {to!r}: {', '.join(_writers())} can be written")
    if unknown := sorted(options.keys() - inspect.signature(writer).parameters.keys()):
        words = ", ".join(name.replace("_", " ") for name in unknown)
        raise CheckpointError(
            f"a checkpoint in the format {to} is written without {words}",
            options=dict.fromkeys(unknown, Change.OMIT),
        )
    return partial(writer, **options)


def is_file(to: str) -> bool:
    """Returns whether a checkpoint in a format is a single file."""
    return getattr(_writers().get(to), "single_file", False)


def require_suitable(to: str, reader: Reader) -> None:
    """Raises CheckpointError where a format cannot hold a checkpoint, before anything is
    written."""
    require = getattr(_writers()[to], "require_suitable", None)
    if require:
        require(reader)


def _writers() -> dict[str, Any]:
    return {name: module.Writer for name, module in formats().items() if hasattr(module, "Writer")}
