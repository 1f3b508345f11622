"""A tuning in torch: a model of transformers under Adafactor, all zeros made before or some meanwhile."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxprune.pruning.adafactor import DECAY, EPSILON, SHARES_DECAY
from jaxprune.pruning.results import LayerResult
from tests.helpers import tiny
from tests.helpers.optional import torch
from tests.helpers.shapes import LINEARS
from tests.helpers.tuning import kernel


class Weight:
    """A weight [out, in] under Adafactor, its second moment by rows and columns of what is kept.

    Args:
        parameter: the model's.
        value: the pruned one.
    """

    def __init__(self, parameter: Any, value: Any) -> None:
        self.parameter, self.kept = parameter, (value != 0).float()
        self.unit = value[value != 0].square().mean().sqrt()
        self.of_inputs, self.of_outputs = torch.zeros(value.shape[1]), torch.zeros(value.shape[0])
        self.share_of_inputs, self.share_of_outputs = torch.zeros(value.shape[1]), torch.zeros(value.shape[0])
        self.parameter.data = value

    def step(self, number: int, rate: float) -> None:
        gradient = self.parameter.grad * self.kept
        square, count = gradient.square() + EPSILON, self.kept.sum()
        by_inputs, by_outputs = (square.sum(axis) / self.kept.sum(axis).clamp(min=1) for axis in (0, 1))
        self.of_inputs = DECAY * self.of_inputs + (1 - DECAY) * by_inputs
        self.of_outputs = DECAY * self.of_outputs + (1 - DECAY) * by_outputs
        mean = (by_inputs * self.kept.sum(0)).sum() / count
        self.share_of_inputs = SHARES_DECAY * self.share_of_inputs + (1 - SHARES_DECAY) * by_inputs / mean
        self.share_of_outputs = SHARES_DECAY * self.share_of_outputs + (1 - SHARES_DECAY) * by_outputs / mean
        warm, means = 1 - DECAY**number, []
        for inputs, outputs in ((self.of_inputs, self.of_outputs), (by_inputs, by_outputs)):
            means.append(outputs[:, None] * inputs[None, :] / ((inputs * self.kept.sum(0)).sum() / count))
        second = means[0] / warm
        # Counts of rows and columns, as if what is kept were spread evenly.
        size = (means[1] / second * self.kept.sum(1)[:, None] * self.kept.sum(0)[None, :] / count).sum() / count
        self.parameter.data -= rate * self.unit * gradient / second.sqrt() / size.sqrt().clamp(min=1)

    def prune(self, sparsity: float) -> None:
        """Makes so many of the weights zero, those that matter least."""
        saliency = self.parameter.data.square() * self.share_of_outputs[:, None] * self.share_of_inputs[None, :]
        least = torch.sort(saliency.flatten()).values[round(sparsity * saliency.numel())]
        self.kept = (saliency >= least).float()
        self.parameter.data *= self.kept


def tuned_by_torch(
    layers: list[LayerResult],
    tokens: np.ndarray,
    order: np.ndarray,
    rates: list[float],
    prunings: Mapping[int, float] = MappingProxyType({}),
) -> list[dict[str, np.ndarray]]:
    """Returns each layer's kernels [in, out] by name.

    Args:
        layers: the pruned ones.
        tokens: all windows.
        order: those of each step.
        rates: of each step.
        prunings: the numbers of the steps, from 1, after which zeros come, with the sparsity from then on.
    """
    dense = tiny.model(tiny.config())
    model = copy.deepcopy(dense)
    weights = {}
    for layer in layers:
        for name in LINEARS:
            parameter = model.model.layers[layer.index].get_submodule(name).weight
            value = torch.tensor(kernel(layer, name).T.copy())
            weights[layer.index, name] = Weight(parameter, value)
    for number, (rows, rate) in enumerate(zip(order, rates, strict=True), 1):
        ids = torch.tensor(tokens[rows], dtype=torch.long)
        with torch.no_grad():
            target = torch.log_softmax(dense(ids).logits, -1)
        found = torch.log_softmax(model(ids).logits, -1)
        model.zero_grad()
        torch.sum(target.exp() * (target - found)).backward()
        for weight in weights.values():
            weight.step(number, rate)
            if number in prunings:
                weight.prune(prunings[number])
    return [{n: weights[layer.index, n].parameter.detach().numpy().T for n in LINEARS} for layer in layers]
