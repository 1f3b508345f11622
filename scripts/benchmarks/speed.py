"""Dense and smaller checkpoints in llama.cpp and transformers, in turn: size, memory, tokens a
second, and how much of the ideal speedup is reached."""

import argparse

from markdown import markdown

import jaxprune
from convert import Spec
from convert.gguf.writing import tensor_bytes
from convert.names import EMBEDDINGS, split_expert
from jaxprune.evaluation.speed import GENERATED, PROMPT, SETTINGS, Setting, measure_speed
from jaxprune.planning.target_hardware import TARGETS
from jaxprune.streaming.model import StreamedModel

PREDICTED = "h100", "rtx4090"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--against", default="smollm2-135m", help="the dense checkpoint")
    args = parser.parse_args()
    models = {name: jaxprune.load(name) for name in (args.against, *args.checkpoints)}
    dense = models[args.against]
    found = measure_speed(models, args.against)
    for setting in SETTINGS:
        rows = []
        for name, model in models.items():
            if not (speed := found[name].get(str(setting))):
                continue
            ideal = bytes_read(dense, setting) / bytes_read(model, setting)
            row = [name, f"{speed.file_bytes / 1e6:.1f}", f"{speed.peak_bytes / 1e6:.0f}"]
            row += [f"{speed.prompt:.0f}", text(speed.prompt_ratio)]
            row += [f"{speed.generated:.1f}", text(speed.generated_ratio), text(ideal)]
            reached = speed.generated_ratio and speed.generated_ratio / ideal
            rows.append([*row, text(reached)])
        if rows:
            print(f"\n{setting}, a prompt of {PROMPT} tokens, then {GENERATED} generated tokens:\n")
            header = ["checkpoint", "weights, MB", "peak memory, MB", "prompt tokens/s"]
            header += ["over dense", "generated tokens/s", "over dense"]
            header += ["bytes read a token, dense over own", "of this ratio"]
            print("\n".join(markdown(header, rows)))
    print("\nPredicted by the data sheets' rates, bfloat16, one sequence, an upper bound:\n")
    rows = [row(name, model, target) for target in PREDICTED for name, model in models.items()]
    header = ["hardware", "checkpoint", "prompt tokens/s", "generated tokens/s"]
    print("\n".join(markdown(header, rows)))


def row(name: str, model: StreamedModel, target: str) -> list[str]:
    """Returns the predicted speed of a checkpoint. Attention and activations are not counted."""
    hardware, read = TARGETS[target], 2 * sum(t.size for t in active(model).values())
    flops = PROMPT * read  # a product and a sum for each weight of two bytes
    prompt = hardware.seconds({"bfloat16": flops}, read)
    names = [hardware.display_name, name]
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
