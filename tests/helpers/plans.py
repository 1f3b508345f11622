"""What runs of command lines need."""

from jaxprune.commands.plan import work_of as work_of_options
from jaxprune.commands.run_options import parse
from jaxprune.planning.preflight import need
from jaxprune.planning.work import Need, Work
from jaxprune.sharding import ONE_DEVICE


def work_of(*line: object) -> Work:
    """What a command line asks for."""
    return work_of_options(*parse([*map(str, line)]), ONE_DEVICE)


def need_of(*line: object) -> Need:
    """What its run needs, without compiling anything."""
    return need(work_of(*line), within=1e12)
