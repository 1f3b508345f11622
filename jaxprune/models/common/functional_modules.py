"""Modules as functions of their params: the parts of a model, and how a layer's linear layers are
called.

Experts' kernels are stacked inside a layer, [experts, n_in, n_out], so that its program does not
grow with them. In a checkpoint, and for everything that names linear layers, each expert has its
own: the kernels of `mlp.experts.up_proj` are those of `mlp.experts.0.up_proj`,
`mlp.experts.1.up_proj`, and so on.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Shaped

from convert import Params, Spec
from convert.names import expert_path, split_expert
from jaxprune.sparsity.patterns import Projections

ROUTER_CAPTURE = "router_input"
"""The capture that routers read: linear layers that stay dense unless a rule names them."""


class Part:
    """A module whose params come from outside, layer by layer: one compilation serves all of them.

    Attributes:
        spec: path inside the module -> shape and dtype of the param.
    """

    def __init__(self, make: Callable[[], nnx.Module], precision: str | None) -> None:
        module = nnx.eval_shape(make)
        self._graph, state = nnx.split(module)
        self._projections = {
            ".".join(map(str, path)): m.projections
            for path, m in nnx.iter_modules(module)
            if getattr(m, "projections", ())
        }
        self._precision = precision
        self.spec: Spec = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep=".")

    def __call__(
        self,
        params: Mapping[str, jax.Array],
        *args: Any,
        probes: Mapping[str, jax.Array] | None = None,
        input_probes: Mapping[str, jax.Array] | None = None,
    ) -> Any:
        """Calls the module with these params; to be traced under jit.

        Args:
            params: path inside the module -> array.
            args: the arguments of the module.
            probes: path of a submodule -> array that is added to its output. The gradient of a
                probe of zeros is the gradient of that output.
            input_probes: the same for inputs.
        """
        module = nnx.merge(self._graph, traverse_util.unflatten_dict(params, sep="."))
        before, after = input_probes or {}, probes or {}
        for path in before.keys() | after.keys():
            parent, _, name = path.rpartition(".")
            owner = functools.reduce(getattr, parent.split(".") if parent else [], module)
            probed = _Probed(getattr(owner, name), before.get(path), after.get(path))
            setattr(owner, name, probed)
        with jax.default_matmul_precision(self._precision):
            return module(*args)


class _Probed:
    """A module to whose input or output something is added."""

    def __init__(
        self, module: Callable[..., jax.Array], before: jax.Array | None, after: jax.Array | None
    ) -> None:
        self._module, self._before, self._after = module, before, after

    def __call__(self, x: jax.Array, *args: Any) -> jax.Array:
        y = self._module(x if self._before is None else x + self._before, *args)
        return y if self._after is None else y + self._after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Source(NamedTuple):
    """Where a linear layer's kernel, or the Gram matrix of its inputs, is found in a layer's
    program.

    Attributes:
        name: the path of the module, or the capture.
        expert: the index of the expert; None: there are no experts in it.
    """

    name: str
    expert: int | None

    def of(self, arrays: Mapping[str, Any], leaf: str = "") -> Any:
        """Returns its array among those of the program, which may be stacked."""
        array = arrays[self.name + leaf]
        return array if self.expert is None else array[self.expert]


class Layer(Part):
    """A decoder layer, of one kind.

    Attributes:
        spec: path inside the module -> shape and dtype, experts stacked.
        stored: path inside the layer, as in a checkpoint -> shape and dtype, each expert for
            itself.
        linears: path of a module -> shape of its kernel, [n_in, n_out] or [experts, n_in, n_out].
        reads: capture -> the modules whose input it is.
        experts: path of a module whose kernels are stacked -> their number.
        kernels: linear layer, as in a checkpoint -> shape [n_in, n_out] of its kernel, for all that
            can be pruned.
        inputs: capture -> linear layers whose input it is; an expert's captures are its own, such
            as `expert_input.3`.
        sources: linear layer or capture, as in a checkpoint -> where the layer's program has it.
        routers: linear layers that stay dense unless a rule names them.
        scorers: those of them that have an output for each expert.
        projections: linear layer that is several side by side -> those; see `patterns.Projections`.
    """

    def __init__(
        self,
        make: Callable[[], nnx.Module],
        precision: str | None,
        reads: Mapping[str, tuple[str, ...]],
    ) -> None:
        super().__init__(make, precision)
        self.reads = reads
        self.linears = {
            path: self.spec[f"{path}.kernel"].shape for paths in reads.values() for path in paths
        }
        self.experts = {path: shape[0] for path, shape in self.linears.items() if len(shape) == 3}
        self.routers = frozenset(reads.get(ROUTER_CAPTURE, ()))
        count = max(self.experts.values(), default=0)
        self.scorers = frozenset(path for path in self.routers if self.linears[path][-1] == count)
        self.sources: dict[str, Source] = {}
        self.kernels: dict[str, tuple[int, ...]] = {}
        self.inputs: dict[str, tuple[str, ...]] = {}
        self.projections: dict[str, Projections] = {}
        for capture, paths in reads.items():
            for expert in range(self.experts[paths[0]]) if paths[0] in self.experts else (None,):
                own = capture if expert is None else f"{capture}.{expert}"
                self.sources[own] = Source(capture, expert)
                self.inputs[own] = tuple(expert_path(path, expert) for path in paths)
                for path in paths:
                    self.sources[expert_path(path, expert)] = Source(path, expert)
                    self.kernels[expert_path(path, expert)] = self.linears[path][-2:]
                    if path in self._projections:
                        self.projections[expert_path(path, expert)] = self._projections[path]
        self._members = {path: self._stored_as(path) for path in self.spec}
        self.stored: Spec = {
            name: self.spec[path] if names == (path,) else _one_of(self.spec[path])
            for path, names in self._members.items()
            for name in names
        }

    def features(self, capture: str) -> int:
        """Returns the features of a capture of the program."""
        return self.linears[self.reads[capture][0]][-2]

    def _stored_as(self, path: str) -> tuple[str, ...]:
        """Returns the paths in a checkpoint of a param of the program."""
        module, _, leaf = path.rpartition(".")
        if module not in self.experts:
            return (path,)
        return tuple(
            f"{expert_path(module, expert)}.{leaf}" for expert in range(self.experts[module])
        )

    def stack(self, params: Mapping[str, np.ndarray]) -> Params:
        """Returns params as the program takes them, of those that a checkpoint has; only experts'
        are copied."""
        return {
            path: params[path] if names == (path,) else _stacked([params[name] for name in names])
            for path, names in self._members.items()
        }

    def unstack(self, params: Mapping[str, np.ndarray]) -> Params:
        """Returns params as a checkpoint has them, views of those that the program takes."""
        found: Params = {}
        for path, array in params.items():
            names = self._members[path]
            found |= {path: array} if names == (path,) else dict(zip(names, array, strict=True))
        return found

    def apart(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arrays of modules or captures by linear layers or captures as in a checkpoint:
        experts' are split up."""
        return {
            name: source.of(arrays)
            for name, source in self.sources.items()
            if source.name in arrays
        }

    def programs_of(self, captures: Iterable[str]) -> dict[str, list[int] | None]:
        """Returns the program's captures -> the experts of these captures; None: there are no
        experts in it."""
        found: dict[str, list[int] | None] = {}
        for capture in captures:
            name, expert = self.sources[capture]
            if expert is None:
                found[name] = None
            else:
                experts = found.setdefault(name, [])
                assert experts is not None
                experts.append(expert)
        return found


def every_expert(path: str) -> str:
    """Returns a name for the linear layers of all experts that are called as this one:
    `mlp.experts.*.up_proj`."""
    parts = split_expert(path)
    return path if parts is None else f"{parts[0]}.*.{parts[2]}"


def _one_of(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)


def _stacked(arrays: list[Shaped[np.ndarray, "..."]]) -> Shaped[np.ndarray, "e ..."]:
    """Stacks arrays; kernels lie in memory as a checkpoint's tensors do, transposed, and stay that
    plan."""
    if arrays[0].ndim == 2 and not arrays[0].flags.c_contiguous:
        return np.stack([array.T for array in arrays]).transpose(0, 2, 1)
    return np.stack(arrays)
