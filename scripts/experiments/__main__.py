"""python scripts/experiments NAME ...: the paper's figures and tables; see reproduce.py."""

import sys

from reproduce import main

from convert import CheckpointError
from jaxprune import InputError

if __name__ == "__main__":
    try:
        main()
    except (InputError, CheckpointError) as error:
        sys.exit(f"error: {error}")
