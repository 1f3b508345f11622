"""Selects the least important experts, which are removed as a whole.

The saliency of an expert is a mean over the tokens that are routed to it: its routing weight times
the norm of its output.

References:
    Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (arXiv
    2510.13999).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from convert import Params
from jaxprune.costs.program import PhaseCosts, Program
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.costs.shapes import Shapes
from jaxprune.models import Layer
from jaxprune.models.common.experts import OUTPUT_CAPTURE
from jaxprune.run_store.store import EXPERTS, RunStore
from jaxprune.sharding import fetch
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.sweep import sweep


def kept_experts(
    model: StreamedModel,
    tokens: Int[np.ndarray, "w t"],
    share: float,
    store: RunStore | None = None,
) -> dict[int, list[int]]:
    """Returns the experts that remain after a fraction of each layer's experts is removed.

    The experts with the smallest saliency are removed.

    Args:
        model: the model before the removal.
        tokens: calibration windows, [windows, length] token ids.
        share: the fraction of each layer's experts to remove. The number is rounded to the nearest
            integer.
        store: where saliencies are saved and looked up; None: nothing is saved.

    Returns:
        Layer index -> sorted indices of the kept experts. Layers without experts are missing.
    """
    found = {}
    for index, saliency in _saliencies(model, tokens, store).items():
        order = np.argsort(-saliency, kind="stable")
        keep = len(saliency) - round(share * len(saliency))
        found[index] = sorted(int(expert) for expert in order[:keep])
    return found


def _saliencies(
    model: StreamedModel, tokens: Int[np.ndarray, "w t"], store: RunStore | None
) -> dict[int, Float[np.ndarray, "e"]]:
    name = f"{EXPERTS}/0"
    if store and (saved := store.get(name)):
        return {int(index): saliency for index, saliency in saved.arrays.items()}
    hidden = model.embed(tokens)

    def visit(index: int, params: Params, _: dict[str, float]) -> Float[np.ndarray, "e"] | None:
        layer, own = model.architecture.layers[index], model.put_layer(index, params)
        sums = [fetch(norms(layer, own, x)) for x in hidden.batches()] if layer.experts else []
        if index + 1 < model.num_layers:
            model.forward(index, own, hidden)
        if not sums:
            return None
        total, given = (np.sum(one, axis=0, dtype=np.float64) for one in zip(*sums, strict=True))
        return total / np.maximum(given, 1)

    each = sweep(range(model.num_layers), model.layers, visit)
    found = {index: saliency for index, saliency in enumerate(each) if saliency is not None}
    if store:
        store.put(name, {str(index): saliency for index, saliency in found.items()}, {})
    return found


@partial(jax.jit, static_argnums=0)
def norms(
    layer: Layer, params: Mapping[str, Array], x: Float[Array, "b t d"]
) -> tuple[Float[Array, "e"], Float[Array, "e"]]:
    """Returns sums of routing weights times output norms, and token counts, by expert.

    Args:
        layer: the layer; static.
        params: its params.
        x: its input, [batch, tokens, width].
    """
    _, captures = layer(params, x)
    output, experts = captures[OUTPUT_CAPTURE], max(layer.experts.values())
    rows = jnp.linalg.norm(output.x.astype(jnp.float32), axis=-1) * jnp.sqrt(output.weights())
    total = output.by_expert(jnp.sum(rows, axis=1, keepdims=True), experts)
    return total[:, 0], output.by_expert(output.filled(), experts)[:, 0]


def costs(run: RunSizes) -> PhaseCosts:
    """Returns what measuring experts costs."""
    before = run.removal_of("experts").before
    layers, states = len(before.layers), run.states_bytes(run.windows)
    moved = run.devices.count * run.dense_bytes + 2 * layers * states
    every = programs(run.shapes_of(before), run.windows, run.length)
    return PhaseCosts(every, states, {"experts": moved})


def programs(shapes: Shapes, windows: int, length: int) -> Iterator[Program]:
    """Yields the programs that measure experts.

    Args:
        shapes: the shapes of the run.
        windows: the number of calibration windows.
        length: tokens of a window.
    """
    x = shapes.batch(windows, length)
    for layer, count in shapes.layers.items():
        if layer.experts:
            forward = shapes.forward("experts", layer, x, count * windows)
            function, arguments = partial(norms, layer), forward.arguments[:2]
            yield dataclasses.replace(
                forward, name="norms of outputs", function=function, arguments=arguments
            )
            yield forward
