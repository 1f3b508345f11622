"""Other pruning tools and jaxprune on the same windows: seconds, peak memory, zeros, perplexity."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from alone import alone
from markdown import markdown

from convert.writing import write_text
from jaxprune import calibration, load
from jaxprune.planning.this_machine import describe_hardware

SCRIPTS = Path(__file__).parent / "peer_scripts"
ROOT = Path(__file__).parents[2]
BOTH = ("0.5", "2:4")


class Job(NamedTuple):
    """A tool's method at a pattern.

    Attributes:
        tool: as the table calls it.
        method: as the table calls it.
        pattern: fraction of zeros, or N:M.
        arguments: of the process, where {out} stands for the folder that it makes.
    """

    tool: str
    method: str
    pattern: str
    arguments: tuple[str, ...]


def main() -> None:
    """Runs what is missing, one process after another, and prints the tables."""
    args = parse()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    dense = folder / "dense"
    if not (dense / "config.json").exists():
        convert = [sys.executable, "-m", "jaxprune", "convert", args.ckpt, str(dense)]
        run(convert, {}, folder / "convert.log")
    model = load(str(dense))
    windows = calibration.calibration_windows(
        args.calib, model.tokenizer, args.nsamples, args.seqlen, pack=True
    )
    held_out = calibration.evaluation_windows(
        args.eval_text, model.tokenizer, args.seqlen, args.eval_windows
    )
    tokens = folder / "windows.npy"
    np.save(tokens, windows)
    identity = {
        "checkpoint": args.ckpt,
        "windows": [list(windows.shape), digest(windows)],
        "evaluation": [list(held_out.shape), digest(held_out)],
        "hardware": describe_hardware(),
    }
    results = [(Job("none", "dense", "", ()), {"perplexity": alone(measure, dense, held_out)[0]})]
    for job in jobs(args, dense, tokens):
        if args.only and job.tool not in args.only:
            continue
        result = result_of(job, identity, folder, held_out)
        print(f"{job.tool}, {job.method}, {job.pattern}: {result}", flush=True)
        results.append((job, result))
    text = "\n".join(tables(results, identity, args))
    write_text(folder / "peers.md", text + "\n")
    print(text)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="the dense checkpoint, as jaxprune --ckpt")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--eval-text", required=True, help="evaluation text")
    parser.add_argument("--out", required=True, help="folder for results; a later call resumes")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window")
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="these tools only, such as jaxprune")
    for flag, what in (
        ("--llm-compressor", "llmcompressor"),
        ("--model-optimizer", "nvidia-modelopt"),
        ("--official", "transformers 4.36, datasets below 3, pandas"),
    ):
        parser.add_argument(flag, type=Path, metavar="PYTHON", help=f"a Python that has {what}")
    for name in OFFICIAL:
        parser.add_argument(f"--{name}", type=Path, help=f"a clone of {OFFICIAL[name]}")
    return parser.parse_args(argv)


OFFICIAL = {
    "wanda": "github.com/locuslab/wanda",
    "sparsegpt": "github.com/IST-DASLab/sparsegpt",
    "admm": "github.com/fmfi-compbio/admm-pruning",
    "alps": "github.com/mazumder-lab/ALPS",
}
OURS = {
    "magnitude": ("--method", "magnitude"),
    "wanda": ("--method", "wanda"),
    "sparsegpt": ("--method", "sparsegpt"),
    "admm": ("--method", "admm"),
    "alps": ("--method", "alps"),
    "fast": ("--preset", "fast"),
    "best": ("--preset", "best"),
}


def jobs(args: argparse.Namespace, dense: Path, tokens: Path) -> list[Job]:
    """All that can run with the environments and clones that the command line names."""
    common = (str(dense), str(tokens), "{out}")
    found = []

    def add(tool: str, python: Path, script: str, methods: Sequence[str], patterns: Sequence[str]):
        for method in methods:
            for pattern in patterns:
                run = (str(python), str(SCRIPTS / script), *common, method, pattern)
                found.append(Job(tool, method, pattern, run))

    if args.official:
        for name in OFFICIAL:
            if clone := getattr(args, name):
                add("authors' code", args.official, "official.py", [name], BOTH)
                for _ in BOTH:
                    job = found.pop(-len(BOTH))
                    found.append(job._replace(arguments=(*job.arguments, str(clone.resolve()))))
    if args.llm_compressor:
        python = args.llm_compressor
        add("llm-compressor", python, "llm_compressor.py", ["wanda", "sparsegpt"], BOTH)
    if args.model_optimizer:
        python = args.model_optimizer
        methods = ["magnitude", "sparsegpt"]
        add("Model Optimizer", python, "model_optimizer.py", methods, ["2:4"])
    for method, flags in OURS.items():
        for pattern in BOTH:
            amount = "--pattern" if ":" in pattern else "--sparsity"
            windows = np.load(tokens, mmap_mode="r")
            run = (sys.executable, "-m", "jaxprune.run", "--ckpt", str(dense))
            run += ("--calib", str(tokens), "--nsamples", str(windows.shape[0]))
            run += ("--seqlen", str(windows.shape[1]), "--save-dtype", "float32", "--eval", "none")
            run += (*flags, amount, pattern, "--out", "{out}")
            found.append(Job("jaxprune", method, pattern, run))
    return found


def result_of(
    job: Job, identity: Mapping[str, Any], folder: Path, held_out: np.ndarray
) -> dict[str, Any]:
    """A job's result: from its file, or by running it now."""
    name = f"{job.tool}-{job.method}-{job.pattern}".replace(" ", "-").replace("'", "")
    file = folder / f"{name.replace(':', 'of')}.json"
    if file.exists() and (saved := json.loads(file.read_text()))["identity"] == identity:
        return saved["result"]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / "pruned"
        arguments = [argument.replace("{out}", str(out)) for argument in job.arguments]
        # Every process starts without compiled programs of an earlier one.
        try:
            seconds, peak, output = run(
                arguments, {"XDG_CACHE_HOME": place}, file.with_suffix(".log")
            )
        except subprocess.CalledProcessError as error:
            # Not saved: the next call tries again.
            return {"failed": f"exit status {error.returncode}: {error.stderr}"}
        perplexity, zeros, violations = alone(measure, out, held_out)
        if job.tool == "jaxprune":
            record = json.loads((out / "jaxprune.json").read_text())
            told = {
                "seconds": sum(filter(None, record["seconds"].values())),
                "versions": {"jaxprune": commit(), "jax": version("jax")},
            }
        else:
            told = json.loads(output.splitlines()[-1])
        result = told | {
            "process_seconds": seconds,
            "peak_bytes": peak,
            "perplexity": perplexity,
            "zeros": zeros,
            "wrong_groups": violations if ":" in job.pattern else None,
        }
    write_text(file, json.dumps({"identity": identity, "result": result}, indent=1) + "\n")
    return result


def run(arguments: Sequence[str], changed: Mapping[str, str], log: Path) -> tuple[float, int, str]:
    """Runs a process to its end, its messages in a file; returns its seconds, its peak resident
    bytes, and its output."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | changed
    with tempfile.TemporaryFile() as output, log.open("wb") as messages:
        process = subprocess.Popen(arguments, stdout=output, stderr=messages, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if code := os.waitstatus_to_exitcode(status):
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise subprocess.CalledProcessError(code, arguments, stderr=last)
        output.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return seconds, usage.ru_maxrss * unit, output.read().decode()


def measure(checkpoint: Path, tokens: np.ndarray) -> tuple[float, float, int]:
    """Perplexity by plain transformers in float32; zeros of the decoder layers' linear weights over
    these weights; groups of four inputs with more than two other weights."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    violations = sum(int(((weight.reshape(-1, 4) != 0).sum(1) > 2).sum()) for weight in weights)
    losses = []
    with torch.no_grad():
        for window in torch.from_numpy(tokens.astype(np.int64)):
            losses.append(model(window[None], labels=window[None]).loss.item())
    total = sum(weight.numel() for weight in weights)
    return float(np.exp(np.mean(losses))), zeros / total, violations


def digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()[:12]


def commit() -> str:
    arguments = ["git", "-C", str(ROOT), "log", "-1", "--format=%h of %cs"]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip()


def tables(
    results: Sequence[tuple[Job, Mapping[str, Any]]],
    identity: Mapping[str, Any],
    args: argparse.Namespace,
) -> list[str]:
    """The lines of a table for each pattern, and the versions of all tools."""
    (_, dense), *results = results
    windows, length = identity["windows"][0]
    held_out = identity["evaluation"][0][0]
    lines = [
        "# Other tools on the same windows",
        "",
        f"{args.ckpt}, {windows} windows of {length} tokens, one process after another on "
        f"{identity['hardware']}. Seconds are of the whole process, which starts without compiled "
        "programs, and of the pruning alone. Memory is the process's peak resident memory. "
        f"Perplexity is that of transformers on {held_out} windows of held-out text (dense "
        f"{dense['perplexity']:.2f}). In parentheses: over jaxprune's same method.",
    ]
    for pattern in BOTH:
        ours = {
            job.method: result
            for job, result in results
            if job.tool == "jaxprune" and job.pattern == pattern and "failed" not in result
        }
        rows = []
        for job, result in results:
            if job.pattern != pattern:
                continue
            if "failed" in result:
                rows.append([job.tool, job.method, result["failed"], "", "", "", ""])
                continue
            other = ours.get(job.method) if job.tool != "jaxprune" else None

            def text(key: str, form: Callable[[float], str], own=result, other=other) -> str:
                ratio = f" ({own[key] / other[key]:.2f})" if other else ""
                return form(own[key]) + ratio

            wrong = result["wrong_groups"]
            rows.append(
                [
                    job.tool,
                    job.method,
                    text("process_seconds", "{:.0f}".format),
                    text("seconds", "{:.0f}".format),
                    text("peak_bytes", lambda value: f"{value / 2**30:.2f}"),
                    f"{100 * result['zeros']:.3f} %"
                    + (f", {wrong} groups of 4 have more than 2 weights" if wrong else ""),
                    text("perplexity", "{:.2f}".format),
                ]
            )
        header = ["tool", "method", "seconds", "to prune", "GiB", "zeros", "perplexity"]
        title = pattern if ":" in pattern else f"{100 * float(pattern):g} %"
        lines += ["", f"## {title}", "", *markdown(header, rows)]
    versions = {}
    for job, result in results:
        versions.setdefault(job.tool, {}).update(result.get("versions", {}))
    lines += ["", "## Versions", ""]
    lines += [
        f"- {tool}: {', '.join(f'{name} {found}' for name, found in names.items())}"
        for tool, names in versions.items()
    ]
    return lines
