"""Flax params -> a PyTorch module of transformers, in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.assets import load_config
from convert.errors import CheckpointError
from convert.names import BESIDE, naming_in
from convert.stored import tensors_of, to_tensor


def to_torch(params: Mapping[str, np.ndarray], assets: Path, dtype: str) -> Any:
    """Returns the transformers model that a checkpoint's configuration names, with these params.

    Args:
        params: all params of the checkpoint; paths as in the checkpoint.
        assets: the folder of its config.json.
        dtype: the dtype that the module is to have, such as bfloat16.

    Raises:
        CheckpointError: torch is not installed, or the params are not those that the model needs.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"PyTorch models need torch ({error}): pip install 'jaxprune[torch]'"
        ) from error
    import transformers

    config, state = load_config(assets), {}
    naming = naming_in({"model_type": config.model_type}, params)
    # enough to evaluate
    text = {path: array for path, array in params.items() if not path.startswith(f"{BESIDE}.")}
    for name, paths in tensors_of(text, naming).items():
        array = np.ascontiguousarray(to_tensor(paths, text, naming))
        if array.dtype.name == "bfloat16":
            state[name] = torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
        else:
            state[name] = torch.from_numpy(array.copy())
    # the class follows from the type, never from a free text
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:
        raise CheckpointError(
            "transformers has no language model of this type", file=assets, found=config.model_type
        )
    architecture = known[type(config)]
    model, info = architecture.from_pretrained(
        None, config=config, state_dict=state, dtype=getattr(torch, dtype), output_loading_info=True
    )
    if problems := {name: sorted(keys)[:5] for name, keys in info.items() if keys}:
        raise CheckpointError(
            f"the params are not those that {architecture.__name__} needs: {problems}"
        )
    return model.eval()
