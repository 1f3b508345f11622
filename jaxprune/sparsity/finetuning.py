"""Fine-tuning of a pruned PyTorch model without losing its zeros."""

from typing import Any

from jaxprune.sparsity.masks import LEAST_ZEROS


def keep_zeros(model: Any) -> dict[str, Any]:
    """Zeroes the gradients of pruned weights, so training leaves these weights at zero.

    Adam, SGD and weight decay change a zero weight only through its own gradient. Optimizers that
    mix the gradients of several weights, such as Muon and Shampoo, do change it: multiply by the
    masks after each of their steps.

    Args:
        model: a pruned torch.nn.Module, before an optimizer is created or adapters are added.

    Returns:
        Name of each pruned parameter -> its mask, a bool tensor of the parameter's shape, True =
        kept.
    """
    import torch

    masks = {}
    for name, parameter in model.named_parameters():
        mask = parameter.detach() != 0
        if parameter.ndim > 1 and (~mask).float().mean() >= LEAST_ZEROS:
            masks[name] = mask
            parameter.register_hook(
                lambda gradient, mask=mask: torch.where(mask, gradient, torch.zeros_like(gradient))
            )
    return masks
