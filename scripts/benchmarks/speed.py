"""Dense and smaller checkpoints in llama.cpp and transformers, in turn: size, memory, tokens a
second, and how much of the ideal speedup is reached."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from markdown import markdown

import jaxprune
from convert import Spec
from convert.gguf.writing import tensor_bytes
from convert.names import EMBEDDINGS, split_expert
from jaxprune.calibration import evaluation_windows
from jaxprune.evaluation.perplexity import text_quality
from jaxprune.evaluation.speed import (
    GENERATED,
    PROMPT,
    SETTINGS,
    Setting,
    Speed,
    measure_speed,
    written,
)
from jaxprune.planning.target_hardware import TARGETS
from jaxprune.streaming.model import StreamedModel

PREDICTED = "h100", "rtx4090"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--against", default="smollm2-135m", help="the dense checkpoint")
    parser.add_argument("--eval-text", help="also measure the perplexity of each file on this text")
    parser.add_argument("--eval-seqlen", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", help="of the computation of perplexities")
    parser.add_argument("--out", help="draw quality against speed and size to OUT.png and OUT.svg")
    args = parser.parse_args()
    models = {
        name: jaxprune.load(name, dtype=args.dtype) for name in (args.against, *args.checkpoints)
    }
    dense = models[args.against]
    ratios = perplexities(models, dense, args) if args.eval_text else {}
    found = measure_speed(models, args.against)
    for setting in SETTINGS:
        rows = []
        for name, model in models.items():
            if not (speed := found[name].get(str(setting))):
                continue
            ideal = bytes_read(dense, setting) / bytes_read(model, setting)
            row = [
                Path(name).name,
                f"{speed.file_bytes / 1e6:.1f}",
                f"{speed.peak_bytes / 1e6:.0f}",
            ]
            row += [f"{speed.prompt:.0f}", text(speed.prompt_ratio)]
            row += [f"{speed.generated:.1f}", text(speed.generated_ratio), text(ideal)]
            reached = speed.generated_ratio and speed.generated_ratio / ideal
            rows.append([*row, text(reached), text(ratios.get((name, setting)))])
        if rows:
            print(f"\n{setting}, a prompt of {PROMPT} tokens, then {GENERATED} generated tokens:\n")
            header = ["checkpoint", "weights, MB", "peak memory, MB", "prompt tokens/s"]
            header += ["over dense", "generated tokens/s", "over dense"]
            header += ["bytes read a token, dense over own", "of this ratio"]
            print("\n".join(markdown([*header, "perplexity over dense's"], rows)))
    print("\nPredicted by the data sheets' rates, bfloat16, one sequence, an upper bound:\n")
    rows = [row(name, model, target) for target in PREDICTED for name, model in models.items()]
    header = ["hardware", "checkpoint", "prompt tokens/s", "generated tokens/s"]
    print("\n".join(markdown(header, rows)))
    if args.out:
        draw(args.out, [*models], found, ratios)


def perplexities(
    models: Mapping[str, StreamedModel], dense: StreamedModel, args: argparse.Namespace
) -> dict[tuple[str, Setting], float]:
    """Returns the perplexity of each checkpoint's file in each setting, over the dense model's as
    it is."""
    tokens = evaluation_windows(
        args.eval_text, dense.tokenizer, args.eval_seqlen, args.eval_windows
    )
    (expected,) = text_quality([dense], tokens)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS:
            for name, file in written(models, setting, Path(folder) / setting.type):
                model = jaxprune.load(file, dtype=args.dtype)
                (quality,) = text_quality([model], tokens)
                found[name, setting] = quality.perplexity / expected.perplexity
    return found


def draw(
    stem: str,
    names: Sequence[str],
    found: Mapping[str, Mapping[str, Speed]],
    ratios: Mapping[tuple[str, Setting], float],
) -> None:
    """Draws quality against generated tokens a second and against the size of the file, in
    llama.cpp, a colour for each type of file."""
    costs = {
        "generated tokens/s in llama.cpp": lambda speed: speed.generated,
        "size of the file, MB": lambda speed: speed.file_bytes / 1e6,
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, (label, cost) in zip(axes, costs.items(), strict=True):
        for setting in (one for one in SETTINGS if one.engine == "llama.cpp"):
            points = [
                (cost(speed), ratios[name, setting], Path(name).name)
                for name in names
                if (speed := found[name].get(str(setting))) and (name, setting) in ratios
            ]
            xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
            axis.plot(xs, ys, "o", label=setting.type.upper())
            for x, y, name in points:
                axis.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=7)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("perplexity over the dense model's (lower is better)")
    axes[0].legend(frameon=False)
    for suffix in ("png", "svg"):
        figure.savefig(f"{stem}.{suffix}", dpi=150)


def row(name: str, model: StreamedModel, target: str) -> list[str]:
    """Returns the predicted speed of a checkpoint. Attention and activations are not counted."""
    hardware, read = TARGETS[target], 2 * sum(t.size for t in active(model).values())
    flops = PROMPT * read  # a product and a sum for each weight of two bytes
    prompt = hardware.seconds({"bfloat16": flops}, read)
    names = [hardware.display_name, Path(name).name]
    return [*names, f"{PROMPT / prompt:,.0f}", f"{hardware.bandwidth / read:,.0f}"]


def active(model: StreamedModel) -> Spec:
    """Returns the params that are read for each token: no embedding beside a head, and of experts
    those that a token is routed to."""
    spec, routing = model.reader.spec, model.architecture.config.routing
    embeddings = () if model.architecture.config.tied else EMBEDDINGS
    return {
        path: tensor
        for path, tensor in spec.items()
        if not path.startswith(embeddings)
        and not ((expert := split_expert(path)) and routing and expert[1] >= routing.per_token)
    }


def bytes_read(model: StreamedModel, setting: Setting) -> int:
    """Returns the bytes of weights that are read for each generated token."""
    spec = active(model)
    if setting.to == "gguf":
        return tensor_bytes(spec, model.reader.assets, setting.type)
    return 2 * sum(tensor.size for tensor in spec.values())


def text(ratio: float | None) -> str:
    return f"{ratio:.2f}" if ratio else ""


if __name__ == "__main__":
    main()
