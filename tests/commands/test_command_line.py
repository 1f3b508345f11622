"""Numbers on a command line are finite and of a size that can be used; no two flags have one
name."""

import dataclasses

import pytest

from jaxprune import InputError, methods
from jaxprune.__main__ import main
from jaxprune.commands.command_line import CommandLine, Section, real, whole


@dataclasses.dataclass(frozen=True)
class Noise:
    """Options of a method."""

    seed: int = 0
    """The seed of the noise."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Options of a run."""

    seed: int = 0
    """The seed of the text."""
    length: int = 8
    """The length of the text."""


@pytest.mark.parametrize("positional", ["file", "seed"])
def test_two_flags_of_one_name_are_an_error(positional: str) -> None:
    first = (
        "and one of 'Text'" if positional == "file" else "one of 'jaxprune draw' and one of 'Noise'"
    )
    with pytest.raises(
        InputError, match=f"two flags of jaxprune draw have the name --seed, .*{first}: rename"
    ):
        CommandLine(["x", "--seed", "3"], "draw").read(
            Section("Noise", Noise), Section("Text", Text), positionals={positional: "A file."}
        )


def test_what_is_given_arrives_and_nothing_else() -> None:
    found = CommandLine(["--length", "3"]).read(Section("Text", Text))
    assert found == {"length": 3}


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("command", ["prune", "plan", "snapshot", "solve"])
def test_no_method_has_an_option_of_a_commands_name(
    command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (["--method", name], ["--mask", name], ["--update", name]):
        with pytest.raises(SystemExit, match="^0$"):
            main([command, *line, "--help"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-7", -7), ("2147483647", 2**31 - 1)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "nan", "inf", "1e3", "0x10", "2147483648", str(-(2**40)), "9" * 5000]
)
def test_what_is_no_whole_number_that_can_be_used(text: str) -> None:
    with pytest.raises(ValueError, match="no whole number|too large: at most 2147483647") as caught:
        whole(text)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("-1e3", -1000.0), ("7", 7.0)])
def test_numbers(text: str, value: float) -> None:
    assert real(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "nan", "inf", "-inf", "infinity", "1e999", "9" * 5000, "--"]
)
def test_what_is_no_finite_number(text: str) -> None:
    with pytest.raises(ValueError, match="is no finite number") as caught:
        real(text)
    assert len(str(caught.value)) < 100
