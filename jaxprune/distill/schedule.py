"""The schedule of a tuning: number and size of its steps, measurements and prunings."""

import dataclasses
import math
from collections.abc import Sequence

from jaxprune import hardware
from jaxprune.errors import Change, InputError
from jaxprune.recipe_parts import Tuning

MEASURES = 16
"""Maximum number of divergence measurements on held-out windows, after the one before the first
step."""
BETWEEN = 5
"""Minimum number of tuned tokens between two measurements, relative to the held-out tokens. Per
token a measurement takes a quarter of a step's time, so measurements take about a twentieth of the
time, or more if the text is short."""
PRUNINGS = 8
"""Maximum number of times that gradual pruning adds zeros."""
PRUNING = 0.6
"""Fraction of the steps, from the first, during which gradual pruning adds zeros."""
DENSE_BYTES = 2**31
"""Maximum size of the dense model's hidden states that are kept at a time: 128 windows of 2048
tokens of LLaMA-7B in 16 bits."""


def all_zeros_there(tuning: Tuning, tokens: int) -> bool:
    """Returns whether gradual pruning is complete after `tokens` tokens, to within a step."""
    gradual = tuning.tune_gradual and tuning.tune_tokens
    return not gradual or tokens / tuning.tune_tokens >= PRUNING


@dataclasses.dataclass(frozen=True)
class TuningSteps:
    """The steps of a tuning.

    Attributes:
        count: the number of steps.
        windows: windows, or chunks of windows, per step.
        length: tokens of a window or chunk.
        different: number of distinct windows that are visited.
        measured: the numbers of the steps, from 1, after which the divergence on held-out windows
            is measured. The last step is one of them. Empty without held-out windows.
        prunings: the numbers of the steps after which gradual pruning adds zeros; see
            `gradual_pruning`. Empty without gradual pruning.
    """

    count: int
    windows: int
    length: int
    different: int
    measured: Sequence[int]
    prunings: Sequence[int] = ()

    @classmethod
    def of(cls, tuning: Tuning, windows: int, length: int, held_out: int = 0) -> "TuningSteps":
        """Computes the steps of a tuning.

        Args:
            tuning: how to tune.
            windows: the number of calibration windows.
            length: tokens of a window.
            held_out: tokens of all held-out windows.

        Raises:
            InputError: a step takes more tokens than the tuning, or a chunk would have one token.
        """
        chunks, length = tuning.chunks(windows, length)
        if tuning.tune_tokens:
            each = tuning.tune_windows
            if each * length > tuning.tune_tokens:
                raise InputError(
                    f"a tuning step takes {each * length:,} tokens, more than the "
                    f"{tuning.tune_tokens:,} of the whole tuning",
                    options={"tune_tokens": Change.RAISE, "tune_windows": Change.LOWER},
                )
            count = max(1, round(tuning.tune_tokens / (each * length)))
            different = count * each
        else:
            each = min(tuning.tune_windows, chunks)
            count = max(1, round(tuning.tune_epochs * chunks / each)) if tuning.tunes else 0
            different = min(count * each, chunks)
        measures = (
            min(MEASURES, max(2, count * each * length // (BETWEEN * held_out))) if held_out else 0
        )
        pruning = min(count, max(1, round(PRUNING * count))) if tuning.tune_gradual else 0
        prunings = _parts(pruning, PRUNINGS if pruning else 0)
        return cls(count, each, length, different, _parts(count, measures), prunings)

    @property
    def shape(self) -> tuple[int, int]:
        """(windows of a step, tokens of a window)."""
        return self.windows, self.length

    @property
    def last_pruning(self) -> int:
        """The number of the last step that adds zeros; 0: none does."""
        return self.prunings[-1] if self.prunings else 0

    @property
    def measured_early(self) -> int:
        """Number of measurements between the first step and the last pruning."""
        return sum(number < self.last_pruning for number in self.measured)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.windows * self.length

    def together(self, state_bytes: int, batch_tokens: int | None = None) -> int:
        """Returns for how many steps the dense model's hidden states are computed together.

        Groups start at the first step, also in a resumed run, because the shape of a product
        decides how it is rounded. A group of a stream lasts about as long as the interval between
        two measurements, so a resumed run recomputes little.

        Args:
            state_bytes: bytes of a token's hidden state.
            batch_tokens: tokens that a layer takes at a time; None: the device's default.
        """
        most = DENSE_BYTES // (self.length * state_bytes)
        if not self.measured and self.different <= most:
            return max(1, self.count)
        batch = max(1, (batch_tokens or hardware.current().tokens_per_batch) // self.length)
        whole = batch // math.gcd(batch, self.windows)  # steps whose windows form whole batches
        steps = max(1, most // self.windows)
        steps = steps // whole * whole or steps
        if self.measured:
            between = math.ceil(self.count / len(self.measured))
            steps = min(steps, between if between < whole else math.ceil(between / whole) * whole)
        return steps

    def groups(self, state_bytes: int, batch_tokens: int | None = None) -> list[int]:
        """Returns the maximum number of windows of each group of steps; see `together`."""
        steps = self.together(state_bytes, batch_tokens)
        sizes = [min(steps, self.count - begin) for begin in range(0, self.count, steps)]
        return [min(size * self.windows, self.different) for size in sizes]


def _parts(count: int, parts: int) -> Sequence[int]:
    """Splits the numbers 1 to `count` into about equal parts, and returns the last number of each.

    There are fewer than `parts` parts if there are fewer numbers.
    """
    return sorted({math.ceil(count * (number + 1) / parts) for number in range(parts)})
