"""Fixtures: a small random checkpoint, text, and the project's data folder."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from xdist import is_xdist_controller

from tests.helpers import typecheck, xla

# What one process compiles the others take: those that pytest-xdist starts, and command lines.
CACHE = "JAX_COMPILATION_CACHE_DIR"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="jaxprune-tests-")
# what takes less is compiled as soon as read
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# PyTorch's and NumPy's threads would wait for those of the other processes, and they wait by
# running in circles.
os.environ["OMP_NUM_THREADS"] = "1"

# XLA takes a third of the time to compile without optimizing, without its newer code for fused
# loops, as long as it has the older, and on one thread where others have work too. Command lines in
# processes of their own have all that, unless `xla.quick` says otherwise.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ[xla.FLAGS] = " ".join(
        xla.known(
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_backend_optimization_level=0",
            "--xla_cpu_parallel_codegen_split_count=1",
        )
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepares the processes that run tests; the one that hands them out need not import anything
    of that."""
    if is_xdist_controller(session):
        return
    # Types in signatures are checked at every call. Shapes are where a module has any: that takes
    # many times as long.
    typecheck.install(Path(__file__).parents[1])
    flags = os.environ.get("XLA_FLAGS", "")
    # XLA takes a blank for the name of a file
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ[xla.FLAGS]}".strip()
    import jax

    jax.devices()  # reads the flags
    os.environ["XLA_FLAGS"] = flags
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = (
        []
        if os.environ.get("JAXPRUNE_SLOW")
        else [item for item in items if item.get_closest_marker("slow")]
    )
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    # What forks comes before this process grows; the longest tests are of the whole product: none
    # ends alone.
    whole = Path(__file__).parent
    items.sort(key=lambda item: (not item.get_closest_marker("forks"), item.path.parent != whole))


GIB = 2**30
forget_at = 2 * GIB


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Has what is left of a file's tests left out of later garbage collections: JAX keeps millions
    of objects.

    For each GiB that the process has grown it forgets them, and the programs that they belong to:
    there are hosts that take seconds to give a machine new memory.
    """
    global forget_at
    if nextitem and nextitem.path != item.path:
        import jax

        from jaxprune.planning.this_machine import peak_bytes

        if (peak := peak_bytes()["host"]) > forget_at:
            gc.unfreeze()
            jax.clear_caches()
            forget_at = peak + GIB
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 LLaMA of 3 layers with a tokenizer, as a Hugging Face folder."""
    from tests.helpers import tiny

    return tiny.save(tmp_path_factory.mktemp("checkpoint"), tiny.config())


@pytest.fixture(scope="session")
def data() -> Path:
    """Real text and tasks, as scripts/data.py makes them, where they are."""
    folder = os.environ.get("JAXPRUNE_DATA")
    if not folder:
        pytest.skip("JAXPRUNE_DATA names no data folder")
    return Path(folder)


@pytest.fixture(scope="session")
def stories_model(data: Path) -> Path:
    """A small trained model, where it is."""
    folder = data / "models/stories260K"
    if not folder.is_dir():
        pytest.skip("the data folder has no trained model")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 200 documents."""
    from tests.helpers import tiny

    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    tiny.write_text(path, documents=200)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"
