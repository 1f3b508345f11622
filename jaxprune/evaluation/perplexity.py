"""Perplexity of a text, and how far a pruned model's predictions are from the dense model's, by
streaming.

Each model visits the device layer by layer; none need fit it, nor the host.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape
from jaxtyping import Array, Float, Int
from pydantic import Field

from convert.schema import Count, FiniteOrNull
from jaxprune.costs.program import PhaseCosts, Program, size_of
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.costs.shapes import Shapes
from jaxprune.errors import InputError
from jaxprune.models import Part
from jaxprune.streaming.head import exponentials, in_chunks, kl_divergence, logits, rows_at_a_time
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer


@dataclasses.dataclass(frozen=True)
class TextQuality:
    """How well a model predicts a text.

    Attributes:
        windows: windows, tokens a window.
        perplexity: exp of the mean loss over all tokens but each window's first; inf where it
            overflows, NaN where the model's predictions are.
        ratio: perplexity over the dense model's.
        kl: mean over the same tokens of KL(p‖q) = Σ p (log p − log q) in nats, p the dense model's
            distribution of the next token, q this model's.
        top1: share of the tokens at which both models find the same next token the most probable.
    """

    windows: tuple[Count, Count]
    perplexity: Annotated[FiniteOrNull, Field(gt=0)] = None
    ratio: FiniteOrNull = None
    kl: FiniteOrNull = None
    top1: FiniteOrNull = None


def text_quality(
    models: Sequence[StreamedModel],
    tokens: Int[np.ndarray, "w t"],
    *,
    name: str = "",
    observer: Observer = SILENT,
) -> list[TextQuality]:
    """Measures how well several models predict a text, and compares the others with the first.

    Windows are scored on their own, so windows of another length give another number. The hidden
    states of all models are in host memory together; the device holds one layer at a time.

    Args:
        models: the dense model, then pruned ones.
        tokens: [windows, length] token ids.
        name: the name of the text, for the observer.
        observer: is notified of progress.

    Raises:
        InputError: a model or the tokens cannot be used, or the models differ in vocabulary.
    """
    first, *others = (model.architecture.config.vocab_size for model in models)
    for other in others:
        if first != other:
            raise InputError(
                f"models of {first} and of {other} tokens cannot be compared: give the dense "
                "checkpoint that the pruned one was made from"
            )
    on = f"on {short_name(name)}, {tokens.size:,} tokens"
    states: list[HiddenStates] = []
    for model in models:
        observer.started(f"perplexity of {model.short_name} {on}", model.num_layers)
        states += model.final_states(
            tokens, visit=lambda index, states: observer.layer_visited(index)
        )
    what = "KL divergence from" if len(models) > 1 else "log-likelihoods by"
    observer.started(f"{what} {models[0].short_name} {on}", len(states[0].slices()), "batches")
    return compare(models, states, tokens, observer)


def perplexity(model: StreamedModel, tokens: Int[np.ndarray, "w t"]) -> float:
    """Computes a single model's perplexity; see `text_quality`."""
    found = text_quality([model], tokens)[0].perplexity
    assert found is not None
    return found


def compare(
    models: Sequence[StreamedModel],
    states: Sequence[HiddenStates],
    tokens: Int[np.ndarray, "w t"],
    observer: Observer = SILENT,
) -> list[TextQuality]:
    """Does what `text_quality` does, from the outputs of the last layers."""
    parts = tuple(model.architecture.head for model in models)
    loaded = {model: model.params_of(model.architecture.head) for model in dict.fromkeys(models)}
    heads = tuple(loaded[model] for model in models)
    losses, divergences, agreements = np.zeros((3, len(models)))
    for number, rows in enumerate(states[0].slices()):
        targets = tokens[rows, 1:].reshape(-1).astype(np.int32)
        last = [hidden.read(rows)[:, :-1].reshape(len(targets), -1) for hidden in states]
        if len(models) == 1:
            losses -= (
                models[0].score_tokens(heads[0], last[0], targets).log_prob.sum(dtype=np.float64)
            )
        else:
            found = in_chunks(
                models[0].devices,
                lambda t, *chunk: divergence(parts, heads, chunk, t),
                targets,
                *last,
                models=len(models),
            )
            for total, values in zip((losses, divergences, agreements), found, strict=True):
                total += values.sum(axis=0, dtype=np.float64)
        observer.layer_visited(number)
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    # A model pruned to rubble may have a mean loss whose exponential overflows.
    perplexities = [math.inf if mean >= 700 else math.exp(mean) for mean in losses / count]
    windows = tokens.shape
    first, *others = perplexities
    return [
        TextQuality(windows, first),
        *(
            TextQuality(windows, own, own / first, float(kl / count), float(agreed / count))
            for own, kl, agreed in zip(others, divergences[1:], agreements[1:], strict=True)
        ),
    ]


@partial(jax.jit, static_argnums=0)
def divergence(
    heads: tuple[Part, ...],
    params: tuple[Mapping[str, Array], ...],
    states: tuple[Float[Array, "n _"], ...],
    targets: Int[Array, "n"],
) -> tuple[Float[Array, "n models"], Float[Array, "n models"], Float[Array, "n models"]]:
    """Computes losses, KL divergences from the first model, and whether its most probable token is
    theirs."""
    found = [exponentials(logits(*one)) for one in zip(heads, params, states, strict=True)]
    best = [jnp.argmax(one.scores, axis=1) for one in found]
    losses = [
        one.log_total[:, 0] - jnp.take_along_axis(one.scores, targets[:, None], axis=1)[:, 0]
        for one in found
    ]
    divergences = [kl_divergence(found[0], one) for one in found]
    agreements = [(one == best[0]).astype(jnp.float32) for one in best]
    return jnp.stack(losses, axis=1), jnp.stack(divergences, axis=1), jnp.stack(agreements, axis=1)


def costs(run: RunSizes) -> PhaseCosts:
    """Returns what measuring the dense and the pruned model on all texts costs."""
    layers, states = len(run.architecture.layers), [run.states_bytes(*one) for one in run.texts]
    weights = run.devices.count * (run.dense_bytes + run.stored_bytes("layers."))
    moved = len(run.texts) * weights + 4 * layers * sum(states)
    every = (
        program
        for windows, length in run.texts
        for program in programs(run.pruned, windows, length, run.dense)
    )
    return PhaseCosts(every, 2 * max(states, default=0), {"evaluate": moved} if states else {})


def programs(
    shapes: Shapes, windows: int, length: int, dense: Shapes | None = None
) -> Iterator[Program]:
    """Yields the programs that compare the pruned model with the dense one on a text.

    Args:
        shapes: the shapes of the pruned model.
        windows: the number of windows.
        length: tokens of a window.
        dense: the dense model's shapes; None: the same.
    """
    x = shapes.batch(windows, length)
    for layer, count in (Counter(shapes.layers) + Counter((dense or shapes).layers)).items():
        resident = size_of(shapes.layer_params(layer))
        yield shapes.forward("evaluate", layer, x, count * windows, resident=resident)
    yield comparison("evaluate", shapes, windows * (length - 1))


def comparison(phase: str, shapes: Shapes, tokens: int, models: int = 2, times: int = 1) -> Program:
    """Returns the program that compares predictions.

    Args:
        phase: the phase that it belongs to.
        shapes: the shapes of the models.
        tokens: the number of predictions of each model.
        models: the number of models that are compared, the first one included.
        times: how often all predictions are compared.
    """
    head = shapes.architecture.head
    chunk = rows_at_a_time(tokens, models, shapes.devices.count)
    params, states = shapes.params(head.spec, shapes.stored), shapes.rows(chunk)
    arguments = (params,) * models, (states,) * models, Shape((chunk,), jnp.int32)
    function = partial(divergence, (head,) * models)
    return Program(phase, "divergence", function, arguments, times * tokens / chunk)


def short_name(text: str) -> str:
    """Returns a text's name, or several; of a file the last two parts of its path."""
    return ",".join(map(_short_path, text.split(",")))


def _short_path(text: str) -> str:
    path = Path(text)
    named = path if ":" in path.name or not path.name else path.with_suffix("")  # a weight stays
    return "/".join(named.parts[-2:]) or text
