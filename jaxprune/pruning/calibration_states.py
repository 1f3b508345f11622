"""The hidden states of the calibration windows on their way through the layers, and through those
pruned already."""

import numpy as np
from jaxtyping import Int

from jaxprune import hardware
from jaxprune.pruning.results import LayerResult
from jaxprune.pruning.store import Stage
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel, inside_layer


class CalibrationStates:
    """Hidden states behind the pruned layers, and where they are asked for those behind the dense
    layers.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        with_dense: whether states behind the dense layers go along.

    Attributes:
        pruned: states behind the layers as pruned.
        dense: states behind the dense layers; None where they were not asked for.

    Raises:
        InputError: see `StreamedModel.embed`.
    """

    def __init__(
        self, model: StreamedModel, tokens: Int[np.ndarray, "w t"], *, with_dense: bool
    ) -> None:
        self._model = model
        self._position = 0  # number of layers that the states are behind
        self._fresh = True
        routing, at_a_time = model.architecture.config.routing, None
        if routing and routing.route_all:  # as many rows as when each token takes a few experts
            at_a_time = max(
                1, hardware.current().tokens_per_batch * routing.per_token // routing.experts
            )
        self.pruned = model.embed(tokens, at_a_time=at_a_time)
        self.dense = model.embed(tokens) if with_dense else None

    def passed(self, index: int, saved: Stage[LayerResult]) -> None:
        """Says that the states moved through a layer; saves them where that is worth its time."""
        self._position = index + 1
        if self._position < self._model.num_layers:
            saved.put_states(self._named(), self._position)

    def catch_up(self, index: int, saved: Stage[LayerResult]) -> None:
        """Moves the states on to a layer's input, through layers that an earlier process of the run
        pruned.

        Args:
            index: the index of the layer.
            saved: the layers that are pruned already.

        Raises:
            InputError: one of them was damaged meanwhile.
        """
        if self._fresh:
            self._fresh = False
            if found := saved.states(lambda position: position <= index, self._named):
                self._position, _ = found
        for before in range(self._position, index):
            layer = saved.require(before)
            part = self._model.architecture.layers[before]
            params = self._model.put_layer(before, part.stack(inside_layer(before, layer.params)))
            self._model.forward(before, params, self.pruned)
            del params  # before the next are there
            if self.dense:
                (stored,) = self._model.layers([before])
                self._model.forward(before, self._model.put_layer(before, stored), self.dense)
        self._position = index

    def _named(self) -> dict[str, HiddenStates]:
        return {"pruned": self.pruned} | ({"dense": self.dense} if self.dense else {})
