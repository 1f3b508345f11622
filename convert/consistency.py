"""Whether a checkpoint agrees with itself and its configuration, from headers alone.

What one architecture needs in particular is checked by jaxprune.models; this holds for every
decoder.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from convert.checkpoint import Spec, parts
from convert.errors import CheckpointError, DamagedError, joined
from convert.names import EXPERT_COUNTS, HEADS, PREFIXES, RECURRENT, TIED


def check(spec: Spec, config: dict[str, Any]) -> None:
    """Compares layers of the same kind with each other, and counts and sizes with the
    configuration.

    A layer has attention or a recurrent module, and these are the two kinds.

    The time it takes grows with the number of tensors, not with layers times names.

    Args:
        spec: the shapes and dtypes of the checkpoint.
        config: the config of the checkpoint, as `convert.assets.read_config` gives it.

    Raises:
        CheckpointError: missing, surplus and misshapen tensors, in one message.
    """
    grouped = parts(spec)
    layers = {
        part: {path.removeprefix(f"{part}."): spec[path].shape for path in paths}
        for part, paths in grouped.items()
        if part.startswith("layers.")
    }
    if any(config.get(name) for name in EXPERT_COUNTS):  # which layers have them, the family knows
        layers = {
            part: {leaf: shape for leaf, shape in shapes.items() if not leaf.startswith("mlp.")}
            for part, shapes in layers.items()
        }
    kinds: dict[bool, dict[str, dict[str, tuple[int, ...]]]] = {}
    for part, shapes in layers.items():
        kinds.setdefault(any(leaf.startswith(RECURRENT) for leaf in shapes), {})[part] = shapes
    problems = [problem for alike in kinds.values() for problem in _odd_ones(alike)]
    wanted = {f"layers.{i}" for i in range(config["num_hidden_layers"])}
    problems += [f"missing: all of {part}" for part in sorted(wanted - layers.keys())]
    problems += [f"surplus: all of {part}" for part in sorted(layers.keys() - wanted)]
    tops: dict[tuple[str, ...], str] = {("embed_tokens", "embed_in"): "vocab_size"}
    if not config.get("tie_word_embeddings", config["model_type"] in TIED):
        tops[HEADS] = "vocab_size"
    if config["model_type"] not in PREFIXES:
        tops["norm",] = "hidden_size"
    for names, entry in tops.items():
        size = config[entry]
        found = [part for part in names if part in grouped]
        if not found:
            problems.append(f"missing: all of {' or '.join(names)}")
        for path in (path for part in found for path in grouped[part]):
            if size not in spec[path].shape:
                problems.append(
                    f"misshapen: {path} is {list(spec[path].shape)}, without the configuration's "
                    f"{size}"
                )
    if problems:
        raise CheckpointError(f"the checkpoint's tensors do not fit together: {joined(problems)}")


def _odd_ones(layers: dict[str, dict[str, tuple[int, ...]]]) -> list[str]:
    """Returns the tensors in which a layer differs from most layers of its kind."""
    counts: dict[str, Counter[tuple[int, ...]]] = {}
    for shapes in layers.values():
        for leaf, shape in shapes.items():
            counts.setdefault(leaf, Counter())[shape] += 1
    usual = {  # leaves that half of the layers or more have, so there are few
        leaf: shapes.most_common(1)[0][0]
        for leaf, shapes in counts.items()
        if 2 * shapes.total() >= len(layers)
    }
    problems = []
    for part, shapes in layers.items():
        for leaf, shape in usual.items():
            found = shapes.get(leaf)
            if found is None:
                problems.append(f"missing: {part}.{leaf} {list(shape)}")
            elif found != shape:
                problems.append(
                    f"misshapen: {part}.{leaf} is {list(found)}, in most layers {list(shape)}"
                )
        for leaf in shapes.keys() - usual.keys():
            problems.append(
                f"surplus: {part}.{leaf} {list(shapes[leaf])}, which the other layers lack"
            )
    return problems


def ordered(spec: Spec, file: Path) -> Spec:
    """Returns the spec of a whole checkpoint in reading order. Makes sure that its paths can be
    nested, and can name files: `layers.3.mlp.up_proj.kernel`.

    Args:
        spec: shapes and dtypes.
        file: the file that they come from.

    Raises:
        DamagedError: a name is none of a model's, or one is the beginning of another.
    """
    for path in spec:
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+", path) or len(path) > 200:
            raise DamagedError("no tensor of a model has such a name", file=file, found=path)
        steps = path.split(".")
        for count in range(1, len(steps)):
            if (shorter := ".".join(steps[:count])) in spec:
                raise DamagedError(
                    f"a tensor's name is the beginning of another: {shorter}", file=file, entry=path
                )
    return {path: spec[path] for paths in parts(spec).values() for path in paths}
