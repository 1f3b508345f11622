"""python -m convert SRC DST: the same as `jaxprune convert`."""

import sys

from jaxprune.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
