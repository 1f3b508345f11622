"""Dispatch of tokens to the experts that they take, and products with experts' kernels.

An assignment is one of the k experts of a token. The assignments of all tokens, sorted by expert,
lie in blocks of slots; a block belongs to one expert. Shapes do not depend on the routing, every
assignment has its slot, and products cost what their slots cost: at most one block an expert is not
full. Dispatching and collecting are gathers, and so are their gradients: no sum depends on the
order of threads.

On several devices each has its tokens, and the kernels of its experts. Tokens stay; kernels pass
around a ring of devices, and each device multiplies its blocks with the kernels that it has.

References:
    Gale et al., "MegaBlocks" (arXiv 2211.15841), for products by blocks.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxprune.sharding import AXIS

SMALLEST, LARGEST = 8, 256
"""Slots of a block."""
EMPTY = np.int32(2**31 - 1)
"""The assignment of an empty slot: beyond all others."""
Product = Callable[[Array, Array], Array]


class DispatchPlan(NamedTuple):
    """Which slots the assignments of T tokens, k each, have in N blocks of B slots.

    On several devices, each has a plan of its own tokens, whose numbers are its own; expert ids are
    common to all.

    Attributes:
        expert_ids: the expert of each block; trailing empty blocks: the number of experts.
        assignments: of each slot, token·k + number of its assignment; `EMPTY` where it is empty.
        slots: of each assignment.
    """

    expert_ids: Int[Array, "N"]
    assignments: Int[Array, "N B"]
    slots: Int[Array, "T k"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("x", "plan", "routing_weights"),
    meta_fields=("mesh",),
)
@dataclasses.dataclass(frozen=True)
class Routed:
    """A capture of experts: what their linear layers read.

    Attributes:
        x: [blocks, slots, n]; empty slots are zero.
        plan: which tokens they are of.
        routing_weights: of each assignment, the factor of the expert's output.
        mesh: the devices that tokens are spread over; None: one.
    """

    x: Any  # as JAX also makes such trees of other things than arrays
    plan: Any
    routing_weights: Any
    mesh: Mesh | None = None

    def weights(self) -> Float[Array, "N B"]:
        """Returns each slot's routing weight, squared; 0 where it is empty."""
        return jnp.square(self._of_slots(self.routing_weights))

    def slots_of_tokens(self, values: Float[Array, "b t"]) -> Float[Array, "N B"]:
        """Returns values of tokens for their slots; 0 where a slot is empty."""
        return self._of_slots(jnp.broadcast_to(values.reshape(-1, 1), self.plan.slots.shape))

    def _of_slots(self, values: Float[Array, "T k"]) -> Float[Array, "N B"]:
        return on_each(self.mesh, lambda values, at: filled(values.reshape(-1), at))(
            values, self.plan.assignments
        )

    def sum_of_slots(self, values: Float[Array, "N B"]) -> Float[Array, "T"]:
        """Returns each token's sum of values of its slots."""
        return on_each(self.mesh, lambda values, slots: jnp.sum(values.reshape(-1)[slots], axis=1))(
            values, self.plan.slots
        )

    def by_expert(self, values: Float[Array, "N m"], experts: int) -> Float[Array, "e m"]:
        """Returns each expert's sum of values of its blocks."""
        own = jnp.arange(experts, dtype=jnp.int32)[:, None] == self.plan.expert_ids[None, :]
        return jnp.matmul(own.astype(values.dtype), values, precision="highest")

    def filled(self) -> Float[Array, "N 1"]:
        """Returns how many slots of each block are not empty."""
        return jnp.sum(self.plan.assignments < EMPTY, axis=1, keepdims=True).astype(jnp.float32)


def on_each(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that does the same on every device with its part of each array's first
    axis."""
    if mesh is None:
        return function
    spec = PartitionSpec(AXIS)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def dispatch_plan(
    chosen: Int[Array, "T k"], experts: int, mesh: Mesh | None = None
) -> DispatchPlan:
    """Plans the slots of chosen experts, on each device for its own tokens."""
    return on_each(mesh, partial(_plan, experts=experts))(chosen)


def _plan(chosen: Int[Array, "T k"], experts: int) -> DispatchPlan:
    tokens, k = chosen.shape
    count = tokens * k
    size = block_size(count, experts)
    expert_of = chosen.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(expert_of, stable=True).astype(jnp.int32)
    sizes = jnp.sum(
        expert_of[None, :] == jnp.arange(experts, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32
    )
    blocks = (sizes + jnp.int32(size - 1)) // jnp.int32(size)
    first, start = _before(blocks), _before(sizes)  # block and position of each expert's first slot
    numbers = jnp.arange(count // size + experts, dtype=jnp.int32)
    expert_ids = jnp.sum(first[None, 1:] <= numbers[:, None], axis=1, dtype=jnp.int32)
    expert_ids = jnp.where(numbers < first[-1] + blocks[-1], expert_ids, jnp.int32(experts))
    within = (numbers - first[expert_ids])[:, None] * jnp.int32(size) + jnp.arange(
        size, dtype=jnp.int32
    )[None, :]
    position = jnp.where(
        within < filled(sizes, expert_ids)[:, None],
        start[expert_ids][:, None] + within,
        jnp.int32(count),
    )
    assignments = filled(order, position, EMPTY)
    rank = (
        jnp.zeros(count, jnp.int32)
        .at[order]
        .set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)
    )
    slots = first[expert_of] * jnp.int32(size) + rank - start[expert_of]
    return DispatchPlan(expert_ids, assignments, slots.reshape(tokens, k))


def block_size(assignments: int, experts: int) -> int:
    """Returns the slots of a block: about half of what an expert has on average."""
    half = max(1, assignments // experts // 2)
    return min(LARGEST, max(SMALLEST, 1 << (half.bit_length() - 1)))


def _before(counts: Int[Array, "e"]) -> Int[Array, "e"]:
    """Returns the sum of the counts before each."""
    return jnp.cumsum(counts, dtype=jnp.int32) - counts


def filled(values: Array, index: Int[Array, "*s"], fill: int | np.int32 = 0) -> Array:
    """Returns the values at indices; where one is beyond them, `fill`."""
    return values.at[index].get(mode="fill", fill_value=fill)


def _to_slots(x: Float[Array, "T n"], plan: DispatchPlan) -> Float[Array, "N B n"]:
    return filled(x, plan.assignments // jnp.int32(plan.slots.shape[1]))


def _of_assignments(rows: Float[Array, "N B m"], plan: DispatchPlan) -> Float[Array, "T k m"]:
    return rows.reshape(-1, rows.shape[-1])[plan.slots]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(
    x: Float[Array, "T n"], plan: DispatchPlan, mesh: Mesh | None
) -> Float[Array, "N B n"]:
    """Returns tokens at their slots; empty slots are zero."""
    return on_each(mesh, _to_slots)(x, plan)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def collect(
    rows: Float[Array, "N B m"], plan: DispatchPlan, mesh: Mesh | None
) -> Float[Array, "T k m"]:
    """Returns what is at the slot of each assignment."""
    return on_each(mesh, _of_assignments)(rows, plan)


def _dispatch_backward(
    mesh: Mesh | None, plan: DispatchPlan, gradient: Float[Array, "N B n"]
) -> tuple[Float[Array, "T n"], None]:
    return jnp.sum(collect(gradient, plan, mesh), axis=1, dtype=gradient.dtype), None


def _collect_backward(
    mesh: Mesh | None, plan: DispatchPlan, gradient: Float[Array, "T k m"]
) -> tuple[Float[Array, "N B m"], None]:
    def scatter(gradient: Array, plan: DispatchPlan) -> Array:
        return filled(gradient.reshape(-1, gradient.shape[-1]), plan.assignments)

    return on_each(mesh, scatter)(gradient, plan), None


dispatch.defvjp(lambda x, plan, mesh: (dispatch(x, plan, mesh), plan), _dispatch_backward)
collect.defvjp(lambda rows, plan, mesh: (collect(rows, plan, mesh), plan), _collect_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped(
    rows: Float[Array, "N B n"],
    kernels: Float[Array, "e n m"],
    expert_ids: Int[Array, "N"],
    precision: Any,
    mesh: Mesh | None,
) -> Float[Array, "N B m"]:
    """Multiplies each block with the kernel of its expert, in the rows' dtype.

    Args:
        rows: blocks.
        kernels: of the experts, in any dtype.
        expert_ids: of the blocks.
        precision: of the products.
        mesh: the devices that blocks and experts are spread over; None: one.
    """
    product = partial(_forward, precision=precision)
    return on_each(mesh, partial(_products if mesh is None else _ring_products, product=product))(
        rows, kernels, expert_ids
    )


def _forward(
    x: Float[Array, "B n"], kernel: Float[Array, "n m"], precision: Any
) -> Float[Array, "B m"]:
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision)


def _backward(
    gradient: Float[Array, "B m"], kernel: Float[Array, "n m"], precision: Any
) -> Float[Array, "B n"]:
    return jnp.matmul(gradient, kernel.astype(gradient.dtype).T, precision=precision)


def _products(
    rows: Float[Array, "N B n"],
    kernels: Float[Array, "e _ _"],
    expert_ids: Int[Array, "N"],
    product: Product,
) -> Float[Array, "N B m"]:
    """Returns the products of blocks with their experts' kernels; empty blocks are not
    multiplied."""

    def one(block: tuple[Array, Array]) -> Array:
        x, expert = block

        def multiplied() -> Array:
            return product(x, lax.dynamic_index_in_dim(kernels, expert, keepdims=False))

        shape = jax.eval_shape(multiplied)
        return lax.cond(
            expert < len(kernels), multiplied, lambda: jnp.zeros(shape.shape, shape.dtype)
        )

    return lax.map(one, (rows, expert_ids))


def _ring_products(
    rows: Float[Array, "N B n"],
    kernels: Float[Array, "e _ _"],
    expert_ids: Int[Array, "N"],
    product: Product,
) -> Float[Array, "N B m"]:
    """Returns the same on each of several devices, which holds the kernels of some experts."""
    shape = jax.eval_shape(lambda: product(rows[0], kernels[0]))

    def step(shard: Array, first: Array, products: Array) -> tuple[Array, Array]:
        def one(block: Array, products: Array) -> Array:
            return products.at[block].set(product(rows[block], shard[expert_ids[block] - first]))

        return shard, lax.fori_loop(*_range(expert_ids, first, len(shard)), one, products)

    return ring_pass(kernels, jnp.zeros((len(rows), *shape.shape), shape.dtype), step)[1]


def ring_pass(
    shard: Array, carry: Array, step: Callable[[Array, Array, Array], tuple[Array, Array]]
) -> tuple[Array, Array]:
    """Passes each device's shard of experts once around the ring; to be called on each device.

    Args:
        shard: the device's own, [experts, ...].
        carry: what stays on the device.
        step: (the shard that is there, the first of its experts, carry) -> shard and carry.

    Returns:
        Shard and carry, when the device's own shard has come back.
    """
    count, own = lax.axis_size(AXIS), lax.axis_index(AXIS)
    to_the_left = [(device, (device - 1) % count) for device in range(count)]

    def body(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        shard, carry = state
        first = (own + number) % jnp.int32(count) * jnp.int32(len(shard))
        shard, carry = step(shard, first, carry)
        return lax.ppermute(shard, AXIS, to_the_left), carry

    return lax.fori_loop(jnp.int32(0), jnp.int32(count), body, (shard, carry))


def _range(expert_ids: Int[Array, "N"], first: Array, count: int) -> tuple[Array, Array]:
    """Returns the blocks of experts that are next to each other, from and to."""
    before, up_to = expert_ids < first, expert_ids < first + jnp.int32(count)
    return jnp.sum(before, dtype=jnp.int32), jnp.sum(up_to, dtype=jnp.int32)


def _add_product(
    total: Float[Array, "n m"], x: Array, gradient: Array, precision: Any
) -> Float[Array, "n m"]:
    return total + jnp.matmul(
        x.T, gradient, precision=precision, preferred_element_type=total.dtype
    )


def _of_kernels(
    rows: Float[Array, "N B n"],
    gradient: Float[Array, "N B m"],
    kernels: Float[Array, "e n m"],
    expert_ids: Int[Array, "N"],
    precision: Any,
) -> Float[Array, "e n m"]:
    """Returns the gradients by experts' kernels."""

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, g, expert = block
        added = _add_product(
            lax.dynamic_index_in_dim(total, expert, keepdims=False), x, g, precision
        )
        return lax.dynamic_update_index_in_dim(total, added, expert, axis=0), None

    return lax.scan(add, jnp.zeros(kernels.shape, kernels.dtype), (rows, gradient, expert_ids))[0]


def _ring_of_kernels(
    rows: Float[Array, "N B n"],
    gradient: Float[Array, "N B m"],
    kernels: Float[Array, "e n m"],
    expert_ids: Int[Array, "N"],
    precision: Any,
) -> Float[Array, "e n m"]:
    """Returns the same on each of several devices: the sums pass around the ring."""

    def step(total: Array, first: Array, carry: Array) -> tuple[Array, Array]:
        def add(block: Array, total: Array) -> Array:
            expert = expert_ids[block] - first
            added = _add_product(total[expert], rows[block], gradient[block], precision)
            return lax.dynamic_update_index_in_dim(total, added, expert, axis=0)

        return lax.fori_loop(*_range(expert_ids, first, len(total)), add, total), carry

    return ring_pass(jnp.zeros(kernels.shape, kernels.dtype), jnp.int32(0), step)[0]


def _grouped_backward(
    precision: Any,
    mesh: Mesh | None,
    residuals: tuple[Array, Array, Array],
    gradient: Float[Array, "N B m"],
) -> tuple[Array, Array, None]:
    """Returns the gradients by rows and by kernels, in loops of their own: of two, one is often not
    needed."""
    rows, kernels, expert_ids = residuals
    of_kernels = partial(_of_kernels if mesh is None else _ring_of_kernels, precision=precision)
    products = partial(
        _products if mesh is None else _ring_products,
        product=partial(_backward, precision=precision),
    )
    total = on_each(mesh, of_kernels)(rows, gradient, kernels, expert_ids)
    return on_each(mesh, products)(gradient, kernels, expert_ids), total, None


grouped.defvjp(
    lambda rows, kernels, expert_ids, precision, mesh: (
        grouped(rows, kernels, expert_ids, precision, mesh),
        (rows, kernels, expert_ids),
    ),
    _grouped_backward,
)
