"""What one phase of a run costs."""

import dataclasses
from collections.abc import Iterable, Mapping

from jaxprune.costs.program import Program


@dataclasses.dataclass(frozen=True)
class PhaseCosts:
    """What a phase of a run costs, beside what all of them need.

    Attributes:
        programs: its compiled programs. A plan has a row for each `Program.phase`.
        states: bytes of the hidden states that are on the host at a time, of all processes.
        transfers: row of the plan -> bytes to all devices and back.
        host: other bytes in host memory.
        disk: what -> bytes on the output's disk at most, until the run ends.
    """

    programs: Iterable[Program]
    states: int
    transfers: Mapping[str, float]
    host: float = 0.0
    disk: Mapping[str, int] = dataclasses.field(default_factory=dict)
