"""Data files of hub datasets, through the hub's cache."""

from pathlib import Path

from convert.cache import require_cache, temporary_cache
from convert.errors import CheckpointError
from jaxprune.errors import InputError


def fetch(repository: str, filename: str) -> Path:
    """Returns the local path of one file of a dataset, downloaded the first time; works offline
    once it is cached.

    Where the cache cannot be written the file is kept for this process only, and a warning is
    logged.

    Raises:
        InputError: it is not cached and the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(repository, filename, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repository, filename, repo_type="dataset", cache_dir=_cache()))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{filename} of the dataset {repository} is not in the hub's cache and the hub cannot "
            "be reached. Connect "
            "to it once, or pass a text file of your own, or wikipedia, which needs no hub"
        ) from error


def _cache() -> Path:
    from huggingface_hub import constants

    try:
        return require_cache(constants.HF_HUB_CACHE)
    except CheckpointError as error:
        return temporary_cache(str(error))
