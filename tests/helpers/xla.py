"""XLA's flags, which come and go with its versions."""

import os
import subprocess
import sys

FLAGS = "JAXPRUNE_TESTS_XLA_FLAGS"
"""The variable that holds the flags with which XLA compiles sooner, and what it makes runs
slower."""


def quick() -> dict[str, str]:
    """An environment for processes in which compilation takes most of the time."""
    return {"XLA_FLAGS": os.environ[FLAGS]}


def known(*flags: str) -> list[str]:
    """Returns those of some flags, each as `--name=value`, that this version of XLA has.

    XLA ends a process that sets a flag unknown to it, so the question takes a process of its own.
    The names in the library's bytes do not answer it: those of removed flags stay there as
    reserved.
    """
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True
    )
    if done.returncode == 0:
        return list(flags)
    return [flag for one in flags for flag in known(one)] if len(flags) > 1 else []
