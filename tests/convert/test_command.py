"""What all command lines share."""

import logging
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from convert.command import STOPPED, run


def test_a_warning_is_one_line_whatever_handlers_libraries_install(
    capsys: pytest.CaptureFixture,
) -> None:
    other = logging.StreamHandler(sys.stderr)

    def command(argv: Sequence[str]) -> None:
        logging.getLogger().addHandler(other)  # as Orbax does when it is imported
        logging.getLogger("convert.somewhere").warning("%s is odd\n\x1b[2J", argv[0])

    try:
        for _ in range(2):
            assert run(command, ["x"]) == (0, "")
            assert capsys.readouterr().err == "warning: x is odd; \\x1b[2J\n"
    finally:
        logging.getLogger().removeHandler(other)


def test_what_orbax_leaves_behind_is_passed_over_and_nothing_else(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_on = []
    monkeypatch.setattr(sys, "unraisablehook", passed_on.append)
    for _ in range(2):
        assert run(lambda argv: 0, []) == (0, "")
    others = [
        SimpleNamespace(exc_value=error)
        for error in (RuntimeError("x"), ValueError("Event loop is closed"))
    ]
    for found in [SimpleNamespace(exc_value=RuntimeError("Event loop is closed")), *others]:
        sys.unraisablehook(found)  # type: ignore[arg-type]
    assert passed_on == others and capsys.readouterr().err == ""


def test_a_stop_that_python_ignores_is_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    """As where a signal arrives while the garbage collector's callback runs."""

    class Finalized:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def command(argv: Sequence[str]) -> int:
        Finalized()
        time.sleep(60)
        return 0

    assert run(command, [])[0] == STOPPED
    assert capsys.readouterr().err == "stopped\n"
