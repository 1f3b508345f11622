"""Folders for what is compiled and downloaded, and how to continue where there is none."""

import atexit
import functools
import logging
import os
import shutil
import tempfile
from pathlib import Path

from convert.errors import CheckpointError
from convert.files import expand


def cache_folder() -> Path:
    """Returns $JAXPRUNE_CACHE, or jaxprune in the user's cache folder.

    Raises:
        CheckpointError: no home folder is known.
    """
    if chosen := os.environ.get("JAXPRUNE_CACHE"):
        return _expanded(chosen)
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jaxprune"


def hub_cache(wanted: str) -> Path:
    """Returns the folder in which huggingface_hub keeps repositories.

    Args:
        wanted: what is looked for there, for the error.

    Raises:
        CheckpointError: no home folder is known. huggingface_hub would make a folder named ~ in the
            current one.
    """
    from huggingface_hub import constants

    try:
        return _expanded(constants.HF_HUB_CACHE)
    except CheckpointError as error:
        raise CheckpointError(f"it cannot be downloaded: {error}", file=wanted) from None


def require_cache(folder: str | Path) -> Path:
    """Returns the folder, which is made where it is not there yet.

    Raises:
        CheckpointError: nothing can be written into it.
    """
    folder = _expanded(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the cache folder {folder} cannot be made ({error})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"the cache folder {folder} cannot be written")
    return folder


@functools.cache
def warn_without_cache(reason: str) -> None:
    """Logs once for each reason that a cache cannot be used."""
    logging.getLogger(__name__).warning("continuing without a cache: %s", reason)


@functools.cache
def temporary_cache(reason: str) -> Path:
    """Returns a folder of this process, in place of a cache that cannot be used; a warning says
    why."""
    warn_without_cache(reason)
    folder = Path(tempfile.mkdtemp(prefix="jaxprune-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _expanded(folder: str | Path) -> Path:
    if str(folder).startswith("~/") and os.path.expanduser("~") == "~":
        raise CheckpointError("no home folder is known: set HOME, or JAXPRUNE_CACHE and HF_HOME")
    return expand(folder)
