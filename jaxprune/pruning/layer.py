"""One layer pruned: Gram matrices of its inputs -> solves -> kernels on the host, for some inputs after others."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from convert import Params
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method, gram, with_more_damping
from jaxprune.models import Layer
from jaxprune.pruning.gram_matrices import gram_matrices, groups, most_bytes
from jaxprune.pruning.kernel import KernelResult, dense_result, prune_and_round
from jaxprune.pruning.rules import TargetOf
from jaxprune.pruning.sensitivity import Weights
from jaxprune.sharding import fetch
from jaxprune.sparsity.masks import pack
from jaxprune.streaming.hidden_states import HiddenStates
from jaxprune.streaming.model import StreamedModel

DAMPING = 1, 10, 100, 1000
"""A solve that fails is tried again with so many times the damping."""


@dataclasses.dataclass(frozen=True)
class Solver:
    """How the kernels of a layer are pruned.

    Attributes:
        method: the pruning method.
        target_of: (layer index, path of the linear layer) -> pattern or mask; None: it stays dense.
        weights: the weights of each layer's tokens and outputs; None: all weigh the same.
        asymmetry: share of the inputs' drift from the dense model's that a kernel makes up for; see
            `gram.drifted_target`.
        quantization: see `prune_and_round`.
    """

    method: Method
    target_of: TargetOf
    weights: Sequence[Weights] | None = None
    asymmetry: float = 0.0
    quantization: str | None = None

    def taps(self, index: int, layer: Layer) -> dict[str, tuple[str, ...]]:
        """Returns the taps of a layer that its pruned linear layers read, with these."""
        pruned = {
            tap: tuple(path for path in paths if self.target_of(index, path) is not None)
            for tap, paths in layer.inputs.items()
        }
        return {tap: paths for tap, paths in pruned.items() if paths}


class SolvedLayer:
    """A layer whose kernels are pruned.

    Args:
        model: the model that the layer belongs to.
        index: the index of the layer.
        params: the params of the dense layer, on the device.
        states: before the layer, behind pruned layers and, where there are any, behind dense ones, which move on.
        solver: how.
        seconds: to which those by phase are added.

    Attributes:
        kernels: name of a kernel as in a checkpoint, inside the layer -> the pruned kernel in its stored dtype, on the
            host.
        masks: path of the linear layer -> its packed mask; none of one that stays dense.
        results: path -> what became of its kernel.

    Raises:
        InputError: a Gram matrix is too nearly singular, whatever the damping, or not finite.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        params: Mapping[str, Array],
        states: tuple[HiddenStates, HiddenStates | None],
        solver: Solver,
        seconds: dict[str, float],
    ) -> None:
        self.kernels: Params = {}
        self.masks: dict[str, UInt8[np.ndarray, "m _"]] = {}
        self.results: dict[str, KernelResult] = {}
        part, weights = model.architecture.layers[index], solver.weights
        self._model, self._index, self._part, self._params, self._solver = model, index, part, params, solver
        taps, tokens = solver.taps(index, part), weights[index].tokens if weights else None
        if not taps and states[1]:  # no Gram matrices are summed, which otherwise moves the dense states
            model.forward(index, params, states[1])
        for group in groups(part, list(taps), most_bytes(), model.devices):
            with timed(seconds, "gram"):
                try:
                    grams, drifts = gram_matrices(model, index, params, *states, tokens, group)
                    jax.block_until_ready((grams.totals, drifts))
                except InputError as error:
                    error.problem = f"layer {index}: {error.problem}"
                    raise
            with timed(seconds, "solve"):
                for tap in group:
                    given, matrix = grams.tokens(tap), model.devices.replicate(grams.take(tap))
                    self._solve(taps[tap], _Inputs(given, matrix, drifts.pop(tap, None)))
                    del matrix
            del grams, drifts  # before those of the next group are made
        for path in part.kernels:
            if solver.target_of(index, path) is None and path not in part.routers:
                kernel = part.sources[path].of(params, ".kernel")
                self.results[path] = dense_result(kernel, part.sections.get(path, ()))
        self.results = {path: self.results[path] for path in part.kernels if path in self.results}
        del self._params  # the pruned ones follow

    def _solve(self, paths: Sequence[str], inputs: "_Inputs") -> None:
        """Prunes the kernels of the linear layers that share an input, with as much damping as they need."""
        least = 1 if inputs.tokens is None else least_damping(inputs.tokens, len(inputs.gram))
        if inputs.tokens == 0:  # nothing is known: all inputs count the same
            inputs = inputs._replace(gram=jnp.eye(len(inputs.gram), dtype=inputs.gram.dtype))
        for times in (least * raised for raised in DAMPING):
            method = self._solver.method
            self._attempt(paths, inputs, method if times == 1 else with_more_damping(method, times))
            bad = [path for path in paths if not math.isfinite(self.results[path].error)]
            if not bad:
                break
        else:
            raise InputError(
                f"layer {self._index}: {', '.join(bad)} cannot be solved, even with {DAMPING[-1]} times the damping",
                options={"nsamples": Change.RAISE, "damping": Change.RAISE},
            )
        found = {"damping_times": float(times)} if times > 1 else {}
        if inputs.tokens is not None:
            found |= {"tokens": float(inputs.tokens), "inputs": float(len(inputs.gram))}
        for path in paths:
            metrics = self.results[path].metrics | found
            self.results[path] = self.results[path]._replace(metrics=metrics)

    def _attempt(self, paths: Sequence[str], inputs: "_Inputs", method: Method) -> None:
        """Prunes the kernels of the linear layers that share an input."""
        prepared, weights = method.prepare(inputs.gram), self._solver.weights
        for path in paths:
            kernel = self._part.sources[path].of(self._params, ".kernel")
            target = self._solver.target_of(self._index, path)
            assert target is not None
            pruned, mask, self.results[path] = prune_and_round(
                method,
                prepared,
                inputs.gram,
                kernel,
                target,
                outputs=weights[self._index].outputs.get(path) if weights else None,
                wanted=self._wanted(kernel, inputs),
                sections=self._part.sections.get(path, ()),
                quantization=self._solver.quantization,
                devices=self._model.devices,
            )
            self.kernels[f"{path}.kernel"], self.masks[path] = fetch((pruned, pack(mask)))
            del kernel, pruned, mask  # before the next

    def _wanted(self, kernel: Float[Array, "n m"], inputs: "_Inputs") -> Float[Array, "n m"] | None:
        """Returns the kernel whose outputs are wanted; None: the dense one."""
        if inputs.drift is None:
            return None
        dense = kernel.astype(inputs.gram.dtype)
        return gram.drifted_target(inputs.gram, inputs.drift, dense, self._solver.asymmetry)


class _Inputs(NamedTuple):
    """What is known of the inputs that some linear layers share.

    Attributes:
        tokens: how many an expert was given; None: all.
        gram: their Gram matrix.
        drift: see `gram_matrices`.
    """

    tokens: int | None
    gram: Float[Array, "n n"]
    drift: Float[Array, "n n"] | None


def least_damping(tokens: int, inputs: int) -> int:
    """Returns how many times the damping is taken for an expert: 1, or more where its tokens are fewer than its inputs,
    as many times as they are fewer, in powers of 2."""
    return min(DAMPING[-1], 2 ** math.ceil(math.log2(max(1.0, inputs / max(1, tokens)))))


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds of what is done to those of a phase."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
