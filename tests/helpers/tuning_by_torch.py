"""A tuning in torch: a model of transformers under Adafactor, all zeros made before or some
meanwhile."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxprune.distill.adafactor import DECAY, EPSILON, SHARES_DECAY
from jaxprune.solve.layer_result import LayerResult
from tests.helpers import tiny
from tests.helpers.optional import torch
from tests.helpers.shapes import LINEARS
from tests.helpers.tuning import kernel


class Weight:
    """A weight [out, in] under Adafactor, its second moment by rows and columns of what moves.

    Args:
        parameter: the model's.
        value: the pruned one.
    """

    def __init__(self, parameter: Any, value: Any) -> None:
        self.parameter, self.value, self.moves = parameter, value, (value != 0).float()
        self.unit = value[value != 0].square().mean().sqrt()
        self.of_inputs, self.of_outputs = torch.zeros(value.shape[1]), torch.zeros(value.shape[0])
        self.share_of_inputs, self.share_of_outputs = (
            torch.zeros(value.shape[1]),
            torch.zeros(value.shape[0]),
        )
        self.keep(self.moves)

    def keep(self, kept: Any) -> None:
        """Gives the model what is kept."""
        self.parameter.data = self.value * kept

    def step(self, number: int, rate: float) -> None:
        gradient = self.parameter.grad * self.moves
        square, count = gradient.square() + EPSILON, self.moves.sum()
        by_inputs, by_outputs = (
            square.sum(axis) / self.moves.sum(axis).clamp(min=1) for axis in (0, 1)
        )
        self.of_inputs = DECAY * self.of_inputs + (1 - DECAY) * by_inputs
        self.of_outputs = DECAY * self.of_outputs + (1 - DECAY) * by_outputs
        mean = (by_inputs * self.moves.sum(0)).sum() / count
        self.share_of_inputs = (
            SHARES_DECAY * self.share_of_inputs + (1 - SHARES_DECAY) * by_inputs / mean
        )
        self.share_of_outputs = (
            SHARES_DECAY * self.share_of_outputs + (1 - SHARES_DECAY) * by_outputs / mean
        )
        warm, means = 1 - DECAY**number, []
        for inputs, outputs in ((self.of_inputs, self.of_outputs), (by_inputs, by_outputs)):
            means.append(
                outputs[:, None] * inputs[None, :] / ((inputs * self.moves.sum(0)).sum() / count)
            )
        second = means[0] / warm
        # Counts of rows and columns, as if what is kept were spread evenly.
        size = (
            means[1] / second * self.moves.sum(1)[:, None] * self.moves.sum(0)[None, :] / count
        ).sum() / count
        self.value = self.value - rate * self.unit * gradient / second.sqrt() / size.sqrt().clamp(
            min=1
        )
        self.keep((self.parameter.data != 0).float())

    def prune(self, sparsity: float, last: bool) -> None:
        """Keeps all but so many of the weights, those that matter least; the last time these become
        zero."""
        saliency = (
            self.value.square() * self.share_of_outputs[:, None] * self.share_of_inputs[None, :]
        )
        least = torch.sort(saliency.flatten()).values[round(sparsity * saliency.numel())]
        kept = (saliency >= least).float()
        if last:
            self.value, self.moves = self.value * kept, kept
        self.keep(kept)


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
        prunings: the numbers of the steps, from 1, after which zeros come, with the sparsity from
            then on.
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
                weight.prune(prunings[number], number == max(prunings))
    return [
        {n: weights[layer.index, n].parameter.detach().numpy().T for n in LINEARS}
        for layer in layers
    ]
