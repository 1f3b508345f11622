"""Bytes that a compiled program moves: by hand, of its text."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxprune.planning.hlo_traffic import Module

N = 256
ARRAY = 4 * N * N


def module(function: Callable[..., object], *shapes: tuple[int, ...]) -> Module:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Module(jax.jit(function).lower(*arguments).compile().as_text() or "")


def loop(a: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 7, lambda _, x: a @ x, a)


def rows(a: jax.Array) -> jax.Array:
    """Reads an eighth of the rows, and writes them."""
    return jnp.sin(lax.dynamic_slice_in_dim(a, jnp.argmax(a[0, :2]), N // 8))


@pytest.mark.parametrize(
    ("function", "arrays", "least", "most"),
    [
        (lambda a, b: a @ b, 2, 3, 3),
        (lambda a: jnp.sin(a) * 2 + a, 1, 2, 2),
        (loop, 1, 7 * 3, 7 * 5 + 3),  # with a copy where the compiler makes one
        (rows, 1, 0.25, 0.3),
        (lambda a: jnp.sum(a), 1, 1, 1.1),
    ],
)
def test_traffic(function: Callable[..., object], arrays: int, least: float, most: float) -> None:
    found = module(function, *[(N, N)] * arrays)
    assert least <= found.traffic() / ARRAY <= most
    assert found.instructions() > 1


TEXT = """
HloModule jit_f, is_scheduled=true

%fused (p0: f32[8,128], p1: bf16[1,128]) -> (f32[8,128], f32[8,128]) {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p1 = bf16[1,128]{1,0} parameter(1)
  %wide = f32[1,128]{1,0} convert(%p1)
  %zero = s32[] constant(0)
  %updated = f32[8,128]{1,0} dynamic-update-slice(%p0, %wide, %zero, %zero)
  ROOT %both = (f32[8,128]{1,0}, f32[8,128]{1,0}) tuple(%updated, %p0)
}

ENTRY %main (a: f32[8,128], b: bf16[1,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = bf16[1,128]{1,0} parameter(1)
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy(%a)
  %two = (f32[8,128]{1,0:T(8,128)}, /*index=1*/f32[8,128]{1,0}) fusion(%near, %b), calls=%fused
  ROOT %result = f32[8,128]{1,0} get-tuple-element(%two), index=0
}
"""


def test_what_is_updated_in_place_and_what_lies_near_costs_little() -> None:
    array, row = 4 * 8 * 128, 128
    found = Module(TEXT)
    assert found.entry == "main" and found.instructions() == 11
    # The copy reads the array; the fusion reads it and a row of 16 bits, overwrites the row, and
    # writes the array.
    assert found.traffic() == array + (array + 2 * row + 2 * 4 * row + array)


def test_what_devices_send_is_counted() -> None:
    """Rings of four devices: an all-gather in a loop of three, a sum, and a start of each."""
    text = """
ENTRY %main (p0: f32[256]) -> f32[1024] {
  %p0 = f32[256]{0} parameter(0)
  %loop = f32[256]{0} while(%p0), condition=%c, body=%body, config={"known_trip_count":{"n":"3"}}
  %sum = f32[256]{0} all-reduce(%loop), replica_groups={}, to_apply=%add
  %begun = f32[256]{0} all-reduce-start(%sum), replica_groups={}, to_apply=%add
  %summed = f32[256]{0} all-reduce-done(%begun)
  %started = (f32[256]{0}, f32[1024]{0}) all-gather-start(%summed), dimensions={0}
  %gathered = f32[1024]{0} all-gather-done(%started)
  %part = f32[256]{0} reduce-scatter(%gathered), dimensions={0}, to_apply=%add
  ROOT %moved = f32[256]{0} collective-permute(%part), source_target_pairs={{0,1}}
}

%body (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %all = f32[1024]{0} all-gather(%p), dimensions={0}
  ROOT %own = f32[256]{0} slice(%all), slice={[0:256]}
}
"""
    part = 4 * 256
    assert (
        Module(text).exchanged() == 3 * 3 * part + 2 * part + 2 * part + 3 * part + 3 * part + part
    )
