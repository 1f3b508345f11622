"""Bytes that a run moves between the host and its devices: weights, hidden states, and what a
distillation keeps."""

from collections.abc import Collection

from jaxprune.planning.work import Work


def transfers(work: Work, phases: Collection[str]) -> dict[str, float]:
    """Returns phase -> bytes to all devices and back.

    A window's hidden states go to one device; a layer's weights go to each. Between phases of a
    layer its weights stay.

    Args:
        work: what the run is asked to do.
        phases: of the run.
    """
    count, layers, pruned = work.devices.count, len(work.architecture.layers), work.pruned_bytes
    weights, dense = count * work.stored_bytes("layers."), count * work.dense_bytes("layers.")
    states, steps = work.states_bytes(work.windows, work.length), work.steps
    some = work.states_bytes(work.recipe.importance.windows_of(work.windows), work.length)
    tuned = work.states_bytes(sum(work.dense_groups), steps.length)
    held_out = work.states_bytes(work.held_out, work.length)
    measures = 1 + len(steps.measured) if work.held_out else 0
    passes = len(work.dense_groups) + (work.held_out > 0)
    evaluated = sum(work.states_bytes(*text) for text in work.texts)
    found = {
        "experts": dense + 2 * layers * states,
        # forward, then back: inputs and gradients up, gradients down
        "sensitivity": 2 * weights + 5 * layers * some,
        # the dense model's go and come, too
        "gram": weights + (3 if work.recipe.asymmetry else 1) * layers * states,
        "solve": pruned + work.mask_bytes,
        "forward": count * pruned + 2 * (layers - 1) * states,
        "quantize": 2 * weights + pruned + work.mask_bytes + 3 * layers * states,
        "tune": dense * passes + 2 * layers * (tuned + (1 + measures) * held_out),
        "evaluate": len(work.texts) * (dense + weights) + 4 * layers * evaluated,
    }
    # values for the forward pass; then up, with masks, and down
    if steps.count and not work.placement.state:
        found["tune"] += (3 * steps.count + measures) * work.tuned_bytes
        # While zeros are to come masks go up for the forward pass, too, and down after those that
        # bring some.
        masks = steps.count + steps.last_pruning + steps.measured_early + len(steps.prunings)
        found["tune"] += masks * work.mask_bytes
    if steps.count and not work.placement.results:  # each layer's input, down and up again
        found["tune"] += 2 * layers * steps.count * work.states_bytes(*steps.shape)
    return {phase: found[phase] for phase in phases}
