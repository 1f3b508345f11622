"""XLA's flags, which come and go with its versions."""

import os
import subprocess
import sys

FLAGS = "JAXPRUNE_TESTS_XLA_FLAGS"
"""The variable that holds the flags with which XLA compiles sooner, and what it makes runs slower."""


def quick() -> dict[str, str]:
    """An environment for processes in which compilation takes most of the time."""
    return {"XLA_FLAGS": os.environ[FLAGS]}


def knows(flag: str) -> bool:
    """Whether this version of XLA has a flag, given as `--name=value`.

    XLA ends a process that sets a flag unknown to it, so the question takes a process of its own. The names in the
    library's bytes do not answer it: those of removed flags stay there as reserved.
    """
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True)
    return done.returncode == 0
