"""A tuning in torch: a model of transformers under Adafactor, with masks that stay or move."""

import copy
from collections.abc import Collection
from typing import Any

import numpy as np

from jaxprune.pruning.adafactor import DECAY, EPSILON, SHARES_DECAY
from jaxprune.pruning.moving_masks import BEGIN
from jaxprune.pruning.results import LayerResult
from tests.helpers import tiny
from tests.helpers.optional import torch
from tests.helpers.shapes import LINEARS
from tests.helpers.tuning import kernel


class Weight:
    """A weight [out, in] under Adafactor, its second moment by rows and columns of what moves.

    Args:
        parameter: the model's, with the dense value.
        value: the pruned one.
        masks_move: whether it is chosen anew what is kept.
    """

    def __init__(self, parameter: Any, value: Any, masks_move: bool) -> None:
        self.parameter, self.kept = parameter, (value != 0).float()
        self.unit = value[value != 0].square().mean().sqrt()
        self.of_inputs, self.of_outputs = torch.zeros(value.shape[1]), torch.zeros(value.shape[0])
        self.share_of_inputs, self.share_of_outputs = torch.zeros(value.shape[1]), torch.zeros(value.shape[0])
        self.value = torch.where(value != 0, value, BEGIN * parameter.detach()) if masks_move else value
        self.moves = torch.ones_like(value) if masks_move else self.kept
        self.parameter.data = self.value * self.kept

    def step(self, number: int, rate: float) -> None:
        gradient = self.parameter.grad * self.moves
        square, count = gradient.square() + EPSILON, self.moves.sum()
        by_inputs, by_outputs = (square.sum(axis) / self.moves.sum(axis).clamp(min=1) for axis in (0, 1))
        self.of_inputs = DECAY * self.of_inputs + (1 - DECAY) * by_inputs
        self.of_outputs = DECAY * self.of_outputs + (1 - DECAY) * by_outputs
        self.share_of_inputs = SHARES_DECAY * self.share_of_inputs + (1 - SHARES_DECAY) * by_inputs / square.mean()
        self.share_of_outputs = SHARES_DECAY * self.share_of_outputs + (1 - SHARES_DECAY) * by_outputs / square.mean()
        warm, means = 1 - DECAY**number, []
        for inputs, outputs in ((self.of_inputs, self.of_outputs), (by_inputs, by_outputs)):
            means.append(outputs[:, None] * inputs[None, :] / ((inputs * self.moves.sum(0)).sum() / count))
        second = means[0] / warm
        # Counts of rows and columns, as if what moves were spread evenly.
        size = (means[1] / second * self.moves.sum(1)[:, None] * self.moves.sum(0)[None, :] / count).sum() / count
        self.value = self.value - rate * self.unit * gradient / second.sqrt() / size.sqrt().clamp(min=1)
        self.parameter.data = self.value * self.kept

    def choose(self) -> None:
        """Keeps as many of the weights as before."""
        saliency = self.value.square() * self.share_of_outputs[:, None] * self.share_of_inputs[None, :]
        least = torch.sort(saliency.flatten()).values[int((self.kept == 0).sum())]
        self.kept = (saliency >= least).float()
        self.parameter.data = self.value * self.kept

    def settle(self) -> None:
        """Lets only what is kept move on."""
        self.value, self.moves = self.value * self.kept, self.kept


def tuned_by_torch(
    layers: list[LayerResult],
    tokens: np.ndarray,
    order: np.ndarray,
    rates: list[float],
    choices: Collection[int] = (),
) -> list[dict[str, np.ndarray]]:
    """Returns each layer's kernels [in, out] by name.

    Args:
        layers: the pruned ones.
        tokens: all windows.
        order: those of each step.
        rates: of each step.
        choices: the numbers of the steps, from 1, after which masks are chosen.
    """
    dense = tiny.model(tiny.config())
    model = copy.deepcopy(dense)
    weights = {}
    for layer in layers:
        for name in LINEARS:
            parameter = model.model.layers[layer.index].get_submodule(name).weight
            value = torch.tensor(kernel(layer, name).T.copy())
            weights[layer.index, name] = Weight(parameter, value, bool(choices))
    for number, (rows, rate) in enumerate(zip(order, rates, strict=True), 1):
        ids = torch.tensor(tokens[rows], dtype=torch.long)
        with torch.no_grad():
            target = torch.log_softmax(dense(ids).logits, -1)
        found = torch.log_softmax(model(ids).logits, -1)
        model.zero_grad()
        torch.sum(target.exp() * (target - found)).backward()
        for weight in weights.values():
            weight.step(number, rate)
            if number in choices:
                weight.choose()
            if number == max(choices, default=0):
                weight.settle()
    return [{n: weights[layer.index, n].parameter.detach().numpy().T for n in LINEARS} for layer in layers]
