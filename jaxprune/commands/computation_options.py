"""The options that say how a model is computed."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import numpy as np

from convert.files import existing_parent, expand
from jaxprune.errors import Change, InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputationOptions:
    """Options of every command that runs a model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the computation; auto is float32 on a CPU, the checkpoint's dtype elsewhere. It
    does not change the dtype of the stored result."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """The kind of device; auto uses the best available one, gpu means CUDA."""

    @property
    def computation_dtype(self) -> np.dtype | None:
        """The dtype of the computation; None: as `StreamedModel` chooses."""
        return None if self.dtype == "auto" else np.dtype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingOptions(ComputationOptions):
    """Options of every command that moves hidden states through a model.

    Raises:
        InputError: a folder for hidden states that are in memory.
    """

    hidden: Literal["memory", "disk"] = "memory"
    """Where to keep hidden states between layers: in host memory, or in files in --scratch."""
    scratch: str | None = None
    """The folder for --hidden disk (default: the folder of --out). The run removes its files."""

    def __post_init__(self) -> None:
        if self.scratch and self.hidden != "disk":
            raise InputError("--scratch is for --hidden disk: pass both, or neither")

    def scratch_folder(self, out: str) -> Path | None:
        """Returns where hidden states are kept; None: in memory.

        Args:
            out: the run's own folder.

        Raises:
            InputError: nothing can be written there.
        """
        if self.hidden == "memory":
            return None
        folder = expand(self.scratch) if self.scratch else existing_parent(expand(out))
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
            raise InputError(
                "it is not a folder that can be written into",
                file=folder,
                options={"scratch": Change.OTHER},
            )
        return folder
