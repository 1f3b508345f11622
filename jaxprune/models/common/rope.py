"""Rotary position embedding in the kinds that Hugging Face configurations name.

References:
    Su et al., "RoFormer" (arXiv 2104.09864); dynamic and yarn: Peng et al., "YaRN" (arXiv
    2309.00071); llama3: "The Llama 3 Herd of Models" (arXiv 2407.21783), as released.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field

from convert.errors import CheckpointError
from convert.schema import Schema, check
from jaxprune.errors import InputError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


Factor = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class Parameters(Schema):
    """What a configuration says of its rope."""

    rope_type: str = "default"
    rope_theta: Annotated[float, Field(gt=1, le=1e30, allow_inf_nan=False)] | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Annotated[int, Field(ge=1, le=2**30)] | None = None
    attention_factor: Factor | None = None
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    mscale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, le=1e6)] | None = None
    truncate: bool | None = None
    short_factor: list[Factor] | None = None
    long_factor: list[Factor] | None = None


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotation of one model.

    Attributes:
        kind: one of KINDS.
        size: features of a head that are rotated, from the first; the others stay.
        max_positions: the longest context that the model was made for.
        parameters: what the configuration says of the kind, as sorted items so that the object is
            hashable.
        interleaved: whether features 2i and 2i + 1 are a pair, and not i and i + size/2.
    """

    kind: str
    size: int
    max_positions: int
    parameters: tuple[tuple[str, Any], ...]
    interleaved: bool = False

    @classmethod
    def from_hf(
        cls,
        parameters: Mapping[str, Any],
        head_dim: int,
        max_positions: int,
        *,
        interleaved: bool = False,
        partial: bool = False,
    ) -> "Rope":
        """Reads a configuration's `rope_parameters`.

        Args:
            parameters: the entry.
            head_dim: features of a head.
            max_positions: the longest context that the model was made for.
            interleaved: see `Rope`.
            partial: whether the family rotates a part of the features where the entry says so.

        Raises:
            InputError: a kind or an option that is not implemented, or a parameter that is missing.
        """
        read = check(
            Parameters, dict(parameters), file="", entry="rope_parameters", error=CheckpointError
        )
        kind = read.rope_type
        if kind not in KINDS:
            raise InputError(f"rope type {kind!r} is not implemented; {', '.join(KINDS)} are")
        if not partial and read.partial_rotary_factor not in (None, 1.0):
            raise InputError("partial_rotary_factor is not implemented for this model family")
        needed = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ),
            "yarn": ("factor", "original_max_position_embeddings"),
            "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
        }[kind]
        given = read.model_dump(exclude_none=True)
        if missing := [name for name in ("rope_theta", *needed) if name not in given]:
            raise InputError(
                f"rope type {kind!r} needs {', '.join(missing)} in the model's configuration"
            )
        if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
            raise InputError(
                "rope type 'llama3' needs a low_freq_factor below its high_freq_factor"
            )
        size = int(head_dim * (read.partial_rotary_factor or 1.0))
        if size < 2 or size % 2:
            raise InputError(f"{size} of {head_dim} features of a head cannot be rotated in pairs")
        for name in ("short_factor", "long_factor"):
            if kind == "longrope" and len(given[name]) != size // 2:
                raise InputError(f"{name} must have {size // 2} entries, not {len(given[name])}")
        hashable = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
        }
        return cls(kind, size, max_positions, tuple(sorted(hashable.items())), interleaved)

    @property
    def stretches(self) -> bool:
        """Whether it stretches to windows of any length."""
        return self.kind == "dynamic"

    def inverse_frequencies(self, length: int) -> tuple[np.ndarray, float]:
        """Returns radians per position, float32 [size / 2], and the factor of cosine and sine, at a
        length."""
        p = dict(self.parameters)
        base, d = p["rope_theta"], self.size
        if self.kind == "dynamic" and length > self.max_positions:
            stretch = p["factor"] * length / self.max_positions - (p["factor"] - 1)
            base *= stretch ** (d / (d - 2))
        exponent = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
        inverse = np.float32(1) / np.float32(base) ** exponent
        if self.kind == "linear":
            inverse = inverse / np.float32(p["factor"])
        elif self.kind == "llama3":
            inverse = _llama3(inverse, p)
        elif self.kind == "yarn":
            return _yarn(inverse, base, p)
        elif self.kind == "longrope":
            return _longrope(inverse, p, self.max_positions, length)
        return inverse, 1.0

    def rotate(
        self,
        x: Float[Array, "b t h d"],
        positions: Int[Array | np.ndarray, "b t"] | None = None,
        length: int | None = None,
    ) -> Float[Array, "b t h d"]:
        """Rotates the i-th pair of features of position t by t times the i-th frequency, in
        float32.

        Args:
            x: queries or keys.
            positions: the positions of the tokens, below `length`; None: 0, 1, 2, ...
            length: of the longest text; None: that of the window.
        """
        length = length or x.shape[1]
        inverse, factor = self.inverse_frequencies(length)
        angles = np.arange(length, dtype=np.float32)[:, None] * inverse
        tables = (jnp.asarray(f(angles) * np.float32(factor)) for f in (np.cos, np.sin))
        cos, sin = ((t[None] if positions is None else t[positions])[:, :, None, :] for t in tables)
        rotated, rest = x[..., : self.size].astype(jnp.float32), x[..., self.size :]
        if self.interleaved:
            x1, x2 = rotated[..., ::2], rotated[..., 1::2]
            pairs = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
            rotated = pairs.reshape(rotated.shape)
        else:
            x1, x2 = jnp.split(rotated, 2, axis=-1)
            rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
        rotated = rotated.astype(x.dtype)
        return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def _longrope(
    inverse: np.ndarray, p: Mapping[str, Any], max_positions: int, length: int
) -> tuple[np.ndarray, float]:
    """Returns the frequencies, each divided by a factor of its own, which depend on the window's
    length; and the factor of cosine and sine."""
    context = p["original_max_position_embeddings"]
    stretch = p.get("factor") or max_positions / context
    factors = np.asarray(p["long_factor" if length > context else "short_factor"], np.float32)
    attention = p.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(stretch) / math.log(context)) if stretch > 1 else 1.0
    return (inverse / factors).astype(np.float32), float(attention)


def _llama3(inverse: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    """Returns the frequencies with long wavelengths interpolated, short ones kept, those between
    blended."""
    low, high, context = (
        p["low_freq_factor"],
        p["high_freq_factor"],
        p["original_max_position_embeddings"],
    )
    rotations = context * inverse / (2 * math.pi)
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return (keep * inverse + (1 - keep) * inverse / p["factor"]).astype(np.float32)


def _yarn(inverse: np.ndarray, base: float, p: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Returns the frequencies, those of features that turn often in the original context kept, slow
    ones interpolated, with a ramp between; and the factor."""
    factor, context = p["factor"], p["original_max_position_embeddings"]
    dim = 2 * len(inverse)

    def feature_turning(times: float) -> float:
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = feature_turning(p.get("beta_fast") or 32), feature_turning(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(inverse), dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    blended = ((1 - ramp) * inverse + ramp * inverse / factor).astype(np.float32)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    attention = p.get("attention_factor")
    if attention is None:
        some, every = p.get("mscale"), p.get("mscale_all_dim")
        attention = mscale(some) / mscale(every) if some and every else mscale(1.0)
    return blended, float(attention)
