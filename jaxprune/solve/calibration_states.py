"""Hidden states of the calibration windows as they move through the pruned and dense layers."""

from typing import Any

import numpy as np
from jaxtyping import Int

from jaxprune.costs.shapes import calibration_tokens
from jaxprune.run_store.store import Stage
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel, inside_layer


class CalibrationStates:
    """Hidden states after the pruned layers and, optionally, after the dense layers.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        with_dense: whether to compute states after the dense layers too.
        saved: where pruned layers and states are saved; None: nothing is saved.
        moves: the model through whose layers the states move again if an earlier process has
            solved them; None: the saved layers themselves.

    Attributes:
        model, saved: as given.
        pruned: states after the pruned layers.
        dense: states after the dense layers; None without `with_dense`.

    Raises:
        InputError: see `StreamedModel.embed`.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokens: Int[np.ndarray, "w t"],
        *,
        with_dense: bool,
        saved: Stage[Any] | None = None,
        moves: StreamedModel | None = None,
    ) -> None:
        self.model, self.saved, self._moves = model, saved, moves
        self._position = 0  # number of layers that the states have passed
        self._fresh = True
        self.pruned = model.embed(tokens, at_a_time=calibration_tokens(model.architecture))
        self.dense = model.embed(tokens) if with_dense else None

    def layer_done(self, index: int) -> None:
        """Records that the states passed a layer, and saves them if enough time has passed."""
        self._position = index + 1
        if self.saved and self._position < self.model.num_layers:
            self.saved.put_states(self._named(), self._position)

    def catch_up(self, index: int) -> None:
        """Moves the states to a layer's input, through layers that an earlier process pruned.

        Args:
            index: the index of the layer.

        Raises:
            InputError: a saved layer was damaged during the run.
        """
        if self.saved is None:
            return
        if self._fresh:
            self._fresh = False
            if found := self.saved.states(lambda position: position <= index, self._named):
                self._position, _ = found
        for before in range(self._position, index):
            moves = self._moves or self.model
            if self._moves:
                (stored,) = moves.layers([before])
            else:
                own = inside_layer(before, self.saved.require(before).params)
                stored = self.model.architecture.layers[before].stack(own)
            params = moves.put_layer(before, stored)
            moves.forward(before, params, self.pruned)
            del stored, params  # frees memory before the next are loaded
            if self.dense:
                (stored,) = self.model.layers([before])
                self.model.forward(before, self.model.put_layer(before, stored), self.dense)
        self._position = index

    def _named(self) -> dict[str, HiddenStates]:
        return {"pruned": self.pruned} | ({"dense": self.dense} if self.dense else {})
