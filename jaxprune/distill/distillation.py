r"""Distillation: tunes the kept weights end to end towards the dense model's predictions.

Pruning preserves the output of each linear layer separately, and the remaining error grows with
depth. Distillation tunes the kept weights of all linear layers together with Adafactor. It
minimizes the mean over tokens of text of

    KL(p‖q) = Σ_v p_v (log p_v − log q_v),

where p and q are the next-token distributions of the dense and of the pruned model. Norms,
embedding, head and zeros are fixed. Gradual pruning may add a part of the zeros over the first
steps: see `gradual_pruning`. The text is that of the calibration windows, or a separate stream.
Some windows of a stream are held out. The result is the step with the lowest divergence on them,
among the steps after the last pruning.

References:
    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), for the loss.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import optax
from jaxtyping import Float, Int

from jaxprune.calibration.text_stream import TextStream
from jaxprune.distill import saved_tuning
from jaxprune.distill.gradual_pruning import GradualPruning
from jaxprune.distill.held_out import HeldOut
from jaxprune.distill.placement import placement_of
from jaxprune.distill.saved_tuning import Progress
from jaxprune.distill.schedule import TuningSteps
from jaxprune.distill.student import Student, require_finite
from jaxprune.errors import InputError
from jaxprune.recipe_parts import Tuning
from jaxprune.run_store.context import NO_STORE, Context
from jaxprune.solve.layer_result import LayerResult
from jaxprune.solve.rules import TargetOf
from jaxprune.streaming.model import StreamedModel

log = logging.getLogger(__name__)
FAR = 0.75
"""Divergence from the dense model, in nats, from which the learning rate is the highest."""
FIRST = 2048
"""Tokens of the first steps, whose divergence scales the learning rate."""


class Text(NamedTuple):
    """The text to tune on.

    Attributes:
        steps: the number of steps and their size.
        batches: number of completed steps -> windows of each later step.
        held_out: windows for evaluation only; None: there are none.
    """

    steps: TuningSteps
    batches: Callable[[int], Iterator[Int[np.ndarray, "b t"]]]
    held_out: Int[np.ndarray, "h t"] | None


def of_windows(tokens: Int[np.ndarray, "w t"], tuning: Tuning, seed: int) -> Text:
    """Returns the calibration windows as text to tune on.

    Each epoch visits all windows in a random order. The last epoch may be incomplete.
    """
    steps = TuningSteps.of(tuning, *tokens.shape)
    tokens, visits = _chunks(tokens, tuning), steps.count * steps.windows
    generator = np.random.default_rng(seed)
    epochs = [generator.permutation(len(tokens)) for _ in range(math.ceil(visits / len(tokens)))]
    rows = np.concatenate(epochs)[:visits].reshape(steps.count, steps.windows)
    return Text(steps, lambda begin: (tokens[chosen] for chosen in rows[begin:]), None)


def of_stream(stream: TextStream, tuning: Tuning) -> Text:
    """Returns a stream as text to tune on."""
    steps = TuningSteps.of(tuning, 1, stream.length, stream.held_out.size)
    if stream.tokens < steps.count * steps.tokens:
        log.warning(
            "the text to tune on has about %s tokens that are not held out, and the tuning takes "
            "%s: it reads the text %.1f times (more text would improve the result)",
            f"{stream.tokens:,}",
            f"{steps.count * steps.tokens:,}",
            steps.count * steps.tokens / max(1, stream.tokens),
        )
    count, (each, _) = steps.windows, tuning.chunks(1, stream.length)

    def batches(begin: int) -> Iterator[np.ndarray]:
        windows = stream.windows(begin * count // each)
        chunks = chain.from_iterable(_chunks(window[None], tuning) for window in windows)
        rest = islice(chunks, begin * count % each, None)
        for _ in range(begin, steps.count):
            yield np.stack(list(islice(rest, count)))

    return Text(steps, batches, stream.held_out if len(stream.held_out) else None)


def _chunks(tokens: Int[np.ndarray, "w t"], tuning: Tuning) -> Int[np.ndarray, "p s"]:
    """Cuts windows into chunks and drops the remainder of each window."""
    chunks, length = tuning.chunks(*tokens.shape)
    return tokens[:, : chunks // len(tokens) * length].reshape(chunks, length)


def distill(
    model: StreamedModel,
    text: Text,
    layers: Iterable[LayerResult],
    tuning: Tuning,
    *,
    target_of: TargetOf | None = None,
    context: Context = NO_STORE,
) -> Iterator[LayerResult]:
    """Tunes pruned layers.

    Masks and statistics stay as the solves made them, unless gradual pruning changes them.

    Args:
        model: the dense model that was pruned. Its `teacher` makes the target predictions.
        text: the text to tune on.
        layers: all layers, as `loop.prune_layers` yields them. Each is released once its kernels
            are copied.
        tuning: how to tune.
        target_of: (layer index, path of the linear layer) -> pattern; required for gradual pruning.
        context: its store saves the state periodically. Its observer is notified of each step and
            of each divergence on held-out windows.

    Raises:
        InputError: the loss or a final kernel is not finite, or gradual pruning has no pattern.
    """
    steps, teacher, observer = text.steps, model.teacher, context.observer
    gradual, devices = None, model.devices.count
    placement = placement_of(
        model.architecture,
        steps.shape,
        devices,
        gradual=bool(steps.prunings),
        teacher=teacher.architecture,
    )
    if steps.prunings:
        if target_of is None:
            raise InputError(
                "gradual pruning needs patterns: pass target_of", options={"tune_gradual": 0}
            )
        gradual = GradualPruning(target_of, steps.prunings)
    student = Student(model, layers, placement, gradual)
    rate = Rate(tuning.tune_rate, steps.count, steps.tokens)
    all_there = steps.last_pruning * steps.tokens
    held_out = HeldOut(teacher, text.held_out, all_there) if text.held_out is not None else None
    observer.started("tuning", steps.count, "steps")
    begin = _begun(context, student, rate, held_out)
    for number, (tokens, dense) in enumerate(_with_dense(teacher, text, begin), begin + 1):
        divergence = student.step(tokens, dense, number, partial(rate.of, number))
        observer.step_done(number, steps.count, divergence)
        if held_out and number in steps.measured:
            seen = number * steps.tokens
            observer.divergence_measured(seen, held_out.measure(student, seen))
            if not (tuning.tune_to_end or held_out.falls):
                break
        measured = (held_out.curve, held_out.best) if held_out else ([], None)
        saved_tuning.save(context.store, student.state, Progress(number, rate.before, *measured))
        del measured  # frees the best kernels once `held_out` replaces them
    saved_tuning.save_curve(context.store, held_out.curve if held_out else [])
    best = held_out.best if held_out else None
    require_finite(best or (kernels.values for kernels in student.state))
    for index in range(model.num_layers):
        yield student.result(index, best[index] if best else student.stored(index))


def _begun(context: Context, student: Student, rate: "Rate", held_out: HeldOut | None) -> int:
    """Restores a saved tuning, or measures the divergence before the first step.

    Returns:
        The number of completed steps.
    """
    observer = context.observer
    saved = saved_tuning.restore(context.store, student.state, student.restore)
    if saved:
        observer.tuning_resumed(saved.step)
        rate.before = saved.before
    if held_out and saved:
        held_out.curve, held_out.best = saved.curve, saved.best
        for point in saved.curve:
            observer.divergence_measured(*point)
    elif held_out:
        observer.divergence_measured(0, held_out.measure(student, 0))
    return saved.step if saved else 0


class Rate:
    """The learning rate: linear warmup over the first eighth of the steps, then cosine decay.

    The peak is `rate` if the pruned model starts at a divergence of `FAR` or more. It is
    proportionally lower if the divergence is smaller, because a model that is closer overshoots
    soon.

    Args:
        rate: the highest peak.
        steps: the number of steps.
        tokens: tokens of a step.

    Attributes:
        before: the mean divergence of the first steps so far, in nats.
    """

    def __init__(self, rate: float, steps: int, tokens: int) -> None:
        rising = math.ceil(steps / 8)
        self._of_steps = optax.warmup_cosine_decay_schedule(
            rate / 10, rate, min(rising, steps - 1), steps, rate / 20
        )
        self._first = min(rising, math.ceil(FIRST / tokens))
        self.before = 0.0

    def of(self, number: int, divergence: float) -> float:
        """Returns the learning rate of a step from its number, from 1, and its divergence."""
        if number <= self._first:
            self.before += (divergence - self.before) / number
        return float(self._of_steps(number - 1)) * min(1.0, self.before / FAR)


def _with_dense(
    model: StreamedModel, text: Text, begin: int
) -> Iterator[tuple[Int[np.ndarray, "b t"], Float[np.ndarray, "b t d"]]]:
    """Yields the windows of each remaining step with the dense model's last hidden states.

    The states are computed for groups of steps; see `TuningSteps.together`. Equal windows of a
    group are computed once.
    """
    together = text.steps.together(model.architecture.state_bytes)
    first = begin // together * together
    batches = text.batches(first) if begin < text.steps.count else iter(())
    while group := list(islice(batches, together)):
        numbers: dict[bytes, int] = {}
        chosen = [
            [numbers.setdefault(window.tobytes(), len(numbers)) for window in batch]
            for batch in group
        ]
        windows = np.stack([np.frombuffer(window, group[0].dtype) for window in numbers])
        (dense,) = model.final_states(windows)
        for rows in chosen[max(0, begin - first) :]:
            yield windows[rows], dense.read(np.array(rows))
        first += together
        del dense  # frees memory before the next group
