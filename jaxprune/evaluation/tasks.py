"""lm-eval's tasks: stock prompts and metrics, on the hub's rows or on local ones."""

import difflib
import functools
import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxprune.errors import InputError

ZERO_SHOT = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The paper's tasks, in its order."""
FEWSHOT_SEED = 1234
"""lm-eval's default."""
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Tasks:
    """Tasks that are known to load.

    Args:
        names: of lm-eval's tasks or groups.
        data: a folder with rows of some of them, one NAME.jsonl or NAME.parquet a task; the others come from the hub or
            its cache.
        limit: rows of each task; None: all.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, or its rows cannot be loaded.
    """

    def __init__(self, names: Sequence[str], data: Path | None = None, limit: int | None = None) -> None:
        manager = _task_manager()
        if unknown := [name for name in names if name not in manager.task_index]:
            near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise InputError(f"lm-eval has no task {unknown[0]!r}: {hint}")
        if data is not None and not data.is_dir():
            raise InputError(f"{data} is no folder: --tasks-data wants one with a .jsonl or .parquet file a task")
        self.limit = limit
        self._manager = manager
        folder = Path(tempfile.mkdtemp(prefix="jaxprune-tasks-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._specs = [_local(name, data, manager, folder) or name for name in names]
        for name, spec in zip(names, self._specs, strict=True):
            try:
                manager.load([spec])
            except Exception as error:  # datasets, the hub and lm-eval raise errors of many kinds
                reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
                advice = "connect to the hub once, or pass --tasks-data DIR with its rows"
                if spec != name:
                    advice = f"its file in {data} must have the rows that lm-eval's own task has"
                raise InputError(f"the rows of task {name} cannot be loaded ({reason}): {advice}") from error

    def run(self, model: Any) -> dict[str, Any]:
        """lm-eval's results of a model, samples included.

        Args:
            model: one of lm-eval's models.
        """
        from lm_eval.evaluator import evaluate

        # Bootstrapped errors would be computed by forked processes, which JAX's threads do not survive.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        loaded = self._manager.load(self._specs)
        for task in loaded["tasks"].values():
            # As lm-eval's command line does.
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return evaluate(lm=model, task_dict=loaded, limit=self.limit, bootstrap_iters=1000)


def summarize(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Task or group -> metric -> value, with `<metric>_stderr` beside it, from lm-eval's results."""
    summary: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        metrics = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
        # lm-eval writes metric,filter; none is the usual filter.
        summary[task] = {key.removesuffix(",none"): float(value) for key, value in metrics.items()}
    return summary


def mean_accuracy(summary: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The plain mean of `acc` over the tasks that have it, as in the paper's table 4, and its standard error.

    Returns:
        `acc`, and `acc_stderr` where all tasks have one; empty without any accuracy.
    """
    tasks = [values for values in summary.values() if "acc" in values]
    if not tasks:
        return {}
    mean = {"acc": sum(values["acc"] for values in tasks) / len(tasks)}
    if all("acc_stderr" in values for values in tasks):
        mean["acc_stderr"] = math.sqrt(sum(values["acc_stderr"] ** 2 for values in tasks)) / len(tasks)
    return mean


def with_error(value: float, error: float | None) -> str:
    """A value and its standard error, where there is one."""
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def without_samples(results: Mapping[str, Any]) -> str:
    """lm-eval's results as its own JSON files have them."""
    from lm_eval.utils import handle_non_serializable

    kept = {key: value for key, value in results.items() if key != "samples"}
    return json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"


def not_installed(error: ImportError) -> InputError:
    """What to tell a user who lacks lm-eval."""
    return InputError(f"zero-shot tasks need lm-eval ({error}): pip install 'jaxprune[eval]'")


@functools.cache
def _task_manager() -> Any:
    """lm-eval's index of its tasks, which takes seconds to make."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise not_installed(error) from error
    return TaskManager()


def _local(name: str, data: Path | None, manager: Any, folder: Path) -> str | None:
    """A copy of the stock task that reads local rows; None where there are none."""
    files = [] if data is None else [data / f"{name}{suffix}" for suffix in FORMATS]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    entry = manager.task_index[name]
    splits = [key for key in entry.cfg or {} if key.endswith("_split")]
    scored = "test_split" if "test_split" in splits else "validation_split"
    config = {
        "include": str(entry.yaml_path),
        "task": name,
        "tag": None,
        "dataset_path": FORMATS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"rows": str(file.absolute())}},
        **dict.fromkeys(splits),
        scored: "rows",
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)
