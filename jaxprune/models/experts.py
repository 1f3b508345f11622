"""Feed-forward networks of which each token takes a few: routers, experts, and the way of tokens to them and back.

The choices of all tokens, sorted by expert, lie in blocks of rows that belong to one expert each, so that shapes do not
depend on the routing, every choice has its row, and products cost what their rows cost: at most one block an expert is
not full. Both ways are gathers, and so are their gradients: no sum depends on the order of threads.

References:
    Shazeer et al., "Outrageously Large Neural Networks" (arXiv 1701.06538); Gale et al., "MegaBlocks" (arXiv
    2211.15841), for products by blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune.models.configuration import ACTIVATIONS, Config, Routing
from jaxprune.models.parts import ROUTER_TAP

OUTPUT_TAP = "expert_output"
"""The tap of experts' outputs, which no linear layer reads."""
SMALLEST, LARGEST = 8, 256
"""Rows of a block."""


class Plan(NamedTuple):
    """Which rows the choices of T tokens, k each, have in N blocks of B rows.

    Attributes:
        owner: the expert of each block; of those that are empty, behind all others, as many as there are experts.
        choice: of each row, token·k + number of its choice; T·k where a row is empty.
        row: of each choice.
        share: of each choice, the factor of the expert's output.
    """

    owner: Int[Array, "N"]
    choice: Int[Array, "N B"]
    row: Int[Array, "T k"]
    share: Float[Array, "T k"]


class Routed(NamedTuple):
    """A tap of experts: what their linear layers read.

    Attributes:
        x: [blocks, rows, n]; rows that are empty are zero.
        plan: which tokens they are of.
    """

    x: Float[Array, "N B n"]
    plan: Plan

    def weights(self) -> Float[Array, "N B"]:
        """Returns each row's share in the layer's output, squared; 0 where it is empty."""
        return jnp.square(_filled(self.plan.share.reshape(-1), self.plan.choice))

    def filled(self) -> Float[Array, "N 1"]:
        """Returns how many rows of each block are not empty."""
        return jnp.sum(self.plan.choice < self.plan.row.size, axis=1, keepdims=True).astype(jnp.float32)

    def rows_of_tokens(self, values: Float[Array, "b t"]) -> Float[Array, "N B"]:
        """Returns values of tokens for their rows; 0 where a row is empty."""
        return _filled(jnp.repeat(values.reshape(-1), self.plan.row.shape[1]), self.plan.choice)

    def sum_of_rows(self, values: Float[Array, "N B"]) -> Float[Array, "T"]:
        """Returns each token's sum of values of its rows."""
        return jnp.sum(values.reshape(-1)[self.plan.row], axis=1)

    def by_expert(self, values: Float[Array, "N m"], experts: int) -> Float[Array, "e m"]:
        """Returns each expert's sum of values of its blocks."""
        own = jnp.arange(experts, dtype=jnp.int32)[:, None] == self.plan.owner[None, :]
        return jnp.matmul(own.astype(values.dtype), values, precision="highest")


def plan(chosen: Int[Array, "T k"], share: Float[Array, "T k"], experts: int) -> Plan:
    """Plans the rows of chosen experts."""
    tokens, k = chosen.shape
    count = tokens * k
    size = block_size(count, experts)
    of_choice = chosen.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(of_choice, stable=True).astype(jnp.int32)
    sizes = jnp.sum(of_choice[None, :] == jnp.arange(experts, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    blocks = (sizes + jnp.int32(size - 1)) // jnp.int32(size)
    first, start = _before(blocks), _before(sizes)  # block and position of each expert's first row
    numbers = jnp.arange(count // size + experts, dtype=jnp.int32)
    owner = jnp.sum(first[None, 1:] <= numbers[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.where(numbers < first[-1] + blocks[-1], owner, jnp.int32(experts))
    within = (numbers - first[owner])[:, None] * jnp.int32(size) + jnp.arange(size, dtype=jnp.int32)[None, :]
    position = jnp.where(within < _filled(sizes, owner)[:, None], start[owner][:, None] + within, jnp.int32(count))
    choice = _filled(order, position, count)
    rank = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)
    row = first[of_choice] * jnp.int32(size) + rank - start[of_choice]
    return Plan(owner, choice, row.reshape(tokens, k), share)


def block_size(choices: int, experts: int) -> int:
    """Returns the rows of a block: about half of what an expert has on average."""
    half = max(1, choices // experts // 2)
    return min(LARGEST, max(SMALLEST, 1 << (half.bit_length() - 1)))


def _before(counts: Int[Array, "e"]) -> Int[Array, "e"]:
    """Returns the sum of the counts before each."""
    return jnp.cumsum(counts, dtype=jnp.int32) - counts


def _filled(values: Array, index: Int[Array, "*s"], fill: int = 0) -> Array:
    """Returns the values at indices; where one is beyond them, `fill`."""
    return values.at[index].get(mode="fill", fill_value=fill)


@jax.custom_vjp
def dispatch(x: Float[Array, "T n"], way: Plan) -> Float[Array, "N B n"]:
    """Brings tokens to their rows; empty ones are zero."""
    return _filled(x, way.choice // jnp.int32(way.row.shape[1]))


@jax.custom_vjp
def collect(rows: Float[Array, "N B m"], way: Plan) -> Float[Array, "T k m"]:
    """Brings rows back to the choices that they are of."""
    return rows.reshape(-1, rows.shape[-1])[way.row]


def _dispatch_backward(way: Plan, gradient: Float[Array, "N B n"]) -> tuple[Float[Array, "T n"], None]:
    return jnp.sum(collect(gradient, way), axis=1, dtype=gradient.dtype), None


def _collect_backward(way: Plan, gradient: Float[Array, "T k m"]) -> tuple[Float[Array, "N B m"], None]:
    return _filled(gradient.reshape(-1, gradient.shape[-1]), way.choice), None


dispatch.defvjp(lambda x, way: (dispatch(x, way), way), _dispatch_backward)
collect.defvjp(lambda rows, way: (collect(rows, way), way), _collect_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped(
    rows: Float[Array, "N B n"], kernels: Float[Array, "e n m"], owner: Int[Array, "N"], precision: Any
) -> Float[Array, "N B m"]:
    """Multiplies each block with the kernel of its expert, in the rows' dtype.

    Args:
        rows: blocks.
        kernels: of the experts, in any dtype.
        owner: the expert of each block.
        precision: of the products.
    """

    return _products(rows, kernels, owner, lambda x, kernel: jnp.matmul(x, kernel, precision=precision))


def _products(
    rows: Float[Array, "N B n"],
    kernels: Float[Array, "e _ _"],
    owner: Int[Array, "N"],
    product: Callable[[Array, Array], Array],
) -> Float[Array, "N B m"]:
    """Returns the products of blocks with their experts' kernels; empty blocks are not multiplied."""

    def one(block: tuple[Array, Array]) -> Array:
        x, expert = block

        def multiplied() -> Array:
            kernel = lax.dynamic_index_in_dim(kernels, expert, keepdims=False).astype(x.dtype)
            return product(x, kernel)

        shape = jax.eval_shape(multiplied)
        return lax.cond(expert < len(kernels), multiplied, lambda: jnp.zeros(shape.shape, shape.dtype))

    return lax.map(one, (rows, owner))


def _grouped_backward(
    precision: Any, kept: tuple[Array, Array, Array], gradient: Float[Array, "N B m"]
) -> tuple[Array, Array, None]:
    """Returns the gradients by rows and by kernels, in loops of their own: of two, one is often not needed."""
    rows, kernels, owner = kept

    def of_kernels(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, g, expert = block
        added = jnp.matmul(x.T, g, precision=precision, preferred_element_type=total.dtype)
        added = added + lax.dynamic_index_in_dim(total, expert, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, added, expert, axis=0), None

    total, _ = lax.scan(of_kernels, jnp.zeros(kernels.shape, kernels.dtype), (rows, gradient, owner))
    of_rows = _products(gradient, kernels, owner, lambda g, kernel: jnp.matmul(g, kernel.T, precision=precision))
    return of_rows, total, None


grouped.defvjp(
    lambda rows, kernels, owner, precision: (grouped(rows, kernels, owner, precision), (rows, kernels, owner)),
    _grouped_backward,
)


class ExpertLinear(nnx.Module):
    """A linear layer of each expert, their kernels stacked."""

    def __init__(self, experts: int, n_in: int, n_out: int, *, bias: bool = False):
        self.kernel = nnx.Param(jnp.zeros((experts, n_in, n_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((experts, n_out), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "N B n"], owner: Int[Array, "N"]) -> Float[Array, "N B m"]:
        y = grouped(x, self.kernel[...], owner, jax.config.jax_default_matmul_precision)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)[owner][:, None, :]


class GatedExperts(nnx.Module):
    """Gated feed-forward networks; returns the outputs of all rows and the input of the last linear layer."""

    def __init__(self, config: Config, names: tuple[str, str, str]):
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
        self, x: Float[Array, "N B n"], owner: Int[Array, "N"]
    ) -> tuple[Float[Array, "N B n"], Float[Array, "N B h"]]:
        gate, up, down = (getattr(self, name) for name in self.names)
        hidden = ACTIVATIONS[self.activation](gate(x, owner)) * up(x, owner)
        return down(hidden, owner), hidden


def routing_of(config: Config) -> Routing:
    """Returns how a model with experts routes."""
    assert config.routing is not None
    return config.routing


def mixture(
    config: Config, router: Callable[[Array], Array], experts: Any, x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
    """Sends each token to the experts that its router chooses, and adds up their outputs by their shares.

    Args:
        config: of the model.
        router: hidden states -> a score of each expert.
        experts: blocks of rows and their experts -> outputs, and the input of the last linear layer.
        x: hidden states.

    Returns:
        The sum, and the taps: what the router reads, what experts read, the input of their last linear layer, and
        their outputs.
    """
    routing, tokens = routing_of(config), x.reshape(-1, x.shape[-1])
    scores = router(x).reshape(len(tokens), -1).astype(jnp.float32)
    shares = jax.nn.softmax(scores, axis=-1)
    share, chosen = lax.top_k(shares, routing.per_token)
    total = jnp.sum(share, axis=-1, keepdims=True) if routing.normalized else jnp.ones_like(share[:, :1])
    share = share / total
    way = plan(chosen, share, routing.experts)
    rows = dispatch(tokens, way)
    y, hidden = experts(rows, way.owner)
    weighed = collect(y, way) * share.astype(y.dtype)[:, :, None]
    taps: dict[str, Any] = {"expert_input": Routed(rows, way), "expert_hidden": Routed(hidden, way)}
    output = Routed(y, way)
    if routing.route_all:  # for calibration only: the output does not depend on it
        every = jnp.broadcast_to(jnp.arange(routing.experts, dtype=jnp.int32)[None, :], shares.shape)
        way = plan(every, shares / total, routing.experts)
        rows = dispatch(tokens, way)
        taps = {"expert_input": Routed(rows, way), "expert_hidden": Routed(experts(rows, way.owner)[1], way)}
    taps |= {ROUTER_TAP: x, OUTPUT_TAP: output}
    return jnp.sum(weighed, axis=1, dtype=y.dtype).reshape(x.shape), taps


EXPERT_INPUTS = {
    ROUTER_TAP: ("mlp.gate",),
    "expert_input": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "expert_hidden": ("mlp.experts.down_proj",),
}
"""Tap -> the linear layers of `SparseMLP` that read it."""


class SparseMLP(nnx.Module):
    """Gated feed-forward networks, of which each token takes a few; returns its output and its taps."""

    def __init__(
        self, config: Config, rngs: nnx.Rngs, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ):
        self.gate = nnx.Linear(
            config.hidden_size, routing_of(config).experts, use_bias=False, dtype=config.dtype, rngs=rngs
        )
        self.experts = GatedExperts(config, names)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
        return mixture(self.config, self.gate, self.experts, x)
