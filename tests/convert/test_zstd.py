"""pyproject.toml installs backports.zstd for a Python whose standard library has no zstd, and only
there."""

import runpy
import sys
from types import ModuleType

import pytest

from convert import planes
from jaxprune.calibration import documents


@pytest.mark.parametrize("user", [planes, documents])
@pytest.mark.parametrize(
    ("version", "package", "other"),
    [((3, 14), "compression", "backports"), ((3, 13), "backports", "compression")],
)
def test_the_module_is_the_one_that_this_python_has(
    version: tuple[int, int],
    package: str,
    other: str,
    user: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent, module = ModuleType(package), ModuleType(f"{package}.zstd")
    parent.zstd, module.open, module.ZstdError = module, open, Exception  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", version)
        patch.setitem(sys.modules, package, parent)
        patch.setitem(sys.modules, module.__name__, module)
        patch.setitem(sys.modules, other, None)  # as if it were not installed
        patch.delitem(sys.modules, "convert.zstd", raising=False)
        assert user.__file__ and runpy.run_path(user.__file__)["zstd"] is module
