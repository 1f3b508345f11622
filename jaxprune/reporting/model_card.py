"""The model card of a pruned checkpoint: what was done to which model, and how good it is."""

import re
from collections.abc import Sequence
from pathlib import Path

from convert.hub import repository_of
from jaxprune.evaluation.perplexity import short_name
from jaxprune.evaluation.quality import table
from jaxprune.reporting.record import RECORD, Run
from jaxprune.solve.quantized_layers import ERROR


def summary(run: Run) -> list[tuple[str, str]]:
    """Returns what a run did and took, as rows of a table."""
    windows, length = run.calibration.windows
    calibration = f"{windows} windows of {length} tokens"
    if run.config.calib:
        calibration += f", {short_name(run.config.calib)}"
    rows = [
        ("checkpoint", run.checkpoint),
        ("method", run.method_text),
        ("pattern", run.pattern_text),
        ("calibration", calibration),
    ]
    if run.config.tune_text:
        rows.append(("text of the tuning", short_name(run.config.tune_text)))
    rows.append(("sparsity of the linear layers", f"{100 * run.sparsity:.4f} %"))
    if run.recipe.quantize and (
        count := sum(ERROR not in kernel.stats for kernel in run.kernels.values())
    ):
        rows.append(("not quantized", f"{count} linear layers, whose inputs are no multiple of 32"))
    if run.resumed_layers:
        rows.append(
            ("resumed", f"{run.resumed_layers} of {len(run.layers)} layers were pruned before")
        )
    if run.removed.mix:
        mix = " and ".join(run.removed.mix.structure.removed.values())
        rows.append(
            ("mix of parts removed", f"{mix}: the best of {len(run.removed.mix.candidates)}")
        )
    if run.removed.layers:
        rows.append(("layers removed", ", ".join(map(str, sorted(run.removed.layers)))))
    if run.removed.predictors:
        names = ", ".join(run.removed.predictors)
        rows.append(("modules for multi-token prediction removed", names))
    if run.removed.experts:
        rows.append(("experts kept", f"{len(next(iter(run.removed.experts.values())))} a layer"))
    if run.few_tokens:
        what = "experts' linear layers with fewer tokens than inputs"
        rows.append((what, f"{len(run.few_tokens)}, named in {RECORD}"))
    rows += sizes(run).items()
    rows += [(f"time, {phase}", f"{seconds or 0:.1f} s") for phase, seconds in run.seconds.items()]
    rows += [
        (f"peak memory, {where}", f"{size / 1e9:.2f} GB") for where, size in run.peak_bytes.items()
    ]
    return rows


def sizes(run: Run) -> dict[str, str]:
    """Returns what the weights of a run's result take: as they are stored, packed, and in GGUF
    files."""
    if "pruned" not in run.disk_bytes:
        return {}
    dtype = f", {run.save_dtype}" if run.save_dtype else ""
    found = {"weights": f"{megabytes(run.disk_bytes['pruned'])}{dtype}"}
    others = dict(run.converted_bytes)
    if packed := others.pop("packed", None):
        found["packed"] = f"about {megabytes(packed)}"
    if others:
        found["as GGUF"] = "about " + ", ".join(
            f"{megabytes(size)} ({kind.upper()})" for kind, size in others.items()
        )
    return found


def sizes_text(run: Run) -> str:
    """Returns the same as a clause; "" where nobody counted."""
    return "; ".join(f"{what} {size}" for what, size in sizes(run).items())


def megabytes(size: int) -> str:
    """Returns bytes in MB, three digits or more."""
    return f"{size / 1e6:.3g} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def model_card(run: Run) -> str:
    """Returns the card as Markdown."""
    ckpt, rows = run.config.ckpt, "".join(map(_row, summary(run)))
    measured = ""
    if run.evaluation:
        header, cells = table(run.evaluation)
        measured = "\n" + "".join(map(_row, [header, ["---"] * len(header), *cells]))
    quantized = ""
    if run.recipe.quantize:
        to = f"`jaxprune convert FOLDER FILE.gguf --type {run.recipe.quantize}`"
        quantized = (
            f"The linear layers lie on the grid of {run.recipe.quantize.upper()}, "
            f"so that {to} writes them as they are.\n"
        )
    rounded = f", rounded to {run.save_dtype}" if run.save_dtype else ""
    removed = " and ".join(run.recipe.structure.removed.values())
    if run.recipe.prunes:
        tags, heading = ["pruned", "sparse", "jaxprune"], f"pruned to {run.pattern_text}"
        heading += f", without {removed}" * bool(removed)
        first = f" It removed {removed} first." * bool(removed)
        did = (
            'pruned in one shot by jaxprune, which implements Boža, "Fast and Effective Weight '
            'Update\nfor Pruned Large Language Models" (arXiv 2401.02938). The weights are '
            f"ordinary dense tensors with exact zeros.{first}"
        )
    elif removed:
        tags, heading = ["pruned", "jaxprune"], f"without {removed}"
        did = f"made smaller by jaxprune, which removed {removed}. Its linear layers are dense."
    else:
        tags, heading = ["jaxprune"], "linear layers left dense"
        did = "written by jaxprune, which left its linear layers dense."
    base = f"base_model: {repository}\n" if (repository := repository_of(ckpt)) else ""
    return f"""---
{base}tags:
{"".join(f"- {tag}{chr(10)}" for tag in tags)}---

# {escaped(Path(ckpt).name)}, {escaped(heading)}

{escaped(run.checkpoint)}, {did}
Embeddings, norms and head are those of the dense checkpoint{rounded}. {quantized}Everything needed
to repeat the run is in {RECORD}.

| | |
|---|---|
{rows}{measured}"""


def _row(cells: Sequence[str]) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(map(escaped, cells))} |\n"


def escaped(text: str) -> str:
    """Returns a name on one line, none of whose characters is Markdown's or HTML's."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return re.sub(r"([\\|`*\[\]$])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")
