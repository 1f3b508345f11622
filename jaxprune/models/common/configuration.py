"""What the modules of most decoders take from config.json."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import pydantic
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
    """The same, and the types of layers. Families that have one type pass over `layer_types`, as
    transformers does."""

    TYPES: ClassVar[tuple[str, str]] = (FULL, SLIDING)
    """The types that are implemented."""
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


class Rotation(NamedTuple):
    """How a family rotates queries and keys.

    Attributes:
        layers: the types of layers that do; None: all.
        by_type: whether `rope_parameters` has an entry for each type of layer.
        interleaved, partial: see `Rope.from_hf`.
    """

    layers: tuple[str, ...] | None = None
    by_type: bool = False
    interleaved: bool = False
    partial: bool = False


ROTATED = Rotation()
"""LLaMA's: all layers rotate alike."""


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
        normalized: whether a token's routing weights are divided by their sum.
        shared: the hidden features of the shared expert, which all tokens take; 0: there is none.
        sigmoid: whether routing weights are sigmoids of the scores, and not their softmax.
        scale: factor of the routing weights.
        route_all: whether captures hold every token for every expert, whatever the router chooses.
        mesh: the devices that experts and windows are spread over; None: one.
    """

    experts: int
    per_token: int
    size: int
    normalized: bool = True
    shared: int = 0
    sigmoid: bool = False
    scale: float = 1.0
    route_all: bool = False
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the shared modules need of a checkpoint's configuration.

    Those with defaults are options of families; the defaults are LLaMA's.

    Attributes:
        kinds: of the layers, from the first.
        max_positions: the longest window; None: there is no limit.
        dtype: the dtype of the computation; parameters may be stored in another.
        qkv_bias: whether the projections of queries, keys and values have biases.
        output_bias: whether the attention's output projection has one.
        mlp_bias: whether the linear layers of the feed-forward network have biases.
        qk_norm: over what queries and keys are normalized: each head, all heads together, or None.
        attention_scale: of the scores; None: 1/√head_dim.
        attention_softcap: c of c·tanh(score/c); None: scores are not capped.
        logit_softcap: c of c·tanh(logit/c); None: logits are not capped.
        sinks: whether each head has an attention sink: a learned score without a value.
        embedding_scale: factor of the embedding.
        residual_scale: factor of what is added to the hidden states.
        logit_scale: factor of the logits.
        norm_offset: what is added to a norm's weight.
        norms_before: names of the norms before the attention and before the feed-forward network,
            as in the checkpoint; None: there are none.
        norms_after: names of the norms after them.
        parallel: whether the feed-forward network reads the layer's input, and not what the
            attention made of it.
        routing: how tokens are sent to experts; None: there are none.
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
    norms_before: tuple[str, str] | None = ("input_layernorm", "post_attention_layernorm")
    norms_after: tuple[str, str] | None = None
    parallel: bool = False
    routing: Routing | None = None

    @classmethod
    def of(
        cls,
        hf: Entries,
        dtype: DTypeLike,
        *,
        rope: Rotation = ROTATED,
        window: int | None = None,
        routing: Routing | None = None,
        dense: Collection[int] = (),
        **options: Any,
    ) -> Self:
        """Makes a configuration of checked entries.

        Args:
            hf: the entries.
            dtype: the dtype of the computation.
            rope: how queries and keys are rotated.
            window: how many tokens a query sees at most, its own included, in layers of the type
                full_attention; None: all before it.
            routing: how tokens are sent to experts; None: there are none.
            dense: indices of the layers without experts.
            options: other attributes of `Config` that differ from LLaMA's.

        Raises:
            InputError: something in it is not implemented.
        """
        activation = hf.hidden_activation or hf.hidden_act
        if "activation" not in options:
            require_activation(activation)
        norm_eps = hf.rms_norm_eps or hf.layer_norm_eps
        if norm_eps is None:
            raise InputError("rms_norm_eps is missing in the model's configuration")
        kv_heads = hf.num_key_value_heads or hf.num_attention_heads
        if hf.num_attention_heads % kv_heads:
            raise InputError(
                f"{hf.num_attention_heads} attention heads cannot share {kv_heads} key-value heads"
            )
        kinds = tuple(
            dataclasses.replace(kind, experts=routing is not None and index not in dense)
            for index, kind in enumerate(_kinds(hf, rope, window))
        )
        if routing is not None and routing.per_token > routing.experts:
            raise InputError(
                f"num_experts_per_tok is {routing.per_token}, but there are {routing.experts} "
                "experts"
            )
        stretches = any(kind.rope is not None and kind.rope.stretches for kind in kinds)
        usual: dict[str, Any] = {
            "vocab_size": hf.vocab_size,
            "hidden_size": hf.hidden_size,
            "intermediate_size": hf.intermediate_size,
            "kinds": kinds,
            "num_heads": hf.num_attention_heads,
            "num_kv_heads": kv_heads,
            "head_dim": _head_size(hf),
            "max_positions": None if stretches else hf.max_position_embeddings,
            "norm_eps": norm_eps,
            "activation": activation,
            "tied": hf.tie_word_embeddings,
            "qkv_bias": hf.attention_bias,
            "output_bias": hf.attention_bias,
            "mlp_bias": hf.mlp_bias,
        }
        return cls(dtype=dtype, routing=routing, **usual | options)


def _head_size(hf: Entries) -> int:
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


def _kinds(hf: Entries, rope: Rotation, window: int | None) -> list[Kind]:
    """Returns the kinds of all layers by their types; errors as for `Config.of`."""
    named = hf.layer_types if isinstance(hf, LayerEntries) else None
    types = named or [FULL] * hf.num_hidden_layers
    ropes = _ropes(hf, rope, sorted({*types}))
    if len(types) != hf.num_hidden_layers:
        raise InputError(f"layer_types has {len(types)} entries for {hf.num_hidden_layers} layers")
    known = hf.TYPES if isinstance(hf, LayerEntries) else (FULL,)
    if unknown := sorted({*types} - {*known}):
        raise InputError(f"layer type {unknown[0]!r} is not implemented; {' and '.join(known)} are")
    if SLIDING in types and not hf.sliding_window:
        raise InputError(
            f"layers of type {SLIDING} need sliding_window in the model's configuration"
        )
    windows = {SLIDING: hf.sliding_window, FULL: window}
    return [Kind(ropes[one], windows.get(one)) for one in types]


def _ropes(hf: Entries, rotation: Rotation, types: list[str]) -> dict[str, Rope | None]:
    """Returns types of layers -> their rotation; errors as for `Rope.from_hf`, and for a type
    without an entry."""

    def read(parameters: dict[str, Any]) -> Rope:
        return Rope.from_hf(
            parameters,
            _head_size(hf),
            hf.max_position_embeddings,
            interleaved=rotation.interleaved,
            partial=rotation.partial,
        )

    if not rotation.by_type:
        every, layers = read(hf.rope_parameters), rotation.layers or types
        return {one: every if one in layers else None for one in types}
    ropes: dict[str, Rope | None] = {}
    for one in types:
        parameters = hf.rope_parameters.get(one)
        if not isinstance(parameters, dict):
            raise InputError(f"rope_parameters has no entry for layers of type {one!r}")
        ropes[one] = read(parameters)
    return ropes


class Entry(NamedTuple):
    """An entry of config.json that gives an option of `Config.of`.

    Attributes:
        name: of the entry.
        type: its type and range; None: as the schema has it.
        value: the entry -> the option.
    """

    name: str
    type: Any = None
    value: Callable[[Any], Any] = lambda entry: entry


def reader(schema: type[Entries] = Entries, **options: Any) -> Callable[[Any, DTypeLike], Config]:
    """Makes the function that reads a family's configuration: (transformers' object, dtype of the
    computation) -> `Config`.

    Args:
        schema: the entries that it reads beside those that `options` name.
        options: of `Config.of`: what differs from LLaMA; each a value, or an `Entry` that gives it.
    """
    given = {name: option for name, option in options.items() if isinstance(option, Entry)}
    own: dict[str, Any] = {one.name: (one.type, ...) for one in given.values() if one.type}
    whole = pydantic.create_model(schema.__name__, __base__=schema, **own)

    def read(hf: Any, dtype: DTypeLike) -> Config:
        found = entries(whole, hf)
        values = {name: one.value(getattr(found, one.name)) for name, one in given.items()}
        return Config.of(found, dtype, **options | values)

    return read
