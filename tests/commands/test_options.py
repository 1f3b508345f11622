"""Numbers on a command line are finite and of a size that can be used."""

import pytest

from jaxprune.commands.options import real, whole


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-7", -7), ("2147483647", 2**31 - 1)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole(text) == value


@pytest.mark.parametrize("text", ["", "x", "1.5", "nan", "inf", "1e3", "0x10", "2147483648", str(-(2**40)), "9" * 5000])
def test_what_is_no_whole_number_that_can_be_used(text: str) -> None:
    with pytest.raises(ValueError, match="no whole number|too large: at most 2147483647") as caught:
        whole(text)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("-1e3", -1000.0), ("7", 7.0)])
def test_numbers(text: str, value: float) -> None:
    assert real(text) == value


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf", "infinity", "1e999", "9" * 5000, "--"])
def test_what_is_no_finite_number(text: str) -> None:
    with pytest.raises(ValueError, match="is no finite number") as caught:
        real(text)
    assert len(str(caught.value)) < 100
