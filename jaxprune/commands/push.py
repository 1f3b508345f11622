"""Send a checkpoint to the hub, with its model card."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.filesize import decimal

from convert import open_checkpoint
from convert.errors import Change, CheckpointError
from convert.files import expand
from convert.hub import http_errors
from jaxprune.commands.command_line import CommandLine, Section, make
from jaxprune.commands.terminal import command, console, print_table
from jaxprune.reporting.hub_upload import Publication, publication, require_repository

EXAMPLES = """Examples:

    jaxprune push ./pruned me/llama-7b-2of4 --dry-run
    jaxprune push ./pruned me/llama-7b-2of4 --public --base-model huggyllama/llama-7b"""
HTTP_ERRORS = http_errors()
RAISED: tuple[type[Exception], ...] = (RuntimeError, *HTTP_ERRORS)
"""The errors of an upload. That of a large file is a RuntimeError with the cause attached."""
EMPTY = {".gitattributes", "README.md"}
"""The files of a new repository without content."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to send, and who can see it."""

    public: bool = False
    """Create a public repository (default: a private one). An existing repository must match."""
    base_model: str | None = None
    """The dense model's repository on the hub (default: --ckpt of the run, if it is one)."""
    license: str | None = None
    """The licence, by the hub's name, such as apache-2.0 (default: the base model's)."""
    overwrite: bool = False
    """Add a commit to a repository that already has files."""
    dry_run: bool = False
    """Print what would be sent, and send nothing."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs a command line."""
    given = CommandLine(argv, __name__).read(
        Section("The repository", Options),
        positionals={"checkpoint": "A folder.", "repository": "owner/name."},
    )
    wanted = make(Options, given)
    folder, repository = expand(given["checkpoint"]), given["repository"]
    require_repository(repository)
    if not folder.is_dir():
        raise CheckpointError("it is no folder", file=folder, wanted="the folder of a checkpoint")
    open_checkpoint(folder, check=False)
    licence_of = (lambda base: None) if wanted.dry_run else _licence_of  # of which the hub is asked
    content = publication(folder, repository, wanted.base_model, wanted.license, licence_of)
    _show(content)
    where = f"{repository}, {'public' if wanted.public else 'private'}"
    if wanted.dry_run:
        console.print(f"nothing was sent; without --dry-run it would go to {where}")
        return
    console.print(f"sent: {_send(content, repository, wanted)} ({where})")


def _show(content: Publication) -> None:
    print_table([(name, decimal(content.size(name))) for name in content.files], ("file", "size"))
    console.print(
        f"in all {decimal(sum(map(content.size, content.files)))}; the card says of the model:"
    )
    data = content.card.data
    console.print(data.to_yaml())
    for flag, found in (("--base-model", data.base_model), ("--license", data.license)):
        if not found:
            console.print(f"nothing says it, so the hub will not show it: {flag}")


def _licence_of(base: Any) -> str | None:
    """Returns the licence of a base model on the hub; None where it is not there, or says none."""
    from huggingface_hub import HfApi

    if not isinstance(base, str):
        return None
    try:
        return getattr(HfApi().model_info(base).card_data, "license", None)
    except HTTP_ERRORS:
        return None


def _send(content: Publication, repository: str, wanted: Options) -> str:
    """Sends it in one commit; returns the address of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi(library_name="jaxprune")
    try:
        if hub.repo_exists(repository):
            info = hub.model_info(repository)
            if info.private == wanted.public:
                visibility, change = ("private", Change.OMIT) if info.private else ("public", True)
                raise CheckpointError(
                    f"the repository is {visibility} already",
                    file=repository,
                    options={"public": change},
                )
            there = {file.rfilename for file in info.siblings or ()} - EMPTY
            if there and not wanted.overwrite:
                raise CheckpointError(
                    f"the repository has {len(there)} files already",
                    file=repository,
                    options={"overwrite": True},
                )
        else:
            hub.create_repo(repository, private=not wanted.public)
        additions = [CommitOperationAdd(name, file) for name, file in content.files.items()]
        return str(
            hub.create_commit(repository, additions, commit_message="Pruned by jaxprune").commit_url
        )
    except RAISED as error:
        found = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(found, HTTP_ERRORS):
            raise
        status = getattr(getattr(found, "response", None), "status_code", None)
        reason = (str(found).strip().splitlines() or [type(found).__name__])[-1][:300]
        hint = ": run `hf auth login` with a token that may write" if status in (401, 403) else ""
        problem = (
            f"the hub refused it ({reason}){hint}"
            if status
            else f"the hub cannot be reached ({reason})"
        )
        raise CheckpointError(problem, file=repository) from error
