"""python -m jaxprune.run ...: the same as `jaxprune prune`."""

import sys

from jaxprune.__main__ import stop_at_once

if __name__ == "__main__":
    stop_at_once()

from jaxprune.commands.prune import main  # noqa: E402  its libraries take seconds

if __name__ == "__main__":
    sys.exit(main())
