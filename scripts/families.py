"""Model families: how far their logits are from transformers', and which public checkpoints they
take.

    python scripts/families.py

Prints a table. Logits are compared on tiny random checkpoints, in float32 against transformers in
float64. Public checkpoints are taken by their configuration: shapes only, through the plan of a run
of ADMM on 128 windows of 2048 tokens in bfloat16, whose FLOPs are shown.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from jaxprune import load  # noqa: E402
from jaxprune.commands.plan import sizes_of  # noqa: E402
from jaxprune.commands.run_options import parse  # noqa: E402
from jaxprune.planning.estimate import need  # noqa: E402
from jaxprune.sharding import ONE_DEVICE  # noqa: E402
from tests.helpers import families, public  # noqa: E402

MODELS = Path(__file__).resolve().parents[1] / "jaxprune/models"


def difference(family: str) -> float:
    """The largest difference of a logit over that of the largest logit, over all variants."""
    found = 0.0
    for variant in families.VARIANTS[family]:
        with tempfile.TemporaryDirectory() as folder:
            reference = families.save(Path(folder), families.config(family, variant)).double()
            tokens = np.random.default_rng(0).integers(0, 300, (2, 100), np.int32)
            with torch.no_grad():
                expected = reference(torch.tensor(tokens.astype(np.int64))).logits.numpy()
            own = np.abs(load(folder).logits(tokens) - expected).max() / np.abs(expected).max()
            found = max(found, float(own))
    return found


def planned(family: str, name: str) -> str:
    """A checkpoint's weights in billions, and the FLOPs of its run."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(
            json.dumps({"model_type": family, **public.PUBLIC[family][name]})
        )
        line = [
            "--ckpt",
            folder,
            "--dtype",
            "bfloat16",
            "--seqlen",
            "2048",
            "--eval",
            "none",
            "--device-memory",
            "80",
        ]
        run = sizes_of(*parse(line), ONE_DEVICE)
        weights = sum(np.prod(param.shape) for param in run.spec.values()) / 1e9
        phases = need(run, within=math.inf).phases.values()  # no program is compiled
        return f"{name} ({weights:.3g} B, {sum(one.flops.total() for one in phases) / 1e15:.3g})"


def main() -> None:
    print(
        "| family | lines | largest difference of a logit | checkpoints (weights, PFLOP of a run) |"
    )
    print("|---|---:|---:|---|")
    for family in sorted(public.PUBLIC):
        lines = len((MODELS / f"{family}.py").read_text().splitlines())
        checkpoints = ", ".join(planned(family, name) for name in public.PUBLIC[family])
        print(f"| `{family}` | {lines} | {difference(family):.1e} | {checkpoints} |", flush=True)


if __name__ == "__main__":
    main()
