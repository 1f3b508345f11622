"""Whether a checkpoint agrees with itself and its configuration, from headers alone.

What one architecture needs in particular is checked by jaxprune.models; this holds for every decoder.
"""

from collections import Counter
from typing import Any

from convert import CheckpointError, Spec, part_of, parts


def check(spec: Spec, config: dict[str, Any]) -> None:
    """Compares the layers with each other, and counts and sizes with the configuration.

    Raises:
        CheckpointError: every missing, surplus and misshapen tensor, in one message.
    """
    grouped = parts(spec)
    layers = {part: _shapes(spec, part, paths) for part, paths in grouped.items() if part.startswith("layers.")}
    problems = []
    if layers:
        usual = {
            leaf: Counter(shapes.get(leaf) for shapes in layers.values()).most_common(1)[0][0]
            for leaf in dict.fromkeys(leaf for shapes in layers.values() for leaf in shapes)
        }
        for part, shapes in layers.items():
            for leaf, shape in usual.items():
                found = shapes.get(leaf)
                if found == shape:
                    continue
                if found is None:
                    problems.append(f"missing: {part}.{leaf} {list(shape or ())}")
                elif shape is None:
                    problems.append(f"surplus: {part}.{leaf} {list(found)}, which the other layers lack")
                else:
                    problems.append(f"misshapen: {part}.{leaf} is {list(found)}, in most layers {list(shape)}")
    wanted = {f"layers.{i}" for i in range(config.get("num_hidden_layers", len(layers)))}
    problems += [f"missing: all of {part}" for part in sorted(wanted - layers.keys())]
    problems += [f"surplus: all of {part}" for part in sorted(layers.keys() - wanted)]
    tops = {"embed_tokens": config.get("vocab_size"), "norm": config.get("hidden_size")}
    if not config.get("tie_word_embeddings"):
        tops["lm_head"] = config.get("vocab_size")
    for part, size in tops.items():
        if part not in grouped:
            problems.append(f"missing: all of {part}")
        for path in grouped.get(part, ()):
            if size is not None and size not in spec[path].shape:
                problems.append(f"misshapen: {path} is {list(spec[path].shape)}, without the configuration's {size}")
    if problems:
        raise CheckpointError(
            f"the checkpoint's tensors do not fit together ({len(problems)} problems):\n  " + "\n  ".join(problems[:30])
        )


def _shapes(spec: Spec, part: str, paths: list[str]) -> dict[str, tuple[int, ...]]:
    return {path.removeprefix(f"{part_of(path)}."): spec[path].shape for path in paths if part_of(path) == part}
