"""python -m jaxprune.run ...: the same as `jaxprune prune`."""

import sys

from jaxprune.commands.prune import main

if __name__ == "__main__":
    sys.exit(main())
