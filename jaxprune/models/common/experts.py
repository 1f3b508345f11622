"""Feed-forward networks of which each token takes a few: routers, and their experts.

References:
    Shazeer et al., "Outrageously Large Neural Networks" (arXiv 1701.06538).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxprune.models.common.activations import gated
from jaxprune.models.common.configuration import Config, Routing
from jaxprune.models.common.expert_dispatch import (
    EMPTY,
    DispatchPlan,
    Routed,
    collect,
    dispatch,
    dispatch_plan,
    grouped,
)
from jaxprune.models.common.functional_modules import ROUTER_CAPTURE
from jaxprune.sparsity.patterns import Projections

GATED = "gate_proj", "up_proj", "down_proj"
"""What most families call the linear layers of a gated feed-forward network."""
OUTPUT_CAPTURE = "expert_output"
"""The capture of experts' outputs, which no linear layer reads."""


class Rows(NamedTuple):
    """Where the slots that a linear layer of experts reads belong.

    Attributes:
        plan: which tokens they are of.
        mesh: the devices that tokens and experts are spread over; None: one.
    """

    plan: DispatchPlan
    mesh: Mesh | None


class ExpertLinear(nnx.Module):
    """A linear layer of each expert, their kernels stacked; of projections where it is several
    side by side."""

    def __init__(
        self,
        experts: int,
        n_in: int,
        n_out: int,
        *,
        bias: bool = False,
        projections: Projections = (),
    ):
        self.projections = projections
        self.kernel = nnx.Param(jnp.zeros((experts, n_in, n_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((experts, n_out), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "N B n"], rows: Rows) -> Float[Array, "N B m"]:
        expert_ids = rows.plan.expert_ids
        y = grouped(
            x, self.kernel[...], expert_ids, jax.config.jax_default_matmul_precision, rows.mesh
        )
        if self.bias is None:
            return y
        bias = self.bias[...].astype(y.dtype)[expert_ids][:, None, :]
        # empty slots stay 0
        return y + jnp.where(
            (rows.plan.assignments < EMPTY)[..., None], bias, jnp.zeros((), y.dtype)
        )


class GatedExperts(nnx.Module):
    """Gated feed-forward networks; returns the outputs of all rows and the input of the last linear
    layer."""

    def __init__(self, config: Config, names: tuple[str, str, str] = GATED):
        routing = routing_of(config)
        sizes = (
            (config.hidden_size, routing.size),
            (config.hidden_size, routing.size),
            (routing.size, config.hidden_size),
        )
        for name, (n_in, n_out) in zip(names, sizes, strict=True):
            setattr(self, name, ExpertLinear(routing.experts, n_in, n_out))
        self.names, self.activation = names, config.activation

    def __call__(
        self, x: Float[Array, "N B n"], rows: Rows
    ) -> tuple[Float[Array, "N B n"], Float[Array, "N B h"]]:
        gate, up, down = (getattr(self, name) for name in self.names)
        hidden = gated(self.activation, gate(x, rows), up(x, rows))
        return down(hidden, rows), hidden


def routing_of(config: Config) -> Routing:
    """Returns how a model with experts routes."""
    assert config.routing is not None
    return config.routing


def mixture(
    config: Config,
    router: Callable[[Array], Array],
    experts: Any,
    x: Float[Array, "b t d"],
    correction: Float[Array, "e"] | None = None,
) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
    """Sends each token to the experts that its router chooses, and adds up their outputs by their
    routing weights.

    Args:
        config: of the model.
        router: hidden states -> a score of each expert.
        experts: blocks of slots and their experts -> outputs, and the input of the last linear
            layer.
        x: hidden states.
        correction: what is added to routing weights where experts are chosen; None: nothing.

    Returns:
        The sum, and the captures: what the router reads, what experts read, the input of their last
        linear layer, and their outputs.
    """
    routing, tokens = routing_of(config), x.reshape(-1, x.shape[-1])
    scores = router(x).reshape(len(tokens), -1).astype(jnp.float32)
    every = jax.nn.sigmoid(scores) if routing.sigmoid else jax.nn.softmax(scores, axis=-1)
    if correction is None:
        weights, chosen = lax.top_k(every, routing.per_token)
    else:
        _, chosen = lax.top_k(every + correction.astype(every.dtype)[None, :], routing.per_token)
        weights = jnp.take_along_axis(every, chosen, axis=-1)
    total = (
        jnp.sum(weights, axis=-1, keepdims=True)
        if routing.normalized
        else jnp.ones_like(weights[:, :1])
    )
    total = total if routing.scale == 1 else total / jnp.float32(routing.scale)
    weights = weights / total
    mesh = mesh_of(routing, len(x))

    def through(chosen: Array, weights: Array) -> tuple[Array, dict[str, Any]]:
        """Returns the outputs of all assignments, and the captures."""
        plan = dispatch_plan(chosen, routing.experts, mesh)
        rows = dispatch(tokens, plan, mesh)
        y, hidden = experts(rows, Rows(plan, mesh))
        captures = {"expert_input": rows, "expert_hidden": hidden, OUTPUT_CAPTURE: y}
        return collect(y, plan, mesh), {
            name: Routed(capture, plan, weights, mesh) for name, capture in captures.items()
        }

    y, captures = through(chosen, weights)
    if routing.route_all:  # for calibration only: the output does not depend on it
        all_experts = jnp.broadcast_to(
            jnp.arange(routing.experts, dtype=jnp.int32)[None, :], every.shape
        )
        _, captures = through(all_experts, every / total)
    y = jnp.sum(y * weights.astype(y.dtype)[:, :, None], axis=1, dtype=y.dtype)
    return y.reshape(x.shape), {ROUTER_CAPTURE: x, **captures}


def mesh_of(routing: Routing, windows: int) -> Mesh | None:
    """Returns the devices that windows and experts are spread over; None where either cannot be
    split evenly."""
    mesh = routing.mesh
    return (
        mesh
        if mesh is not None and not (windows % mesh.size or routing.experts % mesh.size)
        else None
    )


EXPERT_INPUTS = {
    ROUTER_CAPTURE: ("mlp.gate",),
    "expert_input": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "expert_hidden": ("mlp.experts.down_proj",),
}
"""Capture -> the linear layers of `SparseMLP` that read it."""


class SparseMLP(nnx.Module):
    """Gated feed-forward networks, of which each token takes a few; returns its output and its
    captures."""

    def __init__(self, config: Config, rngs: nnx.Rngs, names: tuple[str, str, str] = GATED):
        self.gate = nnx.Linear(
            config.hidden_size,
            routing_of(config).experts,
            use_bias=False,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.experts = GatedExperts(config, names)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
        return mixture(self.config, self.gate, self.experts, x)
