"""What runs need and take on hardware that is not here: checkpoints by recipes by targets.

    pip install 'jaxprune[plan-gpu]' 'jaxprune[plan-tpu]'
    JAX_PLATFORMS=cpu python scripts/hardware.py --targets h100 h100x8 v5e v5ex8 --programs

Prints Markdown tables. Checkpoints are taken by their configuration, in bfloat16, 128 windows of
2048 tokens, 70 % sparsity, no evaluation. A target's name may end in the number of devices.
--programs adds a table of the programs: how long each takes over the least time of its products,
arguments and results, its instructions, and its compilation.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxprune.commands.plan import sizes_of  # noqa: E402
from jaxprune.commands.run_options import parse  # noqa: E402
from jaxprune.commands.terminal import duration  # noqa: E402
from jaxprune.hardware import writing_for  # noqa: E402
from jaxprune.planning import fit_check  # noqa: E402
from jaxprune.planning.estimate import GIB, Need, need  # noqa: E402
from jaxprune.planning.target_hardware import TARGETS, target_of, without_cache  # noqa: E402
from tests.helpers.public import PUBLIC, sizes  # noqa: E402

MODELS = {
    "SmolLM2-135M": ("llama", PUBLIC["llama"]["SmolLM2-135M"]),
    "Llama-3.1-8B": (
        "llama",
        PUBLIC["llama"]["Llama-3.1-8B"] | {"max_position_embeddings": 131072},
    ),
    "LLaMA-2-7B": ("llama", sizes(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096)),
    "LLaMA-2-70B": ("llama", PUBLIC["llama"]["Llama-2-70B"]),
    "Mixtral-8x7B": ("mixtral", PUBLIC["mixtral"]["Mixtral-8x7B"]),
}
RECIPES = {"admm": "--method admm"} | {
    name: f"--preset {name}" for name in ("fast", "best", "thorough")
}
COLUMNS = (
    "checkpoint",
    "recipe",
    "target",
    "GiB of a device",
    "fits",
    "PFLOP",
    "host link, TB",
    "sent, TB",
    "at least",
)


def planned(model: str, recipe: str, target_name: str) -> tuple[Need, list[str]]:
    """Returns what a run needs on a target, and its row."""
    found = re.fullmatch(r"(.+)x(\d+)", target_name) if target_name not in TARGETS else None
    name, count = found.groups() if found else (target_name, "1")
    target = target_of(name)
    family, config = MODELS[model]
    with tempfile.TemporaryDirectory() as folder, writing_for(target.hardware), without_cache():
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": family, **config}))
        line = [
            "--ckpt",
            folder,
            "--dtype",
            "bfloat16",
            "--seqlen",
            "2048",
            "--eval",
            "none",
            "--sparsity",
            "0.7",
        ]
        run = sizes_of(
            *parse([*line, *RECIPES[recipe].split()]), target.devices(int(count)), target
        )
        found = need(run, target=target)
    rows = found.phases.values()
    petaflop = sum(row.flops.total() for row in rows) / 1e15
    moved, peak = sum(row.transfers for row in rows) / 1e12, found.device / GIB
    phases = ", ".join(f"{phase} {duration(row.seconds)}" for phase, row in found.phases.items())
    fits = "no" if list(fit_check.device_shortages(found, run)) else "yes"
    row = [
        model,
        recipe,
        target_name,
        f"{peak:.1f} of {target.usable / GIB:.0f}",
        fits,
        f"{petaflop:.3g}",
    ]
    sent = sum(row.exchanged for row in rows) / 1e12
    return found, [
        *row,
        f"{moved:.3g}",
        f"{sent:.3g}",
        f"{duration(found.seconds)}: {phases}",
    ]


def print_programs(title: str, need: Need) -> None:
    """Prints what each program costs; those that were compiled for another are left out."""
    print(f"\n{title}: {sum(cost.compilation for cost in need.costs):.0f} s of compilation\n")
    print(
        "| phase | program | calls | ms of a call | over its bound | instructions | compiled in, s "
        "|"
    )
    print("|---|---|---:|---:|---:|---:|---:|")
    for cost in need.costs:
        if cost.compilation > 0.05:
            times = f"{1e3 * cost.seconds:.3g} | {cost.seconds / cost.bound:.2f}"
            rest = f"{cost.instructions} | {cost.compilation:.1f}"
            print(
                f"| {cost.phase} | {cost.name} | {cost.calls:.0f} | {times} | {rest} |", flush=True
            )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["h100", "v5e"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--programs", action="store_true")
    args = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    tables = []
    for target in args.targets:
        for model in args.models:
            for recipe in args.recipes:
                need, row = planned(model, recipe, target)
                print("| " + " | ".join(row) + " |", flush=True)
                tables.append((f"{model}, {recipe}, {target}", need))
    if args.programs:
        for title, need in tables:
            print_programs(title, need)


if __name__ == "__main__":
    main()
