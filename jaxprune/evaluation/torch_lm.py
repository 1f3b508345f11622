"""A checkpoint as lm-eval's model, in PyTorch: the whole model in memory, by transformers."""

from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from convert import Reader
from convert.assets import load_tokenizer
from convert.pytorch import to_torch
from jaxprune.errors import InputError

CPU_BATCH = 16


def hflm(reader: Reader, dtype: np.dtype, device: str = "auto") -> Any:
    """Makes lm-eval's HFLM of a checkpoint; its params are converted in memory, and looked at for
    NaN on the way.

    Args:
        reader: the checkpoint.
        dtype: the dtype of the computation.
        device: auto (CUDA's if torch has one), cpu or gpu.

    Raises:
        InputError: torch has no such device.
        CheckpointError: the checkpoint cannot be converted.
    """
    found = "gpu" if torch.cuda.is_available() else "cpu"
    if device not in ("auto", "cpu", found):
        raise InputError(
            f"PyTorch finds no {device} here", options={"device": "cpu", "backend": "jax"}
        )
    chosen = found if device == "auto" else device
    options: dict[str, Any] = {"device": {"gpu": "cuda"}.get(chosen, chosen)}
    options["batch_size"] = CPU_BATCH if chosen == "cpu" else "auto"
    model = to_torch(reader.read(reader.spec), reader.assets, dtype.name).to(options["device"])
    return HFLM(pretrained=model, tokenizer=load_tokenizer(reader.assets), **options)
