"""The experiments of Boža, "Fast and Effective Weight Update for Pruned Large Language Models"
(TMLR 2024), as data.

A row is a recipe, written as its flags; {k} in it stands for a number of steps, {schedule} for the
one that the paper's published code follows: constant for unstructured patterns, cubic for N:M.
{allocation} and {gradual} stand for a sparsity of its own for every layer and for gradual pruning,
where the pattern is not N:M. An experiment crosses its rows with its patterns. Numbers of the
paper, by checkpoint, row and pattern, are WikiText-2 perplexities, or accuracies in percent.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Measure = Literal["perplexity", "quality", "seconds", "error", "accuracy"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Rows x patterns, measured in one way.

    Attributes:
        title: heads the table and the picture.
        measure: perplexity (a whole checkpoint is pruned), quality (the same, with the divergence
            from the dense model, on every evaluation text), seconds (the same, without evaluation),
            accuracy (the same, with lm-eval's tasks), or error (single layers are pruned, with the
            dense layers before them, so that all rows see the same inputs).
        rows: label -> flags of the recipe.
        patterns: fractions of zeros, or N:M.
        picture: which of the pictures shows it.
        steps: what {k} stands for in the rows that have it.
        small_steps: row -> the same under --small, where that is less.
        linears: share of the layers that come before -> linears of that layer; for `error`. Empty:
            all linears.
        seqlen: tokens of a window, where the paper's are not the usual 2048.
        small_patterns: the patterns under --small, where they are fewer.
        seeds: row -> pattern -> the number of calibration seeds that it is measured with. Rows
            that are left out are measured with one, at every pattern.
        against: rows that the others are compared with, in perplexity and (the first of them) in
            seconds.
        paper: checkpoint -> (row, pattern) -> the paper's perplexity, or its accuracies by task and
            their mean.
    """

    title: str
    measure: Measure
    rows: Mapping[str, str]
    patterns: tuple[str, ...]
    picture: str
    steps: tuple[int, ...] = ()
    small_steps: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    linears: Mapping[float, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    seqlen: int = 2048
    small_patterns: tuple[str, ...] = ()
    seeds: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    against: tuple[str, ...] = ()
    paper: Mapping[str, Mapping[tuple[str, str], Any]] = dataclasses.field(default_factory=dict)

    def over_best(
        self, perplexities: Mapping[tuple[str, str], float]
    ) -> dict[tuple[str, str], float]:
        """(row, pattern) -> the perplexity over that of the best of the rows in `against`, where
        any was measured."""
        best: dict[str, float] = {}
        for (row, pattern), value in perplexities.items():
            if row in self.against:
                best[pattern] = min(value, best.get(pattern, value))
        return {(row, p): value / best[p] for (row, p), value in perplexities.items() if p in best}


def pattern_name(pattern: str) -> str:
    """A pattern as tables and pictures write it."""
    return pattern if ":" in pattern else f"{100 * float(pattern):g} %"


WANDA, SPARSEGPT = "--method wanda", "--method sparsegpt"
ADMM1 = "--mask wanda --update admm"
ADMM_GRAD = "--method admm --schedule {schedule}"
GRADIENT = "--mask wanda --update gradient --steps {k}"

BASELINES = {"ADMM-Grad, constant": "--method admm --schedule constant", "ALPS": "--method alps"}
"""What the presets are compared with."""

PUBLISHED = {
    "magnitude": "--method magnitude",
    "Wanda": WANDA,
    "SparseGPT": SPARSEGPT,
    "ALPS": "--method alps",
    "ADMM-Grad": ADMM_GRAD,
}
"""Methods as they were published: no importance, the same sparsity in every layer, no tuning."""
# What the presets add to ADMM; they have their own damping and schedule besides.
IMPORTANCE = "--weigh-outputs --sensitivity-windows 8 {allocation}"
TUNE_66K = "--tune-epochs 2 {gradual}"
TUNE_250K = "--tune-tokens 250k --tune-chunks 2 {gradual}"
COMPARED = {
    **PUBLISHED,
    **{f"{row}, importance": f"{flags} {IMPORTANCE}" for row, flags in PUBLISHED.items()},
    **{f"{row}, tuned 66k": f"{flags} {TUNE_66K}" for row, flags in PUBLISHED.items()},
    **{
        f"{row}, importance, tuned 66k": f"{flags} {IMPORTANCE} {TUNE_66K}"
        for row, flags in PUBLISHED.items()
    },
    "fast": "--preset fast",
    "best": "--preset best",
    **{
        f"{row}, importance, tuned 250k": f"{flags} {IMPORTANCE} {TUNE_250K}"
        for row, flags in PUBLISHED.items()
    },
    "thorough, 250k": "--preset thorough --tune-tokens 250k",
}
"""Methods with and without what the presets add to ADMM, and the presets."""
FIVE = ("0.7", "0.5", "2:4", "0.8", "0.9")
COMPARED_SEEDS = {
    **{row: dict.fromkeys(FIVE, 1) | {"0.7": 3, "0.5": 3} for row in ("ADMM-Grad", "fast", "best")},
    "thorough, 250k": {"0.7": 3, "0.5": 1, "2:4": 1},
    **{f"{row}, tuned 66k": {"0.7": 1} for row in PUBLISHED},
    **{f"{row}, importance, tuned 66k": {"0.7": 1, "0.5": 1} for row in ("magnitude", "ALPS")},
    **{
        f"{row}, importance, tuned 66k": dict.fromkeys(FIVE, 1) | {"0.7": 3}
        for row in ("Wanda", "SparseGPT", "ADMM-Grad")
    },
    **{
        f"{row}, importance, tuned 250k": {"0.7": int(row not in ("magnitude", "ALPS"))}
        for row in PUBLISHED
    },
}
"""Three where the README and docs/quality.md quote the mean, and where methods are compared after
tuning; one, and fewer patterns, for the rows that take longest. All cells take about 15 hours on 2
cores."""

ALL_METHODS = {
    "magnitude": "--method magnitude",
    "Wanda": WANDA,
    # the cost of ADMM's 20 iterations
    "Wanda mask, Adam (20 steps)": "--mask wanda --update gradient --steps 20",
    "Wanda mask, ADMM (ADMM1)": ADMM1,
    "Wanda mask, exact": "--mask wanda --update exact",
    "SparseGPT": SPARSEGPT,
    "ADMM-Grad": ADMM_GRAD,
    "ALPS": "--method alps",
}


def _table5(
    dense: float, **rows: tuple[float, float, float, float]
) -> dict[tuple[str, str], float]:
    names = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "admm": "ADMM-Grad"}
    patterns = ("0.5", "0.6", "0.8", "2:4")
    paper = {
        (names[row], p): value
        for row, values in rows.items()
        for p, value in zip(patterns, values, strict=True)
    }
    return paper | {("dense", ""): dense}


# Accuracy on boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge and openbookqa, and their
# mean.
TABLE4_DENSE = (75.05, 66.43, 56.92, 69.93, 75.34, 41.89, 34.40, 59.99)
TABLE4 = {
    "0.5": {
        "Wanda": (71.22, 55.60, 51.85, 66.06, 69.11, 36.86, 28.80, 54.21),
        "SparseGPT": (73.05, 52.34, 51.21, 68.42, 70.70, 36.43, 28.60, 54.39),
        "ADMM-Grad": (73.63, 52.34, 52.33, 69.13, 70.74, 37.88, 30.20, 55.18),
    },
    "0.6": {
        "Wanda": (69.26, 59.56, 43.76, 62.35, 62.58, 30.29, 25.20, 50.43),
        "SparseGPT": (70.7, 62.09, 44.84, 65.58, 64.14, 30.97, 25.20, 51.93),
        "ADMM-Grad": (72.41, 58.84, 46.61, 66.77, 64.52, 31.65, 26.20, 52.43),
    },
    "0.7": {
        "Wanda": (59.78, 58.12, 28.81, 50.82, 32.40, 18.85, 14.20, 37.57),
        "SparseGPT": (62.35, 55.95, 33.77, 59.35, 45.70, 23.97, 17.20, 42.61),
        "ADMM-Grad": (66.05, 53.79, 36.29, 59.74, 50.84, 25.50, 18.60, 44.40),
    },
    "0.8": {
        "Wanda": (37.82, 48.37, 26.29, 48.77, 27.23, 20.56, 13.00, 31.72),
        "SparseGPT": (41.89, 52.70, 27.83, 48.38, 30.30, 18.77, 13.40, 33.32),
        "ADMM-Grad": (56.14, 52.70, 28.75, 50.74, 31.56, 18.94, 12.40, 35.89),
    },
    "2:4": {
        "Wanda": (69.3, 51.99, 42.06, 62.75, 60.94, 28.07, 24.60, 48.53),
        "SparseGPT": (70.46, 60.65, 42.99, 64.88, 61.49, 30.12, 23.60, 50.60),
        "ADMM-Grad": (70.27, 55.59, 44.88, 66.14, 64.18, 30.97, 25.20, 51.03),
    },
}


EXPERIMENTS = {
    "fig1": Experiment(
        title="Error of a layer by update steps, Wanda's mask",
        measure="error",
        rows={
            "ADMM": f"{ADMM1} --iterations {{k}}",
            **{
                f"Adam, rate {rate}": f"{GRADIENT} --learning-rate {rate}"
                for rate in (0.1, 0.03, 0.01, 0.003)
            },
            **{
                f"SGD, rate {rate}": f"{GRADIENT} --optimizer sgd --learning-rate {rate}"
                for rate in (0.03, 0.01, 0.003, 0.001)
            },
            "SparseGPT's update": "--mask wanda --update sparsegpt",
            "exact optimum, no ridge": "--mask wanda --update exact",
        },
        patterns=("0.5",),
        picture="convergence",
        steps=(1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 70, 100, 140, 200),
        linears={
            0.1: ("self_attn.q_proj",),
            0.35: ("self_attn.o_proj",),
            0.65: ("mlp.gate_proj",),
            0.9: ("mlp.down_proj",),
        },
    ),
    "fig2": Experiment(
        title="Perplexity by time in the solver, Wanda's mask",
        measure="perplexity",
        rows={
            "ADMM": f"{ADMM1} --iterations {{k}}",
            "Adam": GRADIENT,
            "SparseGPT's update": "--mask wanda --update sparsegpt",
            "SparseGPT with its own mask": SPARSEGPT,
        },
        patterns=("0.6", "0.8"),
        picture="quality_by_time",
        steps=(1, 10, 20, 50, 100),
        small_steps={"ADMM": (1, 10, 20), "Adam": (1, 10, 20, 100)},
    ),
    "table1": Experiment(
        title="Perplexity by sparsity",
        measure="perplexity",
        rows={
            "Wanda": WANDA,
            "SparseGPT": SPARSEGPT,
            "ADMM1": ADMM1,
            "ADMM-Grad": ADMM_GRAD,
        },
        patterns=("0.5", "0.6", "0.7", "0.8", "2:4"),
        picture="quality_by_sparsity",
    ),
    "table2": Experiment(
        title="Masks crossed with updates",
        measure="perplexity",
        rows={
            "Wanda mask, SparseGPT update": "--mask wanda --update sparsegpt",
            "Wanda mask, ADMM update": ADMM1,
            "SparseGPT mask, SparseGPT update": SPARSEGPT,
            "SparseGPT mask, ADMM update": "--mask sparsegpt --update admm",
            "ADMM-Grad mask, SparseGPT update": "--mask admm --schedule {schedule} --update "
            "sparsegpt",
            "ADMM-Grad mask, ADMM update": ADMM_GRAD,
        },
        patterns=("0.6",),
        picture="crossed",
        paper={
            "llama-7b": {
                ("SparseGPT mask, ADMM update", "0.6"): 9.92,
                ("ADMM-Grad mask, ADMM update", "0.6"): 9.22,
            }
        },
    ),
    "table3": Experiment(
        title="Time to prune",
        measure="seconds",
        rows={"Wanda": WANDA, "SparseGPT": SPARSEGPT, "ADMM1": ADMM1, "ADMM-Grad": ADMM_GRAD},
        patterns=("0.5",),
        picture="durations",
    ),
    "table4": Experiment(
        title="Zero-shot accuracy",
        measure="accuracy",
        rows={"Wanda": WANDA, "SparseGPT": SPARSEGPT, "ADMM-Grad": ADMM_GRAD},
        patterns=("0.5", "0.6", "0.7", "0.8", "2:4"),
        picture="accuracies",
        small_patterns=("0.5",),
        paper={
            "llama-7b": {("dense", ""): TABLE4_DENSE}
            | {
                (row, pattern): values
                for pattern, rows in TABLE4.items()
                for row, values in rows.items()
            }
        },
    ),
    "table5": Experiment(
        title="Perplexity of LLaMA-2",
        measure="perplexity",
        rows={"Wanda": WANDA, "SparseGPT": SPARSEGPT, "ADMM-Grad": ADMM_GRAD},
        patterns=("0.5", "0.6", "0.8", "2:4"),
        picture="quality_by_sparsity",
        seqlen=4096,
        paper={
            "llama2-7b": _table5(
                5.12,
                wanda=(6.42, 9.71, 5e3, 11.02),
                sparsegpt=(6.51, 9.58, 108.87, 10.17),
                admm=(6.33, 8.70, 55.93, 9.74),
            ),
            "llama2-13b": _table5(
                4.57,
                wanda=(5.56, 7.75, 2e3, 8.27),
                sparsegpt=(5.63, 7.80, 94.23, 8.32),
                admm=(5.52, 7.09, 43.58, 7.78),
            ),
            "llama2-70b": _table5(
                3.12,
                wanda=(3.98, 4.98, 1e2, 5.16),
                sparsegpt=(3.98, 4.98, 25.86, 5.40),
                admm=(3.95, 4.81, 18.84, 5.19),
            ),
        },
    ),
    "methods": Experiment(
        title="Perplexity by sparsity, all methods",
        measure="perplexity",
        rows=ALL_METHODS,
        patterns=("0.5", "0.6", "0.7", "0.8", "2:4"),
        picture="quality_by_sparsity",
    ),
    "presets": Experiment(
        title="Perplexity by sparsity, presets",
        measure="accuracy",
        rows={
            **BASELINES,
            "fast": "--preset fast",
            "best": "--preset best",
            "fast, uniform": "--preset fast --uniform",
            "best, uniform": "--preset best --uniform",
        },
        patterns=("0.5", "0.6", "0.7", "0.8", "2:4"),
        picture="quality_by_sparsity",
        against=tuple(BASELINES),
    ),
    "budgets": Experiment(
        title="Perplexity by time and by tokens of text",
        measure="accuracy",
        rows={
            "ADMM-Grad, constant": BASELINES["ADMM-Grad, constant"],
            "fast": "--preset fast",
            "best": "--preset best",
            "thorough, 250 thousand tokens": "--preset thorough --tune-tokens 250k",
            "thorough, a million tokens": "--preset thorough",
        },
        patterns=("0.5", "0.6", "0.7", "0.8", "0.9", "0.95", "2:4"),
        picture="quality_by_minutes",
        against=("ADMM-Grad, constant",),
    ),
    "comparison": Experiment(
        title="Methods with and without importance and tuning",
        measure="quality",
        rows=COMPARED,
        patterns=FIVE,
        picture="tuned_alike",
        seeds=COMPARED_SEEDS,
    ),
    "comparison_tasks": Experiment(
        title="Accuracy of seven tasks, all rows",
        measure="accuracy",
        rows={
            row: COMPARED[row]
            for row in ("ADMM-Grad", "SparseGPT, importance, tuned 66k", "best", "thorough, 250k")
        },
        patterns=("0.7",),
        picture="accuracies",
    ),
    "comparison_time": Experiment(
        title="Time to prune, with importance and tuning",
        measure="seconds",
        rows={row: COMPARED[row] for row in COMPARED if "250k" not in row}
        | {"thorough, 250k": COMPARED["thorough, 250k"]},
        patterns=("0.7",),
        picture="durations",
    ),
    "ablation": Experiment(
        title="What each part of the presets brings",
        measure="perplexity",
        rows={
            **BASELINES,
            "outputs weighed": "--weigh-outputs",
            "outputs weighed, damping 0.03": "--weigh-outputs --damping 0.03",
            "and one threshold, within 0.2": "--weigh-outputs --damping 0.03 --max-deviation 0.2",
            "and one threshold, within 0.3": "--weigh-outputs --damping 0.03 --max-deviation 0.3",
            "and one threshold, within 0.45": "--weigh-outputs --damping 0.03 --max-deviation 0.45",
            "fast": "--preset fast",
            # Those below were measured before there were chunks.
            "fast, whole windows": "--preset fast --tune-chunks 1",
            "fast, tokens weighed": "--preset fast --tune-chunks 1 --token-power 0.5",
            "fast, damping 0.1": "--preset fast --tune-chunks 1 --damping 0.1",
            "fast, constant schedule": "--preset fast --tune-chunks 1 --schedule constant",
            "fast, 10 steps to finish": "--preset fast --tune-chunks 1 --finish-steps 10",
            "fast, by ALPS": "--preset fast --tune-chunks 1 --method alps",
            "fast, not tuned": "--preset fast --tune-epochs 0",
            "fast, asymmetry 0.25": "--preset fast --tune-chunks 1 --asymmetry 0.25",
            "best, 1 epoch": "--preset best --tune-epochs 1",
            "best": "--preset best",
        },
        patterns=("0.5", "0.6", "0.7", "0.8", "2:4"),
        picture="gains",
        against=tuple(BASELINES),
    ),
    "layers": Experiment(
        title="Error of layers on the same inputs, all methods",
        measure="error",
        rows={
            **{row: flags for row, flags in ALL_METHODS.items() if row != "ADMM-Grad"},
            "ADMM-Grad, constant": "--method admm --schedule constant",
            "ADMM-Grad, cubic, 10 steps to finish": "--method admm --schedule cubic --finish-steps "
            "10",
            "ADMM-Grad, cubic": "--method admm --schedule cubic",
        },
        patterns=("0.5", "0.6", "0.7", "0.8", "2:4"),
        picture="errors_by_sparsity",
        linears={0.2: (), 0.8: ()},
    ),
}
