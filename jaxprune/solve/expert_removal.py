"""Which experts of a model matter least, so that they can be dropped whole.

The saliency of an expert is the mean, over the tokens that are routed to it, of its share in the
layer's output times the norm of its own output.

References:
    Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (arXiv
    2510.13999).
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from convert import Params
from jaxprune.errors import Change, InputError
from jaxprune.models import Architecture, Layer
from jaxprune.models.common.experts import OUTPUT_TAP
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
    """Returns the experts that stay when a share of those of least saliency goes from every layer.

    Args:
        model: the dense model.
        tokens: calibration windows, [windows, length] token ids.
        share: of the experts of each layer, rounded to the nearest whole number.
        store: where the saliencies are saved, and taken from where they are saved already; None:
            nothing is saved.

    Returns:
        Layer index -> experts in order, of the layers that have them.

    Raises:
        InputError: see `require_experts`.
    """
    count = require_experts(model.architecture, share)
    found = {}
    for index, saliency in _saliencies(model, tokens, store).items():
        order = np.argsort(-saliency, kind="stable")
        found[index] = sorted(int(expert) for expert in order[: len(saliency) - count])
    return found


def require_experts(architecture: Architecture, share: float) -> int:
    """Returns how many experts go from each layer.

    Raises:
        InputError: the model has no experts, or not as many would be left as a token takes.
    """
    routing = architecture.config.routing
    if routing is None or not any(layer.experts for layer in architecture.layers):
        raise InputError("the model has no experts to drop", options={"drop_experts": Change.OMIT})
    count = round(share * routing.experts)
    if routing.experts - count < routing.per_token:
        raise InputError(
            f"of {routing.experts} experts {routing.experts - count} would be left, but a token "
            "takes "
            f"{routing.per_token}",
            options={"drop_experts": Change.LOWER},
        )
    return count


def without_experts(architecture: Architecture, share: float) -> Architecture:
    """Returns the architecture when a share of the experts is dropped; errors as for
    `require_experts`."""
    if not share:
        return architecture
    count = require_experts(architecture, share)
    return architecture.routed(experts=architecture.config.routing.experts - count)


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
    """Returns each expert's sum of shares times norms of outputs over its tokens, and how many
    these are."""
    _, taps = layer(params, x)
    output, experts = taps[OUTPUT_TAP], max(layer.experts.values())
    rows = jnp.linalg.norm(output.x.astype(jnp.float32), axis=-1) * jnp.sqrt(output.weights())
    total = output.by_expert(jnp.sum(rows, axis=1, keepdims=True), experts)
    return total[:, 0], output.by_expert(output.filled(), experts)[:, 0]
