"""The parts of a recipe, as plain data: importance, tuning, experts, rules by name."""

import dataclasses
import fnmatch
import math
from collections.abc import Collection
from typing import Any

from convert.schema import OWN
from jaxprune.errors import Change, InputError
from jaxprune.sparsity.patterns import NM, Given, OwnPattern, RecipePattern, Unstructured


@dataclasses.dataclass(frozen=True)
class Importance:
    """What a reverse pass of the dense model decides."""

    __pydantic_config__ = OWN
    token_power: float = 0.0
    """Weigh each token in a linear layer's Gram matrix by the squared gradient of the loss by the
    layer's outputs, to this power; 0 weighs all the same."""
    weigh_outputs: bool = False
    """Weigh each output of a linear layer by the squared gradient of the loss, so that masks over a
    whole kernel go where the loss is sensitive."""
    spread: float = 0.0
    """Give every linear layer a sparsity of its own, by one threshold over the whole model, this
    far at most from the one asked for, which holds in total."""
    sensitivity_windows: int | None = None
    """Take the gradients from so many of the calibration windows, evenly spaced, instead of all,
    which --token-power needs."""

    def __post_init__(self) -> None:
        if self.sensitivity_windows is not None and self.sensitivity_windows < 1:
            raise InputError(
                f"sensitivity_windows must be at least 1, not {self.sensitivity_windows}"
            )
        if self.token_power and self.sensitivity_windows:
            raise InputError(
                "tokens can be weighed only by the gradients of all windows",
                options={"sensitivity_windows": Change.OMIT},
            )
        if not 0 <= self.token_power < math.inf:
            raise InputError(f"token_power must be finite and not negative, not {self.token_power}")
        if not 0 <= self.spread < 1:
            raise InputError(f"spread must be at least 0 and below 1, not {self.spread}")

    @property
    def weighs(self) -> bool:
        """Whether tokens or outputs are weighed."""
        return self.token_power > 0 or self.weigh_outputs

    def windows_of(self, count: int) -> int:
        """Returns how many of so many calibration windows the gradients are taken from."""
        return min(self.sensitivity_windows or count, count)

    @property
    def measured(self) -> bool:
        """Whether a reverse pass is needed."""
        return self.weighs or self.spread > 0

    def without(self, names: Collection[str]) -> "Importance":
        """Returns the same with these fields deciding nothing; the default where no reverse pass is
        then needed."""
        rest = dataclasses.replace(self, **_defaults(Importance, names))
        return rest if rest.measured else Importance()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Distillation: the kept weights tuned together at the end."""

    __pydantic_config__ = OWN
    tune_epochs: float = 0.0
    """Tune the kept weights of all layers together at the end, towards the dense model's
    predictions, visiting each calibration window so many times; half an epoch visits half of them,
    or of their pieces."""
    tune_rate: float = 0.001
    """The highest learning rate, in units of the root mean square of a kernel's kept weights, where
    the tuning begins 0.75 nats of KL divergence from the dense model or more; where it begins
    nearer, in proportion less. The rate rises over the first eighth of the steps and then falls
    along a cosine."""
    tune_windows: int = 1
    """How many windows a step takes; with --tune-pieces, how many pieces."""
    tune_pieces: int = 1
    """Cut each window that is tuned on into so many pieces, for as many times more steps on as much
    text. Four pieces take about 1.35 times as long in all; where weights do not fit the device and
    come from the host, nearly four."""
    tune_tokens: int = 0
    """Tune on so many tokens of the calibration text instead, such as 250k or 1M: all of it in an
    order drawn from the seed, but for 16 windows, of long ones fewer, on which the divergence is
    measured."""
    tune_zeros: float = 0.0
    """Leave this share of the sparsity above one half to the tuning: at 90 % a quarter, 0.25, is 10
    %, so that the solves prune to 80 %. The other zeros come in up to eight rounds during the first
    60 % of the steps, fewer each time, where the loss is least sensitive by then (0: the solves
    make all, as for N:M and for linear layers to which --rule gives a pattern)."""
    tune_to_end: bool = False
    """Tune on all --tune-tokens, also when the divergence on the windows that are held out no
    longer falls."""

    def __post_init__(self) -> None:
        if not 0 <= self.tune_epochs < math.inf:
            raise InputError(f"tune_epochs must be finite and not negative, not {self.tune_epochs}")
        if self.tune_tokens < 0:
            raise InputError(f"tune_tokens must not be negative, not {self.tune_tokens}")
        if self.tune_epochs and self.tune_tokens:
            raise InputError(
                "a tuning takes the calibration windows or tokens of a text, not both",
                options={"tune_epochs": 0, "tune_tokens": Change.OMIT},
            )
        if not 0 < self.tune_rate <= 1:
            raise InputError(f"tune_rate must be above 0 and at most 1, not {self.tune_rate}")
        if not 0 <= self.tune_zeros <= 1:
            raise InputError(f"tune_zeros must be at least 0 and at most 1, not {self.tune_zeros}")
        if self.tune_windows < 1:
            raise InputError(f"tune_windows must be at least 1, not {self.tune_windows}")
        if self.tune_pieces < 1:
            raise InputError(f"tune_pieces must be at least 1, not {self.tune_pieces}")

    def without(self, names: Collection[str]) -> "Tuning":
        """Returns the same with these fields deciding nothing."""
        return dataclasses.replace(self, **_defaults(Tuning, names))

    @property
    def tunes(self) -> bool:
        """Whether anything is tuned."""
        return self.tune_epochs > 0 or self.tune_tokens > 0

    def pieces(self, windows: int, length: int) -> tuple[int, int]:
        """Returns how many pieces windows of a length are cut into, and the length of a piece.

        Raises:
            InputError: a piece would have one token.
        """
        each = self.tune_pieces if self.tunes else 1
        if each > 1 and length // each < 2:
            raise InputError(
                f"windows of {length} tokens cannot be cut into {each} pieces of at least two",
                options={"tune_pieces": Change.LOWER, "seqlen": Change.RAISE},
            )
        return windows * each, length // each


def late_sparsity(tuning: Tuning, pattern: RecipePattern) -> float:
    """Returns the sparsity that the solves leave to the tuning; see `Tuning.tune_zeros`.

    Args:
        tuning: how it is done.
        pattern: that of the linear layers.
    """
    if not isinstance(pattern, Unstructured) or not tuning.tunes:
        return 0.0
    return tuning.tune_zeros * max(0.0, pattern.sparsity - 0.5)


def effective_tuning(tuning: Tuning, pattern: RecipePattern) -> Tuning:
    """Returns a tuning, with no late zeros where the solves make all."""
    return tuning if late_sparsity(tuning, pattern) else tuning.without(["tune_zeros"])


HOW_TUNED = tuple(name for name in vars(Tuning()) if name not in ("tune_epochs", "tune_tokens"))
"""The fields of `Tuning` that matter only where something is tuned."""


@dataclasses.dataclass(frozen=True)
class Experts:
    """What is done to a model's experts beside pruning their linear layers."""

    __pydantic_config__ = OWN
    drop_experts: float = 0.0
    """Before anything else, drop this share of the experts of every layer: those of least saliency,
    which is the mean over an expert's tokens of its share in the output times the norm of its own
    output (REAP)."""
    route_all: bool = False
    """In calibration, let every token pass every expert, weighed by what the router would give it;
    otherwise an expert sees only the tokens that are routed to it."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_experts < 1:
            raise InputError(
                f"drop_experts must be at least 0 and below 1, not {self.drop_experts}"
            )


def _defaults(part: type[Importance | Tuning], names: Collection[str]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(part) if field.name in names}


def without_effect(pattern: RecipePattern) -> dict[str, str]:
    """Returns the fields of `Importance` and `Tuning` that change nothing under a pattern, with the
    reason."""
    if isinstance(pattern, Given):
        return dict.fromkeys(
            ("spread", "weigh_outputs", "tune_zeros"), "the given masks decide which weights stay"
        )
    if isinstance(pattern, NM):
        return {
            "spread": f"pattern {pattern} is the same for every linear layer",
            "tune_zeros": f"pattern {pattern} has all its zeros from the solves",
        }
    if pattern.per_output:
        return dict.fromkeys(
            ("spread", "weigh_outputs"), "per-output patterns compare within each output only"
        )
    return {}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern of their own for some linear layers.

    Attributes:
        names: which, as a shell pattern of names such as layers.3.mlp.down_proj: `*.q_proj`,
            `layers.2[0-9].*`.
        pattern: theirs; None: they stay dense.
    """

    names: str
    pattern: OwnPattern | None = None
    __pydantic_config__ = OWN

    def matches(self, index: int, path: str) -> bool:
        """Returns whether it names a linear layer, given by its decoder layer's index and its path
        there."""
        return fnmatch.fnmatchcase(f"layers.{index}.{path}", self.names)

    def __str__(self) -> str:
        return f"{self.names} {self.pattern or 'dense'}"
