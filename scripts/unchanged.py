"""The same commands by another revision and by this one: is what they make the same, byte for byte?

    python scripts/unchanged.py REVISION --ckpt smollm2-135m --layers 3

A checkpoint of the first layers of another one is pruned in many ways by both, each in processes of
its own; so are two tiny random ones, one of them with experts. Compared are the SHA-256 of all
weights and masks, and the numbers of the records: errors and zeros of every linear, and what was
evaluated. Both have to run on one machine, for bytes differ between processors. The exit status is
1 where any differs.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CKPT = "checkpoint"
TINY = {
    "tiny-dense": ("llama", {}),
    "tiny-experts": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}
"""Random checkpoint -> its family, and what its configuration says beside `SIZES`."""
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
WINDOWS = "--calib wikipedia --nsamples 8 --seqlen 128"
TEXT = "--eval ppl --eval-text wikipedia --eval-seqlen 256 --eval-windows 4"
IDS = "--calib ids.npy --nsamples 8 --seqlen 128"
IDS += " --eval ppl --eval-text ids.npy --eval-seqlen 128 --eval-windows 4"
"""What tiny checkpoints are pruned and measured on, in half the time that a text takes."""
CASES = {
    "admm 50 %": f"--ckpt {CKPT} --method admm --sparsity 0.5",
    "alps 50 %": f"--ckpt {CKPT} --method alps --sparsity 0.5",
    "sparsegpt 50 %": f"--ckpt {CKPT} --method sparsegpt --sparsity 0.5",
    "wanda 50 %": f"--ckpt {CKPT} --method wanda --sparsity 0.5 --save-masks masks",
    "admm 2:4": f"--ckpt {CKPT} --method admm --pattern 2:4",
    "crossed, with a finish": f"--ckpt {CKPT} --mask wanda --update exact --finish-steps 5 "
    "--asymmetry 0.3",
    "fast 70 %": f"--ckpt {CKPT} --preset fast --sparsity 0.7",
    "best 70 %": f"--ckpt {CKPT} --preset best --sparsity 0.7",
    "thorough 70 %": f"--ckpt {CKPT} --preset thorough --sparsity 0.7 --tune-tokens 4k "
    "--save-masks late-zeros",
    "tokens weighed": f"--ckpt {CKPT} --sparsity 0.6 --token-power 0.5 --weigh-outputs",
    "bfloat16": f"--ckpt {CKPT} --sparsity 0.5 --dtype bfloat16",
    "hidden states on a disk": f"--ckpt {CKPT} --preset fast --sparsity 0.7 --hidden disk",
    "a GGUF": "--ckpt {gguf} --sparsity 0.5",
    "an Orbax": "--ckpt orbax --sparsity 0.5",
    "a sharded HF": "--ckpt sharded --sparsity 0.5",
    "masks from a file": f"--ckpt {CKPT} --mask from-file:masks --update admm",
    "masks from a checkpoint": f"--ckpt {CKPT} --mask from-checkpoint:wanda-50 --update exact",
    "resumed after a kill": f"--ckpt {CKPT} --preset best --sparsity 0.7",
    "8 CPU devices": f"--ckpt {CKPT} --sparsity 0.5 --devices 8",
    "experts": "--ckpt tiny-experts --sparsity 0.5",
    "experts dropped": "--ckpt tiny-experts --drop-experts 0.25 --sparsity 0.5 --route-all "
    "--method wanda --save-masks masks-of-experts",
    "experts, best 70 %, on a grid": "--ckpt tiny-experts --preset best --sparsity 0.7 "
    "--quantize q4_0",
    "on a grid": "--ckpt tiny-dense --method sparsegpt --sparsity 0.5 --quantize q5_0",
    "fast 70 %, on a grid": "--ckpt tiny-dense --preset fast --sparsity 0.7 --quantize q4_0",
    "asymmetry": "--ckpt tiny-dense --sparsity 0.6 --asymmetry 0.5",
    "rules": "--ckpt tiny-dense --preset fast --sparsity 0.6 --rule *.q_proj=2:4 "
    "--skip layers.1.mlp.*",
    "per output": "--ckpt tiny-dense --method admm --pattern per-output --sparsity 0.6",
    "stored in bfloat16": "--ckpt tiny-dense --sparsity 0.6 --save-dtype bfloat16",
    "alps 2:4": "--ckpt tiny-dense --method alps --pattern 2:4",
}
"""What is made -> its command line; the output's folder has the name."""


def shortened(source: str, layers: int, folder: Path) -> None:
    """Writes a checkpoint's first layers as one file, as several, and by Orbax."""
    from convert import create_checkpoint, open_checkpoint, parts

    reader = open_checkpoint(source)
    kept = [
        path
        for path in reader.spec
        if not path.startswith("layers.") or int(path.split(".")[1]) < layers
    ]
    spec = {path: reader.spec[path] for path in kept}
    with tempfile.TemporaryDirectory() as assets:
        for file in reader.assets.iterdir():
            if file.suffix in (".json", ".txt", ".model") and "index" not in file.name:
                (Path(assets) / file.name).write_bytes(file.read_bytes())
        config = json.loads((reader.assets / "config.json").read_text())
        (Path(assets) / "config.json").write_text(
            json.dumps(config | {"num_hidden_layers": layers})
        )
        for name, to in {CKPT: "hf", "orbax": "orbax"}.items():
            with create_checkpoint(folder / name, spec, Path(assets), to=to) as writer:
                for paths in parts(spec).values():
                    writer.write(reader.read(paths))
    _shard(folder)


def random_checkpoint(folder: Path, family: str, entries: dict[str, Any]) -> None:
    """Writes a random checkpoint of a few small layers, without a tokenizer.

    Args:
        folder: the folder to make.
        family: as transformers calls it.
        entries: what its configuration says beside `SIZES`.
    """
    import numpy as np
    from transformers import AutoConfig

    from convert import create_checkpoint
    from jaxprune.models import architecture_of

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        assets = Path(name)
        AutoConfig.for_model(family, **SIZES, **entries, dtype="float32").save_pretrained(assets)
        spec = architecture_of(assets, np.float32).spec
        params = {
            path: (("norm" in path) + 0.1 * generator.normal(size=one.shape)).astype(np.float32)
            for path, one in spec.items()
        }
        with create_checkpoint(folder, spec, assets) as writer:
            writer.write(params)


def random_ids(file: Path) -> None:
    """Writes token ids of such a checkpoint's vocabulary."""
    import numpy as np

    np.save(file, np.random.default_rng(0).integers(0, SIZES["vocab_size"], (16, 128)))


def _shard(folder: Path) -> None:
    """Two files and an index of the one file's tensors."""
    import ml_dtypes  # noqa: F401  teaches numpy bfloat16
    from safetensors.numpy import load_file, save_file

    target = folder / "sharded"
    target.mkdir()
    for file in (folder / CKPT).iterdir():
        if file.suffix in (".json", ".txt", ".model") and not file.name.startswith("."):
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / CKPT / "model.safetensors")
    names = sorted(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, target / file, metadata={"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: file for file, own in files.items() for name in own},
    }
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def run(tree: Path, folder: Path, line: list[str], wait: Callable[[], bool] | None = None) -> float:
    """Runs a command line of a tree; kills it as soon as what `wait` waits for is there. Returns
    its seconds.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxprune.run", *line],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        while wait and process.poll() is None:
            if wait():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        status = process.wait()
    if status and not (wait and status == -signal.SIGKILL):
        raise RuntimeError(
            f"{' '.join(line)} ended with {status}:\n{(folder / 'log').read_text()[-2000:]}"
        )
    return time.perf_counter() - start


def made(tree: Path, folder: Path, name: str, line: str) -> dict[str, Any]:
    """What a case makes: digests of files, numbers of the record, and the seconds it took."""
    out = "-".join(name.replace("%", "").replace(":", "of").replace(",", "").split())
    data = IDS if "tiny-" in line else f"{WINDOWS} {TEXT}"
    words = [*line.split(), *data.split(), "--out", out]
    spent = 0.0
    if "kill" in name:
        saved = folder / f"{out}.unfinished" / "pruned"  # a file each, NAME.json or .safetensors
        spent += run(tree, folder, words, lambda: sum(map(Path.is_file, saved.glob("*"))) > 1)
        if not (folder / f"{out}.unfinished").exists():
            raise RuntimeError(f"{name}: the run was over before it could be killed")
    spent += run(tree, folder, words)
    files = sorted(folder.joinpath(out).rglob("*.safetensors"))
    if "--save-masks" in words:
        files.append(folder / words[words.index("--save-masks") + 1])
    return {
        "files": {file.name: digest(file) for file in files},
        "numbers": numbers(json.loads((folder / out / "jaxprune.json").read_text())),
        "seconds": spent,
    }


def digest(file: Path) -> str:
    """Returns the SHA-256 of a safetensors file without its metadata, which has no weights."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    return hashlib.sha256(json.dumps(header).encode() + content[end:]).hexdigest()


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the numbers of a record that are compared: these entries, and no others.

    Nothing else here reads records. If revisions name an entry differently, look for both names
    here.
    """
    figures = ("error", "zeros", "wanted", "size", "stats")
    measures = ("windows", "perplexity", "ratio", "kl", "top1")
    return {
        "sparsity": record["sparsity"],
        "kernels": {
            f"layers.{layer['index']}.{path}": [kernel.get(name) for name in figures]
            for layer in record["layers"]
            for path, kernel in (layer.get("kernels") or layer["linears"]).items()
        },
        "evaluation": {
            f"{which}, {text}": [found.get(name) for name in measures]
            for which, quality in record["evaluation"].items()
            for text, found in quality["texts"].items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="of git, with which this tree is compared")
    parser.add_argument(
        "--ckpt", default="smollm2-135m", help="whose first layers are taken (default: %(default)s)"
    )
    parser.add_argument(
        "--gguf", default="smollm2-135m", help="a GGUF, as it is (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=3, help="so many (default: %(default)s)")
    parser.add_argument("--only", default="", help="cases with this in their name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxprune-unchanged-") as place:
        base, same = Path(place), True
        git = ["git", "-C", ROOT, "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", base / "tree", args.revision], check=True)
        try:
            trees = {"then": base / "tree", "now": ROOT}
            for which in trees:
                (base / which).mkdir()
            shortened(args.ckpt, args.layers, base / "then")
            for name, (family, entries) in TINY.items():
                random_checkpoint(base / "then" / name, family, entries)
            random_ids(base / "then/ids.npy")
            for made_of in (CKPT, "orbax", "sharded", *TINY, "ids.npy"):
                subprocess.run(
                    ["cp", "-a", base / "then" / made_of, base / "now" / made_of], check=True
                )
            print("| | weights | numbers | seconds then | now |\n|---|---|---|---|---|")
            for case, line in CASES.items():
                if args.only in case:
                    line = line.replace("{gguf}", args.gguf)
                    then, now = (
                        made(tree, base / which, case, line) for which, tree in trees.items()
                    )
                    equal = [then[what] == now[what] for what in ("files", "numbers")]
                    same &= all(equal)
                    words = ["the same" if one else "OTHERS" for one in equal]
                    seconds = f"{then['seconds']:.1f} | {now['seconds']:.1f}"
                    print(f"| {case} | {words[0]} | {words[1]} | {seconds} |", flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", base / "tree"], check=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
