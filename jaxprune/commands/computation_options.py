"""How a model is computed, as the user says it."""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputationOptions:
    """Options of every command that runs a model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the model's computation; auto is float32 on a CPU and the checkpoint's dtype elsewhere. It
    does not change how a pruned model is stored."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """The kind of device to run on; auto takes the best there is, gpu is CUDA's."""

    @property
    def computation_dtype(self) -> np.dtype | None:
        """The dtype of the computation; None: as `StreamedModel` chooses."""
        return None if self.dtype == "auto" else np.dtype(self.dtype)
