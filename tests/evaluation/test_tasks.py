"""The paper's tasks on local rows: stock prompts and metrics, both backends, item for item."""

import dataclasses
import json
import typing
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest

from convert import open_checkpoint
from jaxprune import StreamedModel
from jaxprune.errors import InputError
from jaxprune.evaluation.lm import StreamedLM
from jaxprune.evaluation.quality import Measures, Quality
from jaxprune.evaluation.tasks import (
    ZERO_SHOT,
    Tasks,
    groups_of,
    mean_accuracy,
    summarize,
    task_manager,
)
from tests.helpers import rows
from tests.helpers.optional import needs_torch, torch

if torch:
    from jaxprune.evaluation.torch_lm import hflm


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    return Tasks(list(ZERO_SHOT), rows.write(tmp_path_factory.mktemp("tasks") / "rows"))


@needs_torch
def test_both_backends_agree_item_for_item(tasks: Tasks, checkpoint: Path) -> None:
    reader = open_checkpoint(checkpoint)
    ours, theirs = (
        tasks.run(model)
        for model in (StreamedLM(StreamedModel(reader)), hflm(reader, np.dtype("float32")))
    )
    assert list(ours["samples"]) == list(ZERO_SHOT)
    for task, samples in ours["samples"].items():
        assert len(samples) == len(rows.ROWS[task])
        for mine, other in zip(samples, theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            assert all(mine[metric] == other[metric] for metric in mine["metrics"])
            scores = zip(mine["filtered_resps"], other["filtered_resps"], strict=True)
            assert all(
                a == pytest.approx(b, rel=1e-4, abs=1e-4) and g == h for (a, g), (b, h) in scores
            )
    assert summarize(ours) == summarize(theirs)


def test_prompts_are_the_stock_ones(tasks: Tasks, checkpoint: Path) -> None:
    results = tasks.run(StreamedLM(checkpoint))
    first = {task: samples[0]["arguments"] for task, samples in results["samples"].items()}
    assert first["boolq"][0] == (
        "The cat sat on the mat.\nQuestion: did the cat sit on the mat?\nAnswer:",
        " no",
    )
    assert first["rte"][1] == (
        "The cat sat.\nQuestion: A cat sat. True or False?\nAnswer:",
        " False",
    )
    assert first["openbookqa"][2] == ("The cat sat on", " the old mat")
    assert first["winogrande"][1][1] == " was big."
    assert len(first["hellaswag"]) == len(first["arc_easy"]) == 4
    assert all(shots == 0 for shots in results["n-shot"].values())


def test_the_papers_tasks_are_found_without_reading_all(monkeypatch: pytest.MonkeyPatch) -> None:
    few, every = task_manager(True).task_index, task_manager(False).task_index
    assert [few[name] for name in ZERO_SHOT] == [every[name] for name in ZERO_SHOT]
    assert 7 <= len(few) < 50 < len(every)

    asked = []

    class Elsewhere:
        task_index: typing.ClassVar[dict[str, object]] = {}

        def __init__(self, **options: object) -> None:
            asked.append(options)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Elsewhere)
    task_manager.__wrapped__(True)
    assert [bool(options) for options in asked] == [True, False]


def test_accuracies_are_counted(tasks: Tasks, checkpoint: Path) -> None:
    results = tasks.run(StreamedLM(checkpoint))
    summary = summarize(results)
    for task, samples in results["samples"].items():
        assert summary[task]["acc"] == pytest.approx(np.mean([sample["acc"] for sample in samples]))
    assert {"acc_norm", "acc_norm_stderr"} <= summary["hellaswag"].keys()
    mean = mean_accuracy(summary)
    assert mean["acc"] == pytest.approx(np.mean([summary[task]["acc"] for task in ZERO_SHOT]))
    assert mean_accuracy({"wikitext": {"word_perplexity": 3.0}}) == {}


def test_the_mean_and_its_error() -> None:
    tasks = {"a": {"acc": 0.5, "acc_stderr": 0.03}, "b": {"acc": 0.7, "acc_stderr": 0.04}}
    assert mean_accuracy(tasks) == pytest.approx({"acc": 0.6, "acc_stderr": 0.025})
    assert mean_accuracy(tasks | {"c": {"acc": 0.9}}) == pytest.approx({"acc": 0.7})


def test_the_mean_is_that_of_tasks_and_not_of_their_groups() -> None:
    accuracies = {"mmlu": 0.5, "mmlu_stem": 0.4, "mmlu_law": 0.6, "boolq": 0.8}
    results = {
        "results": {name: {"acc,none": acc} for name, acc in accuracies.items()},
        "group_subtasks": {"mmlu": ["mmlu_stem", "mmlu_law"]},
    }
    quality = Quality(tasks=summarize(results), groups=groups_of(results))
    assert quality.groups == ["mmlu"] and quality.summary()["mmlu, acc"] == "0.5000"
    assert quality.summary()["mean acc"] == "0.6000"
    assert quality.mean_accuracy == pytest.approx({"acc": 0.6})


def test_filters_are_part_of_a_metrics_name() -> None:
    results = {
        "results": {
            "gsm8k": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "alias": "gsm8k"}
        }
    }
    assert summarize(results) == {
        "gsm8k": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1}
    }


def test_what_cannot_be_loaded_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    data = rows.write(tmp_path / "rows")
    with pytest.raises(InputError, match="no task 'hellaswagg': did you mean hellaswag"):
        Tasks(["hellaswagg"], data)
    with pytest.raises(InputError, match="nowhere: it is no folder"):
        Tasks(["boolq"], tmp_path / "nowhere")
    with pytest.raises(
        InputError, match="rows of task piqa cannot be loaded .*; connect to the hub once"
    ):
        Tasks(["piqa"], data)
    (data / "piqa.jsonl").write_text('{"goal": "no choices"}\n')
    with pytest.raises(InputError, match="its rows are not what lm-eval's task piqa reads"):
        Tasks(["piqa"], data)


def test_tasks_that_would_fail_once_the_model_is_there_are_refused_before(tmp_path: Path) -> None:
    row = {"question": "How many cats?", "answer": "One. #### 1"}
    (tmp_path / "gsm8k_cot_self_consistency.jsonl").write_text(json.dumps(row) + "\n")
    measures = Measures(tasks=("gsm8k_cot_self_consistency",), tasks_data=tmp_path)
    with pytest.raises(
        InputError, match="generates greedily, but task gsm8k_cot_self_consistency samples"
    ):
        measures.load()
    assert dataclasses.replace(measures, backend="torch").loaded_tasks
    row = {"input_prompt": "a", "reference_output": "b", "metadata": "{}"}
    (tmp_path / "longproc_pseudo_to_code_0.5k.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        InputError, match="task longproc_pseudo_to_code_0.5k would run code that a model writes"
    ):
        Tasks(["longproc_pseudo_to_code_0.5k"], tmp_path)


@needs_torch
def test_word_perplexity_is_hflms(checkpoint: Path, tmp_path: Path) -> None:
    pages = [
        {"page": " = A cat = \n\n The cat sat on the mat .\n" * 40},
        {"page": " = A dog = \n\n It ran .\n"},
    ]
    (tmp_path / "wikitext.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    tasks, reader = Tasks(["wikitext"], tmp_path), open_checkpoint(checkpoint)
    ours, theirs = (
        summarize(tasks.run(m))
        for m in (StreamedLM(StreamedModel(reader)), hflm(reader, np.dtype("float32")))
    )
    assert {"word_perplexity", "byte_perplexity", "bits_per_byte"} <= ours["wikitext"].keys()
    for metric, value in theirs["wikitext"].items():
        assert ours["wikitext"][metric] == pytest.approx(value, rel=1e-3)
