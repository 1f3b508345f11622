"""Model families, named as Hugging Face's `model_type`. A family knows names and shapes.

A family is a row of `llama_like.py`, or a file that exposes `FAMILY`; see `common.family.Family`.
`common` holds what families share.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from convert import Spec, plugins
from convert.assets import load_config, read_config
from convert.errors import UserError, joined
from convert.names import BESIDE
from jaxprune import hardware
from jaxprune.errors import InputError
from jaxprune.models import llama_like
from jaxprune.models.common.family import Family
from jaxprune.models.common.functional_modules import Layer, Part
from jaxprune.models.common.packed_windows import Layout

HELPERS = ("common", "llama_like")
"""What is not a family."""
__all__ = ["Architecture", "Layer", "Layout", "Part", "architecture_of", "build", "stored_dtype"]


def names() -> list[str]:
    """Returns the names of all families, in alphabetical order."""
    return sorted({*llama_like.CONFIGS, *plugins.names(sys.modules[__name__])})


def family_of(name: str) -> Family:
    """Returns a family; errors as for `plugins.load`."""
    if name in llama_like.CONFIGS:
        return Family(llama_like.CONFIGS[name])
    return plugins.load(sys.modules[__name__], name).FAMILY


class Architecture:
    """A model family at one configuration: parts and shapes, without params.

    Attributes:
        config: the family's, made of the model's configuration.
        embed, head: the parts around the layers.
        layers: the decoder layers, from the first; those of one kind are one object.
        width: features of a hidden state.
        state_bytes: bytes of a token's hidden state.
        spec: path in a checkpoint -> shape and dtype, for the whole model.
    """

    def __init__(self, name: str, config: Any) -> None:
        self._name, family = name, family_of(name)
        # float32 means float32: the default precision would be TF32 on a GPU and bfloat16 on a TPU.
        precision = "highest" if jax.numpy.dtype(config.dtype) == jax.numpy.float32 else None

        def part(module: Callable[[Any, nnx.Rngs], nnx.Module]) -> Part:
            return Part(lambda: module(config, nnx.Rngs(0)), precision)

        def layer(kind: Any) -> Layer:
            def make() -> nnx.Module:
                return family.layer(config, kind, nnx.Rngs(0))

            return Layer(make, precision, family.inputs_of(config, kind))

        self.config = config
        self.embed, self.head = part(family.embed), part(family.head)
        kinds = {kind: layer(kind) for kind in dict.fromkeys(config.kinds)}
        self.layers = tuple(kinds[kind] for kind in config.kinds)
        self.width: int = jax.eval_shape(
            self.embed, self.embed.spec, jnp.zeros((1, 1), jnp.int32)
        ).shape[-1]
        self.state_bytes = self.width * jax.numpy.dtype(config.dtype).itemsize
        self.spec: Spec = dict(self.embed.spec)
        for index, one in enumerate(self.layers):
            self.spec |= {f"layers.{index}.{path}": shape for path, shape in one.stored.items()}
        self.spec |= self.head.spec

    def kernel_shapes(self, *, routers: bool = False) -> dict[tuple[int, str], tuple[int, ...]]:
        """Returns (layer index, path of the linear layer) -> shape [n_in, n_out] of its kernel.

        Args:
            routers: whether to name those, too, that stay dense unless a rule names them.
        """
        return {
            (i, path): shape
            for i, layer in enumerate(self.layers)
            for path, shape in layer.kernels.items()
            if routers or path not in layer.routers
        }

    def is_router(self, index: int, path: str) -> bool:
        """Returns whether a linear layer stays dense unless a rule names it."""
        return path in self.layers[index].routers

    def routed(self, **changes: Any) -> "Architecture":
        """Returns the same with other values of its `Routing`."""
        config, routing = self.config, self.config.routing
        return build(
            self._name, dataclasses.replace(config, routing=dataclasses.replace(routing, **changes))
        )

    def require_length(self, length: int) -> None:
        """Raises InputError for windows that are longer than the model was made for."""
        most = self.config.max_positions
        if most is not None and length > most:
            raise InputError(
                f"windows of {length} tokens are longer than the model's {most} positions; shorten "
                "them"
            )


@functools.cache
def build(family: str, config: Any) -> Architecture:
    """Builds the architecture of a family, once a configuration, so that its compiled functions are
    found again."""
    return Architecture(family, config)


def architecture_of(
    assets: Path,
    dtype: DTypeLike | None,
    spec: Spec | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Architecture:
    """Returns the architecture that config.json describes, once the checkpoint's tensors are known
    to fit.

    Args:
        assets: the folder of config.json.
        dtype: the dtype of the computation. None: float32 on CPU, the kernels' stored dtype
            elsewhere; it must be given where there is no `spec`.
        spec: the shapes and dtypes of the checkpoint; None: there is only a configuration.
        changes: entries of config.json that are taken to have other values.

    Raises:
        InputError: an unknown architecture, something in it that is not implemented, or tensors
            that do not fit; all of them in one message.
    """
    model_type = read_config(assets)["model_type"]
    known = names()
    if model_type not in known:
        page = "docs/extending/family.md says how to add one"
        raise InputError(
            f"model type {model_type!r} is not supported; supported: {', '.join(known)}; {page}"
        )
    if dtype is None:
        assert spec is not None
        dtype = jax.numpy.float32 if hardware.current().on_cpu else stored_dtype(spec)
    try:
        config = family_of(model_type).config(load_config(assets, changes), jax.numpy.dtype(dtype))
    except UserError as error:
        error.file = error.file or assets / "config.json"
        raise
    architecture = build(model_type, config)
    if spec is not None:
        _check(spec, architecture.spec, assets)
    return architecture


def stored_dtype(spec: Spec) -> Any:
    """Returns the dtype of a checkpoint's kernels."""
    return next(t.dtype for path, t in spec.items() if path.endswith(".kernel"))


def _check(found: Spec, wanted: Spec, folder: Path) -> None:
    problems = [f"missing: {p} {list(t.shape)}" for p, t in wanted.items() if p not in found]
    text = {path: tensor for path, tensor in found.items() if not path.startswith(f"{BESIDE}.")}
    problems += [f"surplus: {p} {list(t.shape)}" for p, t in text.items() if p not in wanted]
    problems += [
        f"misshapen: {p} is {list(found[p].shape)}, must be {list(t.shape)}"
        for p, t in wanted.items()
        if p in found and found[p].shape != t.shape
    ]
    if problems:
        raise InputError(
            "the checkpoint does not fit its config.json (kernels shown as [in, out]): "
            f"{joined(problems, most=20)}",
            file=folder,
        )
