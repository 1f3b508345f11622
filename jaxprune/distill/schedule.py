"""The steps of a tuning, in numbers: what it takes at a time, and when it looks at what is held
out."""

import dataclasses
import math
from collections.abc import Sequence

from jaxprune import hardware
from jaxprune.errors import Change, InputError
from jaxprune.recipe_parts import Tuning

MEASURES = 16
"""How often the divergence on held-out windows is measured at most, after the first time, before
the first step."""
BETWEEN = 5
"""What is tuned on between two measures, at least, in tokens over those of the windows that are
held out: a measure takes a quarter of a step's time a token, so all take about a twentieth, more
where the text is short."""
PRUNINGS = 8
"""How often late zeros come, at most."""
PRUNING = 0.6
"""Over this share of the steps, from the first on, they come."""
DENSE_BYTES = 2**31
"""The most of the dense model's hidden states that are kept at a time: of LLaMA-7B those of 128
windows of 2048 tokens in 16 bits."""


def all_zeros_there(tuning: Tuning, tokens: int) -> bool:
    """Returns whether all zeros are there, to within a step, after so many tokens of a stream."""
    late = tuning.tune_zeros and tuning.tune_tokens
    return not late or tokens / tuning.tune_tokens >= PRUNING


@dataclasses.dataclass(frozen=True)
class TuningSteps:
    """The steps of a tuning.

    Attributes:
        count: how many there are.
        windows: of a step, or pieces of windows.
        length: tokens of one.
        different: how many of those are visited, each counted once.
        measured: the numbers of the steps, from 1, after which the divergence on held-out windows
            is measured; the last is one of them. Empty where nothing is held out.
        prunings: those after which late zeros come; see `late_zeros`. Empty where the solves made
            all.
    """

    count: int
    windows: int
    length: int
    different: int
    measured: Sequence[int]
    prunings: Sequence[int] = ()

    @classmethod
    def of(cls, tuning: Tuning, windows: int, length: int, held_out: int = 0) -> "TuningSteps":
        """Counts the steps of a tuning.

        Args:
            tuning: how it is done.
            windows: the number of calibration windows.
            length: tokens of a window.
            held_out: tokens of the windows that are held out.

        Raises:
            InputError: a step takes more tokens than there are to be; a piece would have one token.
        """
        pieces, length = tuning.pieces(windows, length)
        if tuning.tune_tokens:
            each = tuning.tune_windows
            if each * length > tuning.tune_tokens:
                raise InputError(
                    f"a step of the tuning takes {each * length:,} tokens, more than the "
                    f"{tuning.tune_tokens:,} of all",
                    options={"tune_tokens": Change.RAISE, "tune_windows": Change.LOWER},
                )
            count = max(1, round(tuning.tune_tokens / (each * length)))
            different = count * each
        else:
            each = min(tuning.tune_windows, pieces)
            count = max(1, round(tuning.tune_epochs * pieces / each)) if tuning.tunes else 0
            different = min(count * each, pieces)
        measures = (
            min(MEASURES, max(2, count * each * length // (BETWEEN * held_out))) if held_out else 0
        )
        pruning = min(count, max(1, round(PRUNING * count))) if tuning.tune_zeros else 0
        prunings = _parts(pruning, PRUNINGS if pruning else 0)
        return cls(count, each, length, different, _parts(count, measures), prunings)

    @property
    def shape(self) -> tuple[int, int]:
        """Windows of a step, and tokens of one."""
        return self.windows, self.length

    @property
    def last_pruning(self) -> int:
        """The number of the step after which no more zeros come; 0: none do."""
        return self.prunings[-1] if self.prunings else 0

    @property
    def measured_early(self) -> int:
        """How many measures are taken between the first step and the last zeros."""
        return sum(number < self.last_pruning for number in self.measured)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.windows * self.length

    def together(self, state_bytes: int, batch_tokens: int | None = None) -> int:
        """Returns of how many steps, from the first on, the dense model's hidden states are
        computed together.

        A run that goes on computes them in the same groups, for the shape of a product decides how
        it is rounded. Of a stream a group lasts about as long as from one measure to the next, so
        that a run that goes on computes little again.

        Args:
            state_bytes: of a token's hidden state.
            batch_tokens: tokens that a layer takes at a time; None: as this machine's device does.
        """
        most = DENSE_BYTES // (self.length * state_bytes)
        if not self.measured and self.different <= most:
            return max(1, self.count)
        batch = max(1, (batch_tokens or hardware.current().tokens_per_batch) // self.length)
        whole = batch // math.gcd(batch, self.windows)  # steps whose windows make whole batches
        steps = max(1, most // self.windows)
        steps = steps // whole * whole or steps
        if self.measured:
            between = math.ceil(self.count / len(self.measured))
            steps = min(steps, between if between < whole else math.ceil(between / whole) * whole)
        return steps

    def groups(self, state_bytes: int, batch_tokens: int | None = None) -> list[int]:
        """Returns of how many windows, at most, those hidden states are computed for each such
        group; see `together`."""
        steps = self.together(state_bytes, batch_tokens)
        sizes = [min(steps, self.count - begin) for begin in range(0, self.count, steps)]
        return [min(size * self.windows, self.different) for size in sizes]


def _parts(count: int, parts: int) -> Sequence[int]:
    """Returns the last number of each of so many parts, about equal, of the numbers from 1; fewer
    where there are fewer."""
    return sorted({math.ceil(count * (number + 1) / parts) for number in range(parts)})
