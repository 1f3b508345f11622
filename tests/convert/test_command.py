"""What all command lines share."""

import logging
import sys
from collections.abc import Sequence

import pytest

from convert.command import run


def test_a_warning_is_one_line_whatever_handlers_libraries_install(capsys: pytest.CaptureFixture) -> None:
    other = logging.StreamHandler(sys.stderr)

    def command(argv: Sequence[str]) -> None:
        logging.getLogger().addHandler(other)  # as Orbax does when it is imported
        logging.getLogger("convert.somewhere").warning("%s is odd\n\x1b[2J", argv[0])

    try:
        for _ in range(2):
            assert run(command, ["x"]) == 0
            assert capsys.readouterr().err == "warning: x is odd; \\x1b[2J\n"
    finally:
        logging.getLogger().removeHandler(other)
