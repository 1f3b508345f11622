"""Pruning methods, one a file. A method knows one kernel and the Gram matrix of its inputs, nothing
else.

`combine` makes methods of methods: one's mask with another's update, or any method with a finish.
"""

import dataclasses
import sys
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float

from convert import plugins
from jaxprune.errors import InputError
from jaxprune.sparsity.patterns import Pattern

SELECTS = {"only": "mask"}
"""Metadata of a method's option that matters only where the method selects the mask; the command
line does not offer it where it only updates."""

UPDATES = {"only": "update"}
"""Metadata of a method's option that matters only where the method updates the weights."""

HELPERS = ("combine", "gram", "linalg", "quantization", "stored")
"""Modules that hold no method of their own."""

Gram = Float[Array, "n n"]
Kernel = Float[Array, "n m"]
Mask = Bool[Array, "n m"]


class Solution(NamedTuple):
    """A pruned kernel.

    Attributes:
        weight: [n, m], zero where the mask is False.
        mask: [n, m], True = kept.
        metrics: scalars that the method reports.
    """

    weight: Kernel
    mask: Mask
    metrics: dict[str, Float[Array, ""]]


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass (so hashable); its fields become flags.

    `solve` runs under no jit of its own: it may look at the pattern with plain Python and calls
    jitted functions.
    """

    @property
    def per_output(self) -> bool:
        """Whether the published method compares scores within each output; used where the user does
        not say."""
        ...

    def prepare(self, gram: Gram) -> Any:
        """Returns what depends on the inputs alone, made once for all kernels that share them.

        Args:
            gram: XᵀX, float32.
        """
        ...

    def solve(self, prepared: Any, weight: Kernel, pattern: Pattern | Mask) -> Solution:
        """Prunes one kernel.

        Args:
            prepared: what `prepare` gave.
            weight: the dense kernel, in the Gram matrix's dtype.
            pattern: a pattern that the method selects a mask of, or the mask itself, under which it
                only updates.
        """
        ...


Scalar = bool | int | float | str | None
"""The value of a method's option."""


@dataclasses.dataclass(frozen=True)
class NotInstalled:
    """A method that a recipe names and that cannot be made here: it is read and printed, not used.

    Attributes:
        name: its name.
        options: (name, value) of its options.
        reason: why it cannot be made.
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
    """Returns a method's name: its file's, or that of its entry point."""
    if isinstance(method, NotInstalled):
        return method.name
    return plugins.name_of(sys.modules[__name__], type(method).__module__)


def load(name: str) -> type:
    """Returns the method class of a file of this package.

    Raises:
        InputError: there is no such method.
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
    """Returns the method with all its dampings so many times as large, those of the methods it is
    made of included.

    A damping counts as at least 1e-6 of the mean diagonal here: below, float32 does not see it.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name == "damping":
            changes["damping"] = max(value, 1e-6) * times
        elif dataclasses.is_dataclass(value):
            changes[field.name] = with_more_damping(value, times)
    return dataclasses.replace(method, **changes)
