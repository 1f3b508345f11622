"""Experts of which each token takes a few, beside one that all tokens take."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxprune.models.common import decoder
from jaxprune.models.common.configuration import Config, Kind
from jaxprune.models.common.decoder import Captures, GatedMLP, LinearInputs, gated_inputs, linear
from jaxprune.models.common.experts import SparseMLP, routing_of
from jaxprune.models.common.functional_modules import ROUTER_CAPTURE


class SharedMLP(SparseMLP):
    """Experts beside one that all tokens take, each its own share of it; returns the output and its
    captures."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.shared_expert = GatedMLP(config, rngs, routing_of(config).shared)
        self.shared_expert_gate = linear(config, config.hidden_size, 1, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Captures]:
        y, captures = super().__call__(x)
        shared, own = self.shared_expert(x)
        return y + jax.nn.sigmoid(self.shared_expert_gate(x)) * shared, captures | own


def inputs(config: Config, kind: Kind) -> LinearInputs:
    """Returns the inputs of `Attention`, and of `GatedMLP` or `SharedMLP`."""
    usual = decoder.inputs(config, kind)
    if not kind.experts:
        return usual
    routers = {ROUTER_CAPTURE: ("mlp.gate", "mlp.shared_expert_gate")}
    return {**usual, **routers, **gated_inputs("mlp.shared_expert")}
