"""Pruning methods, one per file.

A method prunes one kernel, given the Gram matrix of its inputs. It does not depend on models, files
or devices. `combine` builds methods from other methods: one method's mask with another's update, or
any method with a finish.
"""

import dataclasses
import sys
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float

from convert import plugins
from jaxprune.errors import InputError
from jaxprune.sparsity.patterns import Pattern

SELECTS = {"only": "mask"}
"""Metadata of an option that matters only if the method selects the mask. The command line does not
offer it for a method that only updates weights."""

UPDATES = {"only": "update"}
"""Metadata of an option that matters only if the method updates weights."""

HELPERS = ("combine", "gram", "linalg", "method_json", "quantization")
"""Modules that define no method."""

Gram = Float[Array, "n n"]
Kernel = Float[Array, "n m"]
Mask = Bool[Array, "n m"]


class Solution(NamedTuple):
    """A pruned kernel.

    Attributes:
        weight: [n, m], zero where the mask is False.
        mask: [n, m], True = kept.
        metrics: scalars to report.
    """

    weight: Kernel
    mask: Mask
    metrics: dict[str, Float[Array, ""]]


@runtime_checkable
class Method(Protocol):
    """A pruning method: a frozen dataclass, hence hashable. Its fields become command-line flags.

    `solve` itself is not jitted: it inspects the pattern in plain Python and calls jitted
    functions.
    """

    @property
    def per_output(self) -> bool:
        """Whether scores are compared within each output, as published, if the user does not
        choose."""
        ...

    def prepare(self, gram: Gram) -> Any:
        """Computes everything that depends only on the inputs, once for all kernels that share
        them.

        Args:
            gram: [n, n], XᵀX, float32.
        """
        ...

    def solve(self, prepared: Any, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        """Prunes one kernel.

        Args:
            prepared: the result of `prepare`.
            weight: [n, m], the dense kernel, in the Gram matrix's dtype.
            pattern: a pattern for which the method selects a mask, or the [n, m] mask itself, under
                which it only updates weights.
        """
        ...


Scalar = bool | int | float | str | None
"""The value of a method's option."""


@dataclasses.dataclass(frozen=True)
class NotInstalled:
    """A method that a recipe names but that cannot be created here, such as a missing plugin.

    It can be read, compared and printed; using it raises InputError.

    Attributes:
        name: the method's name.
        options: (name, value) of each option.
        reason: why it cannot be created.
    """

    name: str
    options: tuple[tuple[str, Scalar], ...]
    reason: str = dataclasses.field(compare=False)

    @property
    def per_output(self) -> bool:
        return False

    def prepare(self, gram: Gram) -> Any:
        raise InputError(self.reason)

    def solve(self, prepared: Any, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        raise InputError(self.reason)


def names() -> list[str]:
    """Returns the names of all methods."""
    return plugins.names(sys.modules[__name__])


def name_of(method: Any) -> str:
    """Returns a method's name: the name of its file or entry point."""
    if isinstance(method, NotInstalled):
        return method.name
    return plugins.name_of(sys.modules[__name__], type(method).__module__)


def load(name: str) -> type:
    """Returns the class of a method by its name.

    Raises:
        InputError: no method has this name.
    """
    module = plugins.load(sys.modules[__name__], name)
    (method,) = (
        value
        for value in vars(module).values()
        if dataclasses.is_dataclass(value)
        and isinstance(value, type)
        and hasattr(value, "solve")
        and value.__module__ == module.__name__
    )
    return method


def with_more_damping(method: Any, times: float) -> Any:
    """Returns a copy of a method with larger damping, including the methods that it contains.

    Args:
        method: a method, or a dataclass that contains methods.
        times: the factor. It applies to at least 1e-6 (of the mean diagonal), because float32 does
            not resolve less.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name == "damping":
            changes["damping"] = max(value, 1e-6) * times
        elif dataclasses.is_dataclass(value):
            changes[field.name] = with_more_damping(value, times)
    return dataclasses.replace(method, **changes)
