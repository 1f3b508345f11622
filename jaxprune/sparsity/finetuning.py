"""A pruned PyTorch model, fine-tuned without losing its zeros."""

from typing import Any

from jaxprune.sparsity.masks import LEAST_ZEROS


def keep_zeros(model: Any) -> dict[str, Any]:
    """Makes the gradients of pruned weights zero from now on, so that training leaves them where
    they are: at zero.

    Adam, SGD, and weight decay move a weight that is zero by its gradients alone. Optimizers that
    mix the gradients of several weights, such as Muon and Shampoo, do not keep to that: multiply by
    the masks after their steps.

    Args:
        model: a torch.nn.Module, pruned, before an optimizer is made or adapters are added.

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
