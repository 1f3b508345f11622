"""ADMM pruning in PyTorch the way well-known pruning scripts are written, to compare jaxprune with.

Windows pass one at a time; every linear has a hook that adds up its own Gram matrix and an inverse
of its own; each iteration that selects a mask calls topk on the flattened matrix; a second pass
over the windows feeds the next layer.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ITERATIONS, SELECTIONS, DAMPING, RHO = 20, 15, 0.1, 1.0


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Adds the time since the last lap."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._start
        self._start = now


@torch.no_grad()
def prune_layers(
    layers: Sequence[nn.Module], states: list[Tensor], rotary: nn.Module, sparsity: float
) -> Clock:
    """Prunes decoder layers of transformers in place.

    Args:
        layers: in order.
        states: hidden states [1, t, d] of each window; replaced by those after the layers.
        rotary: the model's rotary embedding.
        sparsity: of every linear.
    """
    positions = torch.arange(states[0].shape[1], device=states[0].device)[None]
    angles = rotary(states[0], positions)
    clock = Clock()
    for layer in layers:
        linears = {
            name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)
        }
        grams = {name: _Gram(module) for name, module in linears.items()}
        hooks = [module.register_forward_hook(grams[name].add) for name, module in linears.items()]
        for x in states:
            _call(layer, x, angles)
        for hook in hooks:
            hook.remove()
        clock.lap("gram")
        for name, module in linears.items():
            pruned = admm(grams[name].total, module.weight.T.float(), sparsity)
            module.weight.copy_(pruned.T.to(module.weight.dtype))
        clock.lap("solve")
        for index, x in enumerate(states):
            states[index] = _call(layer, x, angles)
        clock.lap("forward")
    return clock


def admm(gram: Tensor, weight: Tensor, sparsity: float) -> Tensor:
    """The pruned kernel [n, m], the final sparsity being selected at every selection."""
    norm = gram.diagonal().sqrt() + 1e-8
    gram = gram / (norm[:, None] * norm[None, :])
    weight = weight * norm[:, None]
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    target = gram @ weight
    inverse = torch.linalg.inv(
        gram + RHO * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    u = torch.zeros_like(weight)
    zeros = round(sparsity * weight.numel())
    for iteration in range(ITERATIONS):
        if iteration < SELECTIONS:
            mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
            mask[torch.topk((weight + u).abs().flatten(), zeros, largest=False).indices] = False
            mask = mask.view_as(weight)
        z = (weight + u) * mask
        u = u + weight - z
        weight = inverse @ (target + RHO * (z - u))
    return (weight + u) * mask / norm[:, None]


class _Gram:
    """A linear's XᵀX."""

    def __init__(self, linear: nn.Linear) -> None:
        n = linear.in_features
        self.total = torch.zeros(n, n, device=linear.weight.device)

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).T.float()
        self.total += x.matmul(x.T)


def _call(layer: nn.Module, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    out = layer(x, position_embeddings=angles)
    return out[0] if isinstance(out, tuple) else out
