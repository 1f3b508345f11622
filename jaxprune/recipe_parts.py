"""The parts of a recipe, as plain data: importance, tuning, structure, and rules by layer name."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Collection, Iterable
from typing import Any

from convert.schema import OWN
from jaxprune.errors import Change, InputError
from jaxprune.sparsity.patterns import NM, Given, OwnPattern, RecipePattern, Unstructured, percent


@dataclasses.dataclass(frozen=True)
class Importance:
    """Weights and sparsities that a reverse pass of the dense model determines."""

    __pydantic_config__ = OWN
    token_power: float = 0.0
    """Weigh each token in a layer's Gram matrix by the squared gradient of the loss with respect to
    the layer's outputs, to this power. 0 weighs all tokens equally."""
    weigh_outputs: bool = False
    """Weigh each output of a linear layer by the squared gradient of the loss. Patterns that
    compare weights over a whole kernel then keep more weights where the loss is sensitive."""
    max_deviation: float = 0.0
    """Give every linear layer its own sparsity, by one threshold for the whole model. This is the
    largest deviation of a layer from the sparsity asked for; the total sparsity stays the same."""
    sensitivity_windows: int | None = None
    """Compute the gradients on this many calibration windows, evenly spaced, instead of all.
    --token-power needs all windows."""

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
        if not 0 <= self.max_deviation < 1:
            raise InputError(
                f"max_deviation must be at least 0 and below 1, not {self.max_deviation}"
            )

    @property
    def weighs(self) -> bool:
        """Whether tokens or outputs are weighed."""
        return self.token_power > 0 or self.weigh_outputs

    def windows_of(self, count: int) -> int:
        """Returns how many of `count` calibration windows the gradients are computed on."""
        return min(self.sensitivity_windows or count, count)

    @property
    def measured(self) -> bool:
        """Whether a reverse pass is needed."""
        return self.weighs or self.max_deviation > 0

    def without(self, names: Collection[str]) -> "Importance":
        """Returns a copy with these fields at their defaults; all fields, if no reverse pass is
        then needed."""
        rest = dataclasses.replace(self, **_defaults(Importance, names))
        return rest if rest.measured else Importance()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tuning of all kept weights together after pruning, by distillation from the dense model."""

    __pydantic_config__ = OWN
    tune_epochs: float = 0.0
    """Tune the kept weights of all layers together after pruning, towards the dense model's
    predictions. This is the number of passes over the calibration windows; 0.5 uses half of the
    windows, or of their chunks."""
    tune_rate: float = 0.001
    """Peak learning rate, relative to the root mean square of a kernel's kept weights. It is
    reduced in proportion if the KL divergence from the dense model starts below 0.75 nats. The rate
    rises over the first eighth of the steps and then follows a cosine down."""
    tune_windows: int = 1
    """Number of windows per step; with --tune-chunks, number of chunks."""
    tune_chunks: int = 1
    """Cut each tuning window into this many chunks: more steps on the same text. Four chunks take
    about 1.35 times as long, or nearly 4 times if the weights do not fit on the device and are
    copied from the host."""
    tune_tokens: int = 0
    """Tune on this many tokens of the calibration text, such as 250k or 1M, instead of the
    calibration windows. The order is random by the seed. 16 windows (fewer if they are long) are
    held out to measure the divergence."""
    tune_gradual: float = 0.0
    """Gradual pruning: leave this fraction of the sparsity above one half to the tuning. At 90 %
    sparsity, 0.25 leaves 10 %, and the layers are first pruned to 80 %. The remaining zeros are
    made in up to eight rounds during the first 60 % of the steps, fewer each round, where the loss
    is then least sensitive. It has no effect on N:M patterns and on layers with a pattern from
    --rule."""
    tune_to_end: bool = False
    """Tune on all --tune-tokens, even if the divergence on the held-out windows stops falling."""

    def __post_init__(self) -> None:
        if not 0 <= self.tune_epochs < math.inf:
            raise InputError(f"tune_epochs must be finite and not negative, not {self.tune_epochs}")
        if self.tune_tokens < 0:
            raise InputError(f"tune_tokens must not be negative, not {self.tune_tokens}")
        if self.tune_epochs and self.tune_tokens:
            raise InputError(
                "tuning uses either the calibration windows or tokens of a text, not both",
                options={"tune_epochs": 0, "tune_tokens": Change.OMIT},
            )
        if not 0 < self.tune_rate <= 1:
            raise InputError(f"tune_rate must be above 0 and at most 1, not {self.tune_rate}")
        if not 0 <= self.tune_gradual <= 1:
            raise InputError(
                f"tune_gradual must be at least 0 and at most 1, not {self.tune_gradual}"
            )
        if self.tune_windows < 1:
            raise InputError(f"tune_windows must be at least 1, not {self.tune_windows}")
        if self.tune_chunks < 1:
            raise InputError(f"tune_chunks must be at least 1, not {self.tune_chunks}")

    def without(self, names: Collection[str]) -> "Tuning":
        """Returns a copy with these fields at their defaults."""
        return dataclasses.replace(self, **_defaults(Tuning, names))

    @property
    def tunes(self) -> bool:
        """Whether anything is tuned."""
        return self.tune_epochs > 0 or self.tune_tokens > 0

    def chunks(self, windows: int, length: int) -> tuple[int, int]:
        """Returns the number of chunks that windows are cut into, and the length of a chunk.

        Args:
            windows: the number of windows.
            length: the tokens of a window.

        Raises:
            InputError: a chunk would have one token.
        """
        each = self.tune_chunks if self.tunes else 1
        if each > 1 and length // each < 2:
            raise InputError(
                f"windows of {length} tokens cannot be cut into {each} chunks of at least two",
                options={"tune_chunks": Change.LOWER, "seqlen": Change.RAISE},
            )
        return windows * each, length // each


def gradual_sparsity(tuning: Tuning, pattern: RecipePattern) -> float:
    """Returns the sparsity that is left to gradual pruning; see `Tuning.tune_gradual`.

    Args:
        tuning: the tuning.
        pattern: the pattern of the linear layers.
    """
    if not isinstance(pattern, Unstructured) or not tuning.tunes:
        return 0.0
    return tuning.tune_gradual * max(0.0, pattern.sparsity - 0.5)


def effective_tuning(tuning: Tuning, pattern: RecipePattern) -> Tuning:
    """Returns a tuning, without gradual pruning if the pattern does not allow it."""
    return tuning if gradual_sparsity(tuning, pattern) else tuning.without(["tune_gradual"])


HOW_TUNED = tuple(name for name in vars(Tuning()) if name not in ("tune_epochs", "tune_tokens"))
"""The fields of `Tuning` that have an effect only if something is tuned."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """Whole parts of the model that are removed before pruning. What remains is an ordinary smaller
    checkpoint of the same family."""

    __pydantic_config__ = OWN
    drop_layers: int | str = 0
    """Remove whole decoder layers. A number removes those without which the model's predictions
    change least. Names such as layers.4,layers.7 remove these."""
    drop_experts: float = 0.0
    """Remove this fraction of the experts of every layer, those of least saliency (REAP). The
    saliency of an expert is the mean over its tokens of its routing weight times the norm of its
    output."""
    drop_heads: float = 0.0
    """Remove this fraction of the attention heads of every layer: key-value heads with all their
    query heads. The number is rounded to the nearest integer; at least one stays and one goes."""
    drop_channels: float = 0.0
    """Remove this fraction of the channels of every feed-forward network. The number that stays is
    rounded to a multiple of --channel-multiple."""
    drop_parameters: float = 0.0
    """Remove at least this fraction of the decoder layers' parameters. The run tries several mixes
    of layers, heads and channels, and takes the one with the smallest KL divergence from the dense
    model."""
    channel_multiple: int = 64
    """The number of channels that stay is a multiple of this. GGUF's q4_0 and q8_0 need 32, its
    q4_k 256."""

    def __post_init__(self) -> None:
        for kind, share in [*self.shares.items(), ("parameters", self.drop_parameters)]:
            if not 0 <= share < 1:
                raise InputError(f"drop_{kind} must be at least 0 and below 1, not {share}")
        if self.channel_multiple < 1:
            raise InputError(f"channel_multiple must be at least 1, not {self.channel_multiple}")
        if isinstance(self.drop_layers, str):
            names = self.drop_layers.split(",")
            if not all(re.fullmatch(r"layers\.(0|[1-9][0-9]{0,8})", name) for name in names):
                raise InputError(
                    "drop_layers must be a number of layers, or names such as layers.4,layers.7, "
                    f"not {self.drop_layers!r}"
                )
            if len({*names}) < len(names):
                raise InputError(f"drop_layers names a layer twice: {self.drop_layers}")
        elif self.drop_layers < 0:
            raise InputError(f"drop_layers must not be negative, not {self.drop_layers}")
        if self.drop_parameters and len(self.removed) > 1:
            raise InputError(
                "drop_parameters chooses what is removed, so nothing else can be named",
                options={"drop_parameters": Change.OMIT},
            )

    @property
    def shares(self) -> dict[str, float]:
        """Kind of parts of a layer -> the fraction of them that is removed."""
        return {
            "experts": self.drop_experts,
            "heads": self.drop_heads,
            "channels": self.drop_channels,
        }

    @property
    def named_layers(self) -> list[int]:
        """The indices of the layers that are named to be removed, in order."""
        if not isinstance(self.drop_layers, str):
            return []
        return sorted(int(name.partition(".")[2]) for name in self.drop_layers.split(","))

    @property
    def layer_count(self) -> int:
        """The number of layers that are removed."""
        return len(self.named_layers) if isinstance(self.drop_layers, str) else self.drop_layers

    @property
    def chooses_layers(self) -> bool:
        """Whether the layers that are removed are still to be chosen."""
        return self.layer_count > len(self.named_layers)

    @property
    def removed(self) -> dict[str, str]:
        """Kind of parts -> how many are removed, in words; kinds of which none are, are missing.
        Parts are removed in this order."""
        count = self.layer_count
        layers = {"layers": f"{count} layer{'s' if count > 1 else ''}"} if count else {}
        found = layers | {
            kind: f"{percent(round(share, 4))} % of {kind}"
            for kind, share in self.shares.items()
            if share
        }
        if self.drop_parameters:
            share = percent(self.drop_parameters)
            found["parameters"] = f"{share} % of the decoder layers' parameters"
        return found

    @property
    def resizes(self) -> bool:
        """Whether layers are removed, or become smaller in a part that is no expert."""
        return bool({*self.removed} - {"experts"})

    def naming_layers(self, indices: Iterable[int]) -> "Structure":
        """Returns the same with the layers that are removed named."""
        names = ",".join(f"layers.{index}" for index in indices)
        return dataclasses.replace(self, drop_layers=names)


NOTHING = Structure()
"""Removes nothing."""


def _defaults(part: type[Importance | Tuning], names: Collection[str]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(part) if field.name in names}


def without_effect(pattern: RecipePattern) -> dict[str, str]:
    """Returns the fields of `Importance` and `Tuning` that have no effect under a pattern -> the
    reason."""
    if isinstance(pattern, Given):
        return dict.fromkeys(
            ("max_deviation", "weigh_outputs", "tune_gradual"),
            "the given masks decide which weights stay",
        )
    if isinstance(pattern, NM):
        return {
            "max_deviation": f"pattern {pattern} is the same for every linear layer",
            "tune_gradual": f"pattern {pattern} cannot be pruned gradually during tuning",
        }
    if not pattern.sparsity:
        return dict.fromkeys(
            ("max_deviation", "weigh_outputs", "tune_gradual"), "there are no zeros to choose"
        )
    if pattern.per_output:
        return dict.fromkeys(
            ("max_deviation", "weigh_outputs"),
            "per-output patterns only compare weights of one output",
        )
    return {}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern for some linear layers.

    Attributes:
        names: the layers, as a shell pattern of names such as layers.3.mlp.down_proj: `*.q_proj`,
            `layers.2[0-9].*`.
        pattern: their pattern; None: they stay dense.
    """

    names: str
    pattern: OwnPattern | None = None
    __pydantic_config__ = OWN

    def matches(self, index: int, path: str) -> bool:
        """Returns whether the rule names a linear layer.

        Args:
            index: the index of its decoder layer.
            path: its path in the decoder layer.
        """
        return fnmatch.fnmatchcase(f"layers.{index}.{path}", self.names)

    def __str__(self) -> str:
        return f"{self.names} {self.pattern or 'dense'}"
