"""The files that are damaged: a tiny checkpoint in each format, and all else that a command
reads."""

import contextlib
import gzip
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np

from tests.hostile import mutations
from tests.hostile.answers import require
from tests.hostile.targets import MEASURE, PRUNE


def build(base: Path) -> None:
    """Makes all files, once; the same bytes each time."""
    import gguf
    import pyarrow
    import pyarrow.parquet

    from convert.__main__ import main as convert
    from jaxprune import Importance, Magnitude, Recipe, load
    from jaxprune.api import snapshot as snapshots
    from jaxprune.commands.evaluate import main as evaluate
    from jaxprune.commands.prune import main as run
    from tests.helpers import expert_files, tiny
    from tests.helpers import rows as task_rows
    from tests.helpers.checkpoints import write_gguf

    base.mkdir(parents=True)
    with contextlib.chdir(base), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        config = tiny.config(num_hidden_layers=2)
        tiny.save(Path("hf"), config)
        Path("hf/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        Path("hf/precious").write_text("a file of the user's")
        Path("precious").write_text("another")
        tiny.save(Path("shards"), config, max_shard_size="50KB")
        write_gguf(Path("f32.gguf"), config, gguf.GGMLQuantizationType.F32)
        quantized = tiny.config(num_hidden_layers=1, hidden_size=32, intermediate_size=64)
        write_gguf(Path("q8.gguf"), quantized, gguf.GGMLQuantizationType.Q8_0)
        fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        expert_files.save(Path("fp8"), "qwen3_moe", fp8)
        expert_files.save(Path("mxfp4"), "gpt_oss", {"quant_method": "mxfp4"})
        expert_files.save_gguf(Path("experts.gguf"), Path("experts"))
        tiny.write_text(Path("text.jsonl"), 30)
        texts = [json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines()]
        Path("text.txt").write_text("\n".join(texts))
        Path("text.json.gz").write_bytes(gzip.compress(Path("text.jsonl").read_bytes(), mtime=0))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "text.parquet")
        words = PRUNE.split()
        flags = zip(words[::2], words[1::2], strict=True)
        options = {
            flag.removeprefix("--"): value
            for flag, value in [*flags, ("--ckpt", "hf"), ("--seqlen", 16)]
        }
        Path("options.json").write_text(json.dumps(options))
        np.save("ids.npy", np.random.default_rng(0).integers(0, 300, (8, 16)))
        task_rows.write(Path("rows"))
        for file in Path("rows").iterdir():
            if file.stem != "rte":
                file.unlink()
        require(convert(["hf", "orbax", "--to", "orbax"]) == 0, "convert")
        line = f"--ckpt hf {PRUNE}".split()
        require(run([*line, "--out", "pruned", "--save-masks", "masks.safetensors"]) == 0, "run")
        require(convert(["pruned", "packed", "--to", "packed"]) == 0, "convert")
        require(
            evaluate([*"pruned --against hf --out evaluation".split(), *MEASURE.split()]) == 0,
            "evaluate",
        )
        tokens = np.load("ids.npy").astype(np.int32)
        model = load("hf")
        recipe = Recipe(Magnitude(), importance=Importance(weigh_outputs=True), asymmetry=0.5)
        snapshots.save(Path("layer.safetensors"), snapshots.capture(model, tokens, 1, recipe))
        _interrupted([*line, "--out", "out"])
        mutations.odd_paths(Path("odd"))


def _interrupted(line: list[str]) -> None:
    """A run that is stopped when all of it is written: its store is left."""
    from jaxprune.commands.prune import main as run

    with (
        mock.patch("convert.hf.Writer.finish", side_effect=KeyboardInterrupt),
        open(os.devnull, "w") as null,
    ):
        with contextlib.redirect_stderr(null):
            require(run(line) == 130 and Path("out.unfinished").exists(), "no store is left")
