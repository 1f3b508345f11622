"""A checkpoint as lm-eval's model, in PyTorch: the whole model in memory, by transformers."""

from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM

from convert import Reader, hf
from convert.assets import load_tokenizer
from convert.pytorch import to_torch

CPU_BATCH = 16


def hflm(reader: Reader, dtype: np.dtype) -> Any:
    """lm-eval's HFLM.

    A Hugging Face folder is loaded by transformers itself; the params of other formats are converted in memory.

    Args:
        reader: the checkpoint.
        dtype: of the computation.

    Raises:
        CheckpointError: the checkpoint cannot be converted.
    """
    import torch

    options: dict[str, Any] = {"batch_size": "auto" if torch.cuda.is_available() else CPU_BATCH}
    if isinstance(reader, hf.Reader):
        return HFLM(pretrained=str(reader.assets), dtype=dtype.name, **options)
    model = to_torch(reader.read(reader.spec), reader.assets, dtype.name)
    return HFLM(pretrained=model, tokenizer=load_tokenizer(reader.assets), **options)
