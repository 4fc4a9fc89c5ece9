"""A character that the end of a chunk splits waits for its rest."""

import pytest

from tornado_fal_proxy.relay.response import split_utf8

SPLITS: list[tuple[bytes, bytes]] = [
    (b"", b""),
    (b"abc", b""),
    ("ü".encode(), b""),
    ("日".encode(), b""),
    ("🌊".encode(), b""),
    (b"a", "ü".encode()[:1]),
    (b"", "日".encode()[:1]),
    (b"a", "日".encode()[:2]),
    (b"a", "🌊".encode()[:1]),
    (b"a", "🌊".encode()[:2]),
    (b"", "🌊".encode()[:3]),
    (b"\xff", b""),
    (b"\x80\x80\x80\x80", b""),
    (b"a\x80", b""),
]


@pytest.mark.parametrize(("whole", "rest"), SPLITS)
def test_split_utf8(whole: bytes, rest: bytes) -> None:
    """Only the beginning of a character at the end of a chunk is kept back."""
    assert split_utf8(whole + rest) == (whole, rest)
