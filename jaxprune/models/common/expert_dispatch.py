"""The way of tokens to the experts that they take, and back, and products with experts' kernels.

The choices of all tokens, sorted by expert, lie in blocks of rows that belong to one expert each,
so that shapes do not depend on the routing, every choice has its row, and products cost what their
rows cost: at most one block an expert is not full. Both ways are gathers, and so are their
gradients: no sum depends on the order of threads.

On several devices each has its tokens, and the kernels of its experts. Tokens stay; kernels go
around, from each device to its neighbour, and each multiplies its blocks with those that it holds
at a time.

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
"""Rows of a block."""
EMPTY = np.int32(2**31 - 1)
"""The choice of an empty row: beyond all others."""
Product = Callable[[Array, Array], Array]


class Plan(NamedTuple):
    """Which rows the choices of T tokens, k each, have in N blocks of B rows.

    On several devices, each has a plan of its own tokens, and its numbers are its own; experts' are
    not.

    Attributes:
        owner: the expert of each block; of those that are empty, after all others, as many as
            there are experts.
        choice: of each row, token·k + number of its choice; `EMPTY` where a row is empty.
        row: of each choice.
    """

    owner: Int[Array, "N"]
    choice: Int[Array, "N B"]
    row: Int[Array, "T k"]


@partial(
    jax.tree_util.register_dataclass, data_fields=("x", "plan", "share"), meta_fields=("mesh",)
)
@dataclasses.dataclass(frozen=True)
class Routed:
    """A tap of experts: what their linear layers read.

    Attributes:
        x: [blocks, rows, n]; rows that are empty are zero.
        plan: which tokens they are of.
        share: of each choice, the factor of the expert's output.
        mesh: the devices that tokens are spread over; None: one.
    """

    x: Any  # as JAX also makes such trees of other things than arrays
    plan: Any
    share: Any
    mesh: Mesh | None = None

    def weights(self) -> Float[Array, "N B"]:
        """Returns each row's share in the layer's output, squared; 0 where it is empty."""
        return jnp.square(self._of_rows(self.share))

    def rows_of_tokens(self, values: Float[Array, "b t"]) -> Float[Array, "N B"]:
        """Returns values of tokens for their rows; 0 where a row is empty."""
        return self._of_rows(jnp.broadcast_to(values.reshape(-1, 1), self.plan.row.shape))

    def _of_rows(self, values: Float[Array, "T k"]) -> Float[Array, "N B"]:
        return on_each(self.mesh, lambda values, choice: filled(values.reshape(-1), choice))(
            values, self.plan.choice
        )

    def sum_of_rows(self, values: Float[Array, "N B"]) -> Float[Array, "T"]:
        """Returns each token's sum of values of its rows."""
        return on_each(self.mesh, lambda values, row: jnp.sum(values.reshape(-1)[row], axis=1))(
            values, self.plan.row
        )

    def by_expert(self, values: Float[Array, "N m"], experts: int) -> Float[Array, "e m"]:
        """Returns each expert's sum of values of its blocks."""
        own = jnp.arange(experts, dtype=jnp.int32)[:, None] == self.plan.owner[None, :]
        return jnp.matmul(own.astype(values.dtype), values, precision="highest")

    def filled(self) -> Float[Array, "N 1"]:
        """Returns how many rows of each block are not empty."""
        return jnp.sum(self.plan.choice < EMPTY, axis=1, keepdims=True).astype(jnp.float32)


def on_each(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that does the same on every device with its part of each array's first
    axis."""
    if mesh is None:
        return function
    spec = PartitionSpec(AXIS)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def plan(chosen: Int[Array, "T k"], experts: int, mesh: Mesh | None = None) -> Plan:
    """Plans the rows of chosen experts, on each device for its own tokens."""
    return on_each(mesh, partial(_plan, experts=experts))(chosen)


def _plan(chosen: Int[Array, "T k"], experts: int) -> Plan:
    tokens, k = chosen.shape
    count = tokens * k
    size = block_size(count, experts)
    of_choice = chosen.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(of_choice, stable=True).astype(jnp.int32)
    sizes = jnp.sum(
        of_choice[None, :] == jnp.arange(experts, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32
    )
    blocks = (sizes + jnp.int32(size - 1)) // jnp.int32(size)
    first, start = _before(blocks), _before(sizes)  # block and position of each expert's first row
    numbers = jnp.arange(count // size + experts, dtype=jnp.int32)
    owner = jnp.sum(first[None, 1:] <= numbers[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.where(numbers < first[-1] + blocks[-1], owner, jnp.int32(experts))
    within = (numbers - first[owner])[:, None] * jnp.int32(size) + jnp.arange(
        size, dtype=jnp.int32
    )[None, :]
    position = jnp.where(
        within < filled(sizes, owner)[:, None], start[owner][:, None] + within, jnp.int32(count)
    )
    choice = filled(order, position, EMPTY)
    rank = (
        jnp.zeros(count, jnp.int32)
        .at[order]
        .set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)
    )
    row = first[of_choice] * jnp.int32(size) + rank - start[of_choice]
    return Plan(owner, choice, row.reshape(tokens, k))


def block_size(choices: int, experts: int) -> int:
    """Returns the rows of a block: about half of what an expert has on average."""
    half = max(1, choices // experts // 2)
    return min(LARGEST, max(SMALLEST, 1 << (half.bit_length() - 1)))


def _before(counts: Int[Array, "e"]) -> Int[Array, "e"]:
    """Returns the sum of the counts before each."""
    return jnp.cumsum(counts, dtype=jnp.int32) - counts


def filled(values: Array, index: Int[Array, "*s"], fill: int | np.int32 = 0) -> Array:
    """Returns the values at indices; where one is beyond them, `fill`."""
    return values.at[index].get(mode="fill", fill_value=fill)


def _to_rows(x: Float[Array, "T n"], way: Plan) -> Float[Array, "N B n"]:
    return filled(x, way.choice // jnp.int32(way.row.shape[1]))


def _of_choices(rows: Float[Array, "N B m"], way: Plan) -> Float[Array, "T k m"]:
    return rows.reshape(-1, rows.shape[-1])[way.row]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(x: Float[Array, "T n"], way: Plan, mesh: Mesh | None) -> Float[Array, "N B n"]:
    """Brings tokens to their rows; empty ones are zero."""
    return on_each(mesh, _to_rows)(x, way)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def collect(rows: Float[Array, "N B m"], way: Plan, mesh: Mesh | None) -> Float[Array, "T k m"]:
    """Brings rows back to the choices that they are of."""
    return on_each(mesh, _of_choices)(rows, way)


def _dispatch_backward(
    mesh: Mesh | None, way: Plan, gradient: Float[Array, "N B n"]
) -> tuple[Float[Array, "T n"], None]:
    return jnp.sum(collect(gradient, way, mesh), axis=1, dtype=gradient.dtype), None


def _collect_backward(
    mesh: Mesh | None, way: Plan, gradient: Float[Array, "T k m"]
) -> tuple[Float[Array, "N B m"], None]:
    def spread(gradient: Array, way: Plan) -> Array:
        return filled(gradient.reshape(-1, gradient.shape[-1]), way.choice)

    return on_each(mesh, spread)(gradient, way), None


dispatch.defvjp(lambda x, way, mesh: (dispatch(x, way, mesh), way), _dispatch_backward)
collect.defvjp(lambda rows, way, mesh: (collect(rows, way, mesh), way), _collect_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped(
    rows: Float[Array, "N B n"],
    kernels: Float[Array, "e n m"],
    owner: Int[Array, "N"],
    precision: Any,
    mesh: Mesh | None,
) -> Float[Array, "N B m"]:
    """Multiplies each block with the kernel of its expert, in the rows' dtype.

    Args:
        rows: blocks.
        kernels: of the experts, in any dtype.
        owner: the expert of each block.
        precision: of the products.
        mesh: the devices that blocks and experts are spread over; None: one.
    """
    product = partial(_forward, precision=precision)
    return on_each(mesh, partial(_products if mesh is None else _ring_products, product=product))(
        rows, kernels, owner
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
    owner: Int[Array, "N"],
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

    return lax.map(one, (rows, owner))


def _ring_products(
    rows: Float[Array, "N B n"],
    kernels: Float[Array, "e _ _"],
    owner: Int[Array, "N"],
    product: Product,
) -> Float[Array, "N B m"]:
    """Returns the same on each of several devices, which holds the kernels of some experts."""
    shape = jax.eval_shape(lambda: product(rows[0], kernels[0]))

    def turn(held: Array, first: Array, products: Array) -> tuple[Array, Array]:
        def one(block: Array, products: Array) -> Array:
            return products.at[block].set(product(rows[block], held[owner[block] - first]))

        return held, lax.fori_loop(*_range(owner, first, len(held)), one, products)

    return around(kernels, jnp.zeros((len(rows), *shape.shape), shape.dtype), turn)[1]


def around(
    held: Array, other: Array, turn: Callable[[Array, Array, Array], tuple[Array, Array]]
) -> tuple[Array, Array]:
    """Sends what each device holds of experts around, once; to be called on each device.

    Args:
        held: the device's own, [experts, ...].
        other: what stays.
        turn: (what is held, the first of its experts, what stays) -> both anew.

    Returns:
        Both, when the device's own has come back.
    """
    count, own = lax.axis_size(AXIS), lax.axis_index(AXIS)
    to_the_left = [(device, (device - 1) % count) for device in range(count)]

    def step(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        held, other = state
        first = (own + number) % jnp.int32(count) * jnp.int32(len(held))
        held, other = turn(held, first, other)
        return lax.ppermute(held, AXIS, to_the_left), other

    return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, (held, other))


def _range(owner: Int[Array, "N"], first: Array, count: int) -> tuple[Array, Array]:
    """Returns the blocks of experts that are next to each other, from and to."""
    before, up_to = owner < first, owner < first + jnp.int32(count)
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
    owner: Int[Array, "N"],
    precision: Any,
) -> Float[Array, "e n m"]:
    """Returns the gradients by experts' kernels."""

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, g, expert = block
        added = _add_product(
            lax.dynamic_index_in_dim(total, expert, keepdims=False), x, g, precision
        )
        return lax.dynamic_update_index_in_dim(total, added, expert, axis=0), None

    return lax.scan(add, jnp.zeros(kernels.shape, kernels.dtype), (rows, gradient, owner))[0]


def _ring_of_kernels(
    rows: Float[Array, "N B n"],
    gradient: Float[Array, "N B m"],
    kernels: Float[Array, "e n m"],
    owner: Int[Array, "N"],
    precision: Any,
) -> Float[Array, "e n m"]:
    """Returns the same on each of several devices: the sums go around."""

    def turn(total: Array, first: Array, other: Array) -> tuple[Array, Array]:
        def add(block: Array, total: Array) -> Array:
            expert = owner[block] - first
            added = _add_product(total[expert], rows[block], gradient[block], precision)
            return lax.dynamic_update_index_in_dim(total, added, expert, axis=0)

        return lax.fori_loop(*_range(owner, first, len(total)), add, total), other

    return around(jnp.zeros(kernels.shape, kernels.dtype), jnp.int32(0), turn)[0]


def _grouped_backward(
    precision: Any,
    mesh: Mesh | None,
    kept: tuple[Array, Array, Array],
    gradient: Float[Array, "N B m"],
) -> tuple[Array, Array, None]:
    """Returns the gradients by rows and by kernels, in loops of their own: of two, one is often not
    needed."""
    rows, kernels, owner = kept
    of_kernels = partial(_of_kernels if mesh is None else _ring_of_kernels, precision=precision)
    products = partial(
        _products if mesh is None else _ring_products,
        product=partial(_backward, precision=precision),
    )
    total = on_each(mesh, of_kernels)(rows, gradient, kernels, owner)
    return on_each(mesh, products)(gradient, kernels, owner), total, None


grouped.defvjp(
    lambda rows, kernels, owner, precision, mesh: (
        grouped(rows, kernels, owner, precision, mesh),
        (rows, kernels, owner),
    ),
    _grouped_backward,
)
