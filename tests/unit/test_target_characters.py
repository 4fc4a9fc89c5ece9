"""Each character by itself, in each part of a target."""

import pytest

from tornado_fal_proxy.errors import TargetRefused
from tornado_fal_proxy.rules.target import parse_target


def test_printable_ascii_passes_in_path_query_and_fragment() -> None:
    """All printable ASCII except the backslash passes in all three, and no other character does."""
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
    """A URL with any other character is refused, because one that ends the host leaves a host that is not fal's."""
    for code in range(0x3000):
        character = chr(code)
        url = f"https://a{character}b.fal.run/"
        if character in "abcdefghijklmnopqrstuvwxyz0123456789-.":
            assert parse_target(url).host == f"a{character}b.fal.run"
        else:
            with pytest.raises(TargetRefused):
                parse_target(url)
