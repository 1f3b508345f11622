"""The names that `jaxprune` exports, each imported when it is first used."""

from .api.evaluate import evaluate as evaluate
from .api.generate import OwnText as OwnText
from .api.generate import generate as generate
from .api.load import load as load
from .api.load import prune_kernel as prune_kernel
from .api.prune import RunOptions as RunOptions
from .api.prune import prune as prune
from .api.verify import verify as verify
from .calibration import calibration_windows as calibration_windows
from .calibration.text_stream import TextStream as TextStream
from .errors import CheckpointError as CheckpointError
from .errors import InputError as InputError
from .evaluation.quality import Evaluator as Evaluator
from .evaluation.quality import Measures as Measures
from .loop import prune_layers as prune_layers
from .methods.admm import ADMM as ADMM
from .methods.alps import ALPS as ALPS
from .methods.combine import Crossed as Crossed
from .methods.combine import Finished as Finished
from .methods.exact import Exact as Exact
from .methods.gradient import Gradient as Gradient
from .methods.gram import gram as gram
from .methods.magnitude import Magnitude as Magnitude
from .methods.sparsegpt import SparseGPT as SparseGPT
from .methods.wanda import Wanda as Wanda
from .phases import prune_model as prune_model
from .recipe import PRESETS as PRESETS
from .recipe import Recipe as Recipe
from .recipe_parts import (
    Importance as Importance,
)
from .recipe_parts import (
    Rule as Rule,
)
from .recipe_parts import (
    Structure as Structure,
)
from .recipe_parts import (
    Tuning as Tuning,
)
from .run_store.context import Context as Context
from .sharding import Devices as Devices
from .sparsity.finetuning import keep_zeros as keep_zeros
from .sparsity.patterns import NM as NM
from .sparsity.patterns import Unstructured as Unstructured
from .streaming.model import StreamedModel as StreamedModel
from .streaming.observer import Observer as Observer
