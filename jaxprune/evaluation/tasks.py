"""lm-eval's tasks: stock prompts and metrics, on the hub's rows or on local ones."""

import difflib
import functools
import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from convert.cache import hub_cache, require_cache, warn_without_cache
from convert.errors import CheckpointError
from convert.files import expand
from jaxprune.errors import InputError
from jaxprune.evaluation.task_rows import SCHEMAS, require_rows

ZERO_SHOT = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
}
"""The paper's tasks, in its order, and where lm-eval has each: to find any other it reads 27
thousand files."""
FEWSHOT_SEED = 1234
"""lm-eval's default."""
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Tasks:
    """Tasks that are known to load.

    Args:
        names: the names of lm-eval's tasks or groups.
        data: a folder with rows of some of them, one NAME.jsonl or NAME.parquet a task; the others
            come from the hub or its cache.
        limit: rows of each task; None: all.
        greedy: whether the model that they are for only generates greedily.

    Raises:
        InputError: lm-eval is not installed, a task is unknown or cannot be run, or its rows cannot
            be loaded.
        CheckpointError: there is no cache for rows of the hub.
    """

    def __init__(
        self,
        names: Sequence[str],
        data: str | Path | None = None,
        limit: int | None = None,
        *,
        greedy: bool = False,
    ) -> None:
        manager = task_manager(ZERO_SHOT.keys() >= set(names))
        if unknown := [name for name in names if name not in manager.task_index]:
            near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise InputError(f"lm-eval has no task {unknown[0]!r}: {hint}")
        data = None if data is None else expand(data)
        if data is not None and not os.path.isdir(data):
            raise InputError("it is no folder with a .jsonl or .parquet file a task", file=data)
        self.limit = limit
        self._manager = manager
        folder = Path(tempfile.mkdtemp(prefix="jaxprune-tasks-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        _require_dataset_cache(folder)
        self._specs: list[str] = []
        for name in names:
            file = data and _rows_of(name, data)
            if not file:
                hub_cache(f"the rows of task {name}")
            self._specs.append(_local(name, file, manager, folder) if file else name)
            for one, task in _loaded(name, self._specs[-1], manager, file).items():
                _require_runs(one, task, greedy)

    def run(self, model: Any) -> dict[str, Any]:
        """Returns lm-eval's results of a model, samples included.

        Args:
            model: one of lm-eval's models.
        """
        from lm_eval.evaluator import evaluate

        # Bootstrapped errors would be computed by forked processes, which JAX's threads do not
        # survive.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        loaded = self._manager.load(self._specs)
        for task in loaded["tasks"].values():
            # As lm-eval's command line does.
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return evaluate(lm=model, task_dict=loaded, limit=self.limit, bootstrap_iters=1000)


def summarize(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Returns task or group -> metric -> value, with `<metric>_stderr` beside it, from lm-eval's
    results."""
    return {
        task: {  # lm-eval writes metric,filter; none is the usual filter
            key.removesuffix(",none"): float(value)
            for key, value in values.items()
            if "," in key and isinstance(value, int | float)
        }
        for task, values in results["results"].items()
    }


def groups_of(results: Mapping[str, Any]) -> list[str]:
    """Returns the names in lm-eval's results that are groups: what they have comes from their
    tasks."""
    return [name for name in results["results"] if name in results.get("group_subtasks", {})]


def mean_accuracy(
    summary: Mapping[str, Mapping[str, float | None]], groups: Collection[str] = ()
) -> dict[str, float]:
    """Returns the plain mean of `acc` over the tasks that have it, as in the paper's table 4, and
    its standard error.

    Args:
        summary: of tasks and groups, as `summarize` returns it.
        groups: the names in it that are groups, whose tasks count instead.

    Returns:
        `acc`, and `acc_stderr` where all tasks have one; empty without any accuracy.
    """
    tasks = [values for name, values in summary.items() if name not in groups]
    tasks = [values for values in tasks if values.get("acc") is not None]
    if not tasks:
        return {}
    mean = {"acc": sum(values["acc"] or 0.0 for values in tasks) / len(tasks)}
    errors = [error for values in tasks if (error := values.get("acc_stderr")) is not None]
    if len(errors) == len(tasks):
        mean["acc_stderr"] = math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return mean


def samples(options: Mapping[str, Any]) -> bool:
    """Returns whether the options of a generation, as `normalize_gen_kwargs` of lm-eval returns
    them, want sampling."""
    return options["do_sample"] and options.get("temperature", 1.0) > 0


def with_error(value: float | None, error: float | None) -> str:
    """Returns a value and its standard error, where there is one."""
    value = math.nan if value is None else value
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def without_samples(results: Mapping[str, Any]) -> str:
    """Returns lm-eval's results as its own JSON files have them."""
    from lm_eval.utils import handle_non_serializable

    kept = {key: value for key, value in results.items() if key != "samples"}
    return json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"


def not_installed(error: ImportError) -> InputError:
    """Returns what to tell a user who lacks lm-eval."""
    return InputError(f"zero-shot tasks need lm-eval ({error}): pip install 'jaxprune[eval]'")


@functools.cache
def task_manager(papers_only: bool) -> Any:
    """Returns lm-eval's index of the paper's tasks, or of all, which takes seconds to make."""
    try:
        from lm_eval import tasks
    except ImportError as error:
        raise not_installed(error) from error
    if papers_only:
        folders = [
            Path(tasks.__file__).parent / folder for folder in dict.fromkeys(ZERO_SHOT.values())
        ]
        index = tasks.TaskManager(include_path=folders, include_defaults=False)
        if index.task_index.keys() >= ZERO_SHOT.keys():  # another version may have them elsewhere
            return index
    return tasks.TaskManager()


def _rows_of(name: str, data: Path) -> Path | None:
    """Returns the file of a task's rows in a folder, once its rows are known to be the task's; None
    where there is none."""
    files = (data / f"{name}{suffix}" for suffix in FORMATS)
    file = next((file for file in files if os.path.lexists(file)), None)
    if file:
        require_rows(name, file)
    return file


def _local(name: str, file: Path, manager: Any, folder: Path) -> str:
    """Returns a copy of the stock task that reads local rows."""
    # datasets takes some characters for patterns
    copied = folder / f"{len(list(folder.iterdir()))}{file.suffix}"
    shutil.copyfile(file, copied)
    entry = manager.task_index[name]
    splits = [key for key in entry.cfg or {} if key.endswith("_split")]
    scored = "test_split" if "test_split" in splits else "validation_split"
    config = {
        "include": str(entry.yaml_path),
        "task": name,
        "tag": None,
        "dataset_path": FORMATS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"rows": str(copied)}, "cache_dir": str(folder / "cache")},
        **dict.fromkeys(splits),
        scored: "rows",
    }
    path = copied.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return str(path)


def _loaded(name: str, spec: str, manager: Any, file: Path | None) -> Mapping[str, Any]:
    """Returns lm-eval's tasks of a name, by name.

    Raises:
        InputError: they cannot be loaded, or their rows do not say which choice is right.
    """
    try:
        loaded = manager.load([spec])
        faults = (
            []
            if file is None or name in SCHEMAS
            else [_fault(task) for task in loaded["tasks"].values()]
        )
    # datasets, the hub, lm-eval and a task's own templates raise errors of many kinds
    except Exception as error:
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        if file:
            raise InputError(
                f"its rows are not what lm-eval's task {name} reads ({reason})", file=file
            ) from error
        raise InputError(
            f"the rows of task {name} cannot be loaded ({reason}); connect to the hub once, or "
            "give them in a folder",
            options={"tasks_data": "DIR"},
        ) from error
    for fault in filter(None, faults):
        raise InputError(f"lm-eval's task {name} finds no right choice", file=file, entry=fault)
    return loaded["tasks"]


def _require_runs(name: str, task: Any, greedy: bool) -> None:
    """Raises InputError for a task that would fail only once the model is there."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"task {name} would run code that a model writes, which is not done here")
    if greedy and samples(normalize_gen_kwargs(task.config.generation_kwargs or {})):
        raise InputError(
            f"the JAX backend generates greedily, but task {name} samples",
            options={"backend": "torch"},
        )


def _fault(task: Any) -> str | None:
    """Returns the first row of a multiple-choice task that names none of its choices, which lm-eval
    would count as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return None
    for number, row in enumerate(task.eval_docs, 1):
        choices, target = task.doc_to_choice(row), task.doc_to_target(row)
        right = target if isinstance(target, list) else [target]
        if not right or not all(
            one in choices or (isinstance(one, int) and 0 <= one < len(choices)) for one in right
        ):
            return f"row {number}"
    return None


def _require_dataset_cache(folder: Path) -> None:
    """Has datasets keep what it makes in a folder of this process, where its own cache cannot be
    written."""
    from datasets import config

    try:
        require_cache(config.HF_DATASETS_CACHE)
    except CheckpointError as error:
        warn_without_cache(str(error))
        config.HF_DATASETS_CACHE = folder / "cache"
