"""Post-training pruning of language models in JAX. What is heavy is imported when it is first
used."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if (_spec := importlib.util.find_spec("convert")) and not _spec.submodule_search_locations:
    raise ImportError(
        f"{_spec.origin} hides jaxprune's package of the name convert: rename it, or work elsewhere"
    )

_EXPORTS = {
    "ADMM": "jaxprune.methods.admm",
    "ALPS": "jaxprune.methods.alps",
    "Exact": "jaxprune.methods.exact",
    "Gradient": "jaxprune.methods.gradient",
    "Magnitude": "jaxprune.methods.magnitude",
    "SparseGPT": "jaxprune.methods.sparsegpt",
    "Wanda": "jaxprune.methods.wanda",
    "Crossed": "jaxprune.methods.combine",
    "Finished": "jaxprune.methods.combine",
    "gram": "jaxprune.methods.gram",
    "NM": "jaxprune.sparsity.patterns",
    "keep_zeros": "jaxprune.sparsity.finetuning",
    "Unstructured": "jaxprune.sparsity.patterns",
    "PRESETS": "jaxprune.recipe",
    "Experts": "jaxprune.recipe_parts",
    "Importance": "jaxprune.recipe_parts",
    "Recipe": "jaxprune.recipe",
    "Rule": "jaxprune.recipe_parts",
    "Tuning": "jaxprune.recipe_parts",
    "Devices": "jaxprune.sharding",
    "StreamedModel": "jaxprune.streaming.model",
    "Observer": "jaxprune.streaming.observer",
    "Evaluator": "jaxprune.evaluation.quality",
    "Measures": "jaxprune.evaluation.quality",
    "prune_layers": "jaxprune.loop",
    "prune_model": "jaxprune.phases",
    "calibration_windows": "jaxprune.calibration",
    "TextStream": "jaxprune.calibration.stream",
    "load": "jaxprune.api.load",
    "prune_kernel": "jaxprune.api.load",
    "generate": "jaxprune.api.generate",
    "OwnText": "jaxprune.api.generate",
    "prune": "jaxprune.api.prune",
    "RunOptions": "jaxprune.api.prune",
    "Context": "jaxprune.run_store.context",
    "evaluate": "jaxprune.api.evaluate",
    "verify": "jaxprune.api.verify",
    "CheckpointError": "jaxprune.errors",
    "InputError": "jaxprune.errors",
}
"""Name -> the module that it comes from."""
__all__ = sorted(_EXPORTS)  # noqa: PLE0605

if TYPE_CHECKING:
    from jaxprune.api.evaluate import evaluate as evaluate
    from jaxprune.api.generate import OwnText as OwnText
    from jaxprune.api.generate import generate as generate
    from jaxprune.api.load import load as load
    from jaxprune.api.load import prune_kernel as prune_kernel
    from jaxprune.api.prune import RunOptions as RunOptions
    from jaxprune.api.prune import prune as prune
    from jaxprune.api.verify import verify as verify
    from jaxprune.calibration import calibration_windows as calibration_windows
    from jaxprune.calibration.stream import TextStream as TextStream
    from jaxprune.errors import CheckpointError as CheckpointError
    from jaxprune.errors import InputError as InputError
    from jaxprune.evaluation.quality import Evaluator as Evaluator
    from jaxprune.evaluation.quality import Measures as Measures
    from jaxprune.loop import prune_layers as prune_layers
    from jaxprune.methods.admm import ADMM as ADMM
    from jaxprune.methods.alps import ALPS as ALPS
    from jaxprune.methods.combine import Crossed as Crossed
    from jaxprune.methods.combine import Finished as Finished
    from jaxprune.methods.exact import Exact as Exact
    from jaxprune.methods.gradient import Gradient as Gradient
    from jaxprune.methods.gram import gram as gram
    from jaxprune.methods.magnitude import Magnitude as Magnitude
    from jaxprune.methods.sparsegpt import SparseGPT as SparseGPT
    from jaxprune.methods.wanda import Wanda as Wanda
    from jaxprune.phases import prune_model as prune_model
    from jaxprune.recipe import PRESETS as PRESETS
    from jaxprune.recipe import Recipe as Recipe
    from jaxprune.recipe_parts import Experts as Experts
    from jaxprune.recipe_parts import Importance as Importance
    from jaxprune.recipe_parts import Rule as Rule
    from jaxprune.recipe_parts import Tuning as Tuning
    from jaxprune.run_store.context import Context as Context
    from jaxprune.sharding import Devices as Devices
    from jaxprune.sparsity.finetuning import keep_zeros as keep_zeros
    from jaxprune.sparsity.patterns import NM as NM
    from jaxprune.sparsity.patterns import Unstructured as Unstructured
    from jaxprune.streaming.model import StreamedModel as StreamedModel
    from jaxprune.streaming.observer import Observer as Observer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'jaxprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
