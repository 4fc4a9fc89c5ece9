"""Each character by itself, in each part of a target."""

import pytest

from tornado_fal_proxy.errors import TargetRefused
from tornado_fal_proxy.policy import parse_target


def test_every_character_of_ascii_has_one_place() -> None:
    """In a path, a query and a fragment all printable ASCII passes but the backslash, and no other character does."""
    for code in range(256):
        character = chr(code)
        passes = "!" <= character <= "~" and character != "\\"
        for frame in ("https://fal.run/a{}b", "https://fal.run/?a{}b", "https://fal.run/#a{}b"):
            url = frame.format(character)
            if passes:
                assert parse_target(url).host == "fal.run"
            else:
                with pytest.raises(TargetRefused):
                    parse_target(url)


def test_in_a_host_only_lower_case_letters_digits_and_inner_hyphens_pass() -> None:
    """Any other character makes the URL refused; those that end a host leave one that is not fal's."""
    for code in range(0x3000):
        character = chr(code)
        url = f"https://a{character}b.fal.run/"
        if character in "abcdefghijklmnopqrstuvwxyz0123456789-.":
            assert parse_target(url).host == f"a{character}b.fal.run"
        else:
            with pytest.raises(TargetRefused):
                parse_target(url)
