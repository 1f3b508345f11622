"""What runs of command lines need."""

from jaxprune.commands.plan import sizes_of as sizes_of_options
from jaxprune.commands.run_options import parse
from jaxprune.costs.run_sizes import RunSizes
from jaxprune.planning.estimate import Need, need
from jaxprune.sharding import ONE_DEVICE


def sizes_of(*line: object) -> RunSizes:
    """What a command line asks for."""
    return sizes_of_options(*parse([*map(str, line)]), ONE_DEVICE)


def need_of(*line: object) -> Need:
    """What its run needs, without compiling anything."""
    return need(sizes_of(*line), within=1e12)
