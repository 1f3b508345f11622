"""A process of its own for a measurement, so that no other's memory, threads or settings are in
it."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def alone(function: Callable[..., Result], *arguments: object) -> Result:
    """What the function returns, called in a new process. Function, arguments and result are
    pickled.

    Raises:
        BrokenProcessPool: if the process dies, for lack of memory for example.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
