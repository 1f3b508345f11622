"""What the modules that most decoders share need of a checkpoint's configuration."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, TypeVar

from jax.sharding import Mesh
from jaxtyping import DTypeLike
from pydantic import Field

from convert.assets import Count, Positions, Positive, Size, Vocabulary
from convert.errors import CheckpointError
from convert.schema import Schema, check
from jaxprune.errors import InputError
from jaxprune.models.common.activations import require_activation
from jaxprune.models.common.rope import Rope

FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers, as configurations name them."""


class Entries(Schema):
    """The entries of config.json that most families have, with transformers' defaults filled in."""

    vocab_size: Vocabulary
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Annotated[int, Field(ge=2, le=2**12, multiple_of=2)] | None = None
    max_position_embeddings: Positions
    rms_norm_eps: Positive | None = None
    layer_norm_eps: Positive | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool
    rope_parameters: dict[str, Any] = {}
    sliding_window: Positions | None = None


class LayerEntries(Entries):
    """The same, and the types of layers, of families that heed them: others pass over that entry,
    as transformers does."""

    layer_types: list[str] | None = None


E = TypeVar("E", bound=Schema)


def entries(schema: type[E], hf: Any) -> E:
    """Returns the entries of a transformers configuration that a schema names.

    Args:
        schema: the entries' types and ranges.
        hf: the configuration.

    Raises:
        CheckpointError: an entry is missing, of the wrong type, or out of range.
    """
    names = (field.alias or name for name, field in schema.model_fields.items())
    found = {name: value for name in names if (value := getattr(hf, name, None)) is not None}
    return check(schema, found, file="", error=CheckpointError)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tells a layer from the others of its model.

    Attributes:
        rope: the rotation of queries and keys; None: there is none.
        window: how many tokens a query sees at most, its own included; None: all before it.
        experts: whether its feed-forward network is made of experts.
    """

    rope: Rope | None
    window: int | None = None
    experts: bool = False


@dataclasses.dataclass(frozen=True)
class Routing:
    """How tokens are sent to experts.

    Attributes:
        experts: how many there are.
        per_token: how many a token takes.
        size: the hidden features of an expert.
        normalized: whether the shares of the experts that a token takes are made to sum to 1.
        shared: the hidden features of the expert that all tokens take; 0: there is none.
        one_by_one: whether each expert has a share of its own, by the logistic function, and not
            all of them one.
        scale: factor of the shares.
        route_all: whether taps hold every token for every expert, whatever the router chooses.
        mesh: the devices that experts and windows are spread over; None: one.
    """

    experts: int
    per_token: int
    size: int
    normalized: bool = True
    shared: int = 0
    one_by_one: bool = False
    scale: float = 1.0
    route_all: bool = False
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the shared modules need of a checkpoint's configuration.

    Attributes:
        kinds: of the layers, from the first.
        max_positions: the longest window; None where there is no limit.
        qkv_bias, output_bias, mlp_bias: whether those linear layers have one.
        qk_norm: over what queries and keys are normalized: each head, all heads together, or None.
        attention_scale: of the scores; None: 1/√head_dim.
        attention_softcap, logit_softcap: c of c·tanh(x/c), for scores and logits; None: they are
            taken as they are.
        sinks: whether each head has the score of a token that is not there.
        embedding_scale, residual_scale, logit_scale: factors of the embedding, of what is added to
            the hidden states, and of the logits.
        norm_offset: what is added to a norm's weight.
        routing: how tokens are sent to experts; None: there are none.
        dtype: the dtype of the computation; parameters may be stored in another.

    Those that have defaults are families' own.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    kinds: tuple[Kind, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    norm_eps: float
    activation: str
    tied: bool
    dtype: DTypeLike
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    norm_offset: float = 0.0
    routing: Routing | None = None

    @classmethod
    def from_hf(cls, hf: Any, dtype: DTypeLike) -> "Config":
        """Reads a transformers configuration, as LLaMA's is.

        Args:
            hf: the configuration.
            dtype: the dtype of the computation.

        Raises:
            CheckpointError: an entry is missing, of the wrong type, or out of range.
            InputError: something in it is not implemented.
        """
        return cls.of(entries(Entries, hf), dtype)

    @classmethod
    def of(
        cls,
        hf: Entries,
        dtype: DTypeLike,
        *,
        rope: Callable[[str], Rope | None] | None = None,
        **options: Any,
    ) -> "Config":
        """Makes a configuration of checked entries.

        Args:
            hf: the entries.
            dtype: the dtype of the computation.
            rope: a layer's type -> its rotation; None: `rope_parameters` are for all layers.
            options: attributes that differ from LLaMA's.

        Raises:
            InputError: something in it is not implemented.
        """
        activation = hf.hidden_activation or hf.hidden_act
        norm_eps = options.get("norm_eps") or hf.rms_norm_eps or hf.layer_norm_eps
        if "activation" not in options:
            require_activation(activation)
        if norm_eps is None:
            raise InputError("rms_norm_eps is missing in the model's configuration")
        kv_heads = hf.num_key_value_heads or hf.num_attention_heads
        if hf.num_attention_heads % kv_heads:
            raise InputError(
                f"{hf.num_attention_heads} attention heads cannot share {kv_heads} key-value heads"
            )
        every = None if rope else rope_of(hf)
        kinds = layer_kinds(hf, rope or (lambda _: every))
        stretches = any(kind.rope is not None and kind.rope.stretches for kind in kinds)
        usual: dict[str, Any] = {
            "vocab_size": hf.vocab_size,
            "hidden_size": hf.hidden_size,
            "intermediate_size": hf.intermediate_size,
            "kinds": kinds,
            "num_heads": hf.num_attention_heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_size(hf),
            "max_positions": None if stretches else hf.max_position_embeddings,
            "norm_eps": norm_eps,
            "activation": activation,
            "tied": hf.tie_word_embeddings,
            "qkv_bias": hf.attention_bias,
            "output_bias": hf.attention_bias,
            "mlp_bias": hf.mlp_bias,
        }
        return cls(dtype=dtype, **usual | options)


C = TypeVar("C", bound=Config)


def head_size(hf: Entries) -> int:
    """Returns the features of a head.

    Raises:
        InputError: heads cannot have as many.
    """
    size, rest = divmod(hf.hidden_size, hf.num_attention_heads)
    if hf.head_dim is None and (rest or size % 2):
        raise InputError(
            f"{hf.hidden_size} features cannot be split into {hf.num_attention_heads} heads of "
            "even size"
        )
    return hf.head_dim or size


def with_window(config: C, window: int | None) -> C:
    """Returns the configuration with one window for all layers."""
    kinds = tuple(dataclasses.replace(kind, window=window) for kind in config.kinds)
    return dataclasses.replace(config, kinds=kinds)


def with_experts(config: C, routing: Routing, dense: Collection[int] = ()) -> C:
    """Returns the configuration with experts in all layers but some, which are given by their
    indices.

    Raises:
        InputError: a token takes more experts than there are.
    """
    if routing.per_token > routing.experts:
        raise InputError(
            f"num_experts_per_tok is {routing.per_token}, but there are {routing.experts} experts"
        )
    kinds = (
        dataclasses.replace(kind, experts=index not in dense)
        for index, kind in enumerate(config.kinds)
    )
    return dataclasses.replace(config, kinds=tuple(kinds), routing=routing)


def layer_kinds(hf: Entries, rope: Callable[[str], Rope | None]) -> tuple[Kind, ...]:
    """Returns the kinds of all layers: their rotation, and their window where they attend to one.

    Args:
        hf: the entries.
        rope: a layer's type -> its rotation.

    Raises:
        InputError: a type of layer that is not implemented, or types of another number of layers.
    """
    types = types_of(hf)
    if len(types) != hf.num_hidden_layers:
        raise InputError(f"layer_types has {len(types)} entries for {hf.num_hidden_layers} layers")
    if unknown := sorted({*types} - {FULL, SLIDING}):
        raise InputError(f"layer type {unknown[0]!r} is not implemented; {FULL} and {SLIDING} are")
    if SLIDING in types and not hf.sliding_window:
        raise InputError(
            f"layers of type {SLIDING} need sliding_window in the model's configuration"
        )
    return tuple(Kind(rope(one), hf.sliding_window if one == SLIDING else None) for one in types)


def types_of(hf: Entries) -> list[str]:
    """Returns the types of all layers, as a configuration names them."""
    named = hf.layer_types if isinstance(hf, LayerEntries) else None
    return named or [FULL] * hf.num_hidden_layers


def rope_by_type(hf: Entries) -> Callable[[str], Rope | None]:
    """Returns a layer's type -> its rotation, where `rope_parameters` has an entry for each type.

    Raises:
        InputError: a rotation that is not implemented, or a type without one.
    """
    ropes = {}
    for kind in sorted({*types_of(hf)}):
        parameters = hf.rope_parameters.get(kind)
        if not isinstance(parameters, dict):
            raise InputError(f"rope_parameters has no entry for layers of type {kind!r}")
        ropes[kind] = Rope.from_hf(parameters, head_size(hf), hf.max_position_embeddings)
    return lambda kind: ropes[kind]


def rope_of(hf: Entries, **options: bool) -> Rope:
    """Returns the rotation of all layers; options and errors as for `Rope.from_hf`."""
    return Rope.from_hf(hf.rope_parameters, head_size(hf), hf.max_position_embeddings, **options)
