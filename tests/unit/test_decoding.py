"""Encoded responses: decoded in any pieces, no more at a time than is read, and an error when they are broken."""

import gzip
import subprocess
import sys
import zlib

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tornado_fal_proxy.upstream.decoding import Undecodable, decoder_for


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


# A content-encoding, and a function that encodes in it.
ENCODERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "gzip in members": lambda data: gzip.compress(data[:7]) + gzip.compress(b"") + gzip.compress(data[7:]),
    "deflate": zlib.compress,
    "deflate without zlib's header": raw_deflate,
    "br": brotli.compress,
}


def decode(coding: str, pieces: list[bytes], max_bytes: int) -> tuple[bytes, int]:
    """Return all of the body, and the size of its largest piece."""
    decoder = decoder_for(coding)
    assert decoder is not None
    decoded, largest = b"", 0
    for piece in pieces:
        part = decoder.decode(piece, max_bytes)
        decoded, largest = decoded + part, max(largest, len(part))
        while decoder.has_more:
            part = decoder.decode(b"", max_bytes)
            decoded, largest = decoded + part, max(largest, len(part))
    decoder.end()
    return decoded, largest


@pytest.mark.slow
@settings(deadline=None)  # 200,000 bytes in pieces of one take their time
@given(st.data())
def test_any_pieces_are_decoded_to_the_same_body(data: st.DataObject) -> None:
    """A body that arrives in any pieces, and is read in any, is the body that was encoded."""
    name = data.draw(st.sampled_from(sorted(ENCODERS)))
    plain = data.draw(st.one_of(st.binary(max_size=300), st.integers(0, 200_000).map(bytes)))
    encoded = ENCODERS[name](plain)
    size = data.draw(st.integers(1, len(encoded) + 1))
    pieces = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    decoded, _ = decode(name.split()[0], pieces, data.draw(st.integers(1, 70_000)))
    assert decoded == plain


@pytest.mark.parametrize("name", list(ENCODERS))
def test_no_piece_is_larger_than_was_asked_for(name: str) -> None:
    """No piece is larger than was asked for by more than brotli's largest step."""
    plain = bytes(5_000_000)
    decoded, largest = decode(name.split()[0], [ENCODERS[name](plain)], 10_000)
    assert decoded == plain
    assert largest <= 10_000 + 65_536


def test_many_members_cost_no_depth() -> None:
    """Thousands of members of a gzip file are decoded without recursion, and nothing between them is lost."""
    assert decode("gzip", [gzip.compress(b"a") * 3000], 100_000)[0] == b"a" * 3000


@pytest.mark.parametrize("name", [name for name in ENCODERS if "members" not in name])
def test_a_body_that_ends_too_early_is_an_error(name: str) -> None:
    """A body that ends too early is not taken for a shorter one, and one that never began not for an empty one."""
    encoded = ENCODERS[name](b"some text" * 100)
    for end in range(len(encoded)):
        with pytest.raises(Undecodable):
            decode(name.split()[0], [encoded[:end]] if end else [], 10_000)
    assert decode(name.split()[0], [ENCODERS[name](b"")], 10_000) == (b"", 0)


def test_a_cut_in_the_first_bytes_of_a_member_is_an_error() -> None:
    """The end may come between two members only. Bytes that begin no member, and what follows deflate, are ignored."""
    member = gzip.compress(b"a")
    for end in range(1, len(member)):
        with pytest.raises(Undecodable):
            decode("gzip", [member, member[:end]], 100)
    assert decode("gzip", [member + bytes(20)], 100)[0] == b"a"
    assert decode("deflate", [zlib.compress(b"a") + member[:1]], 100)[0] == b"a"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_a_body_that_is_not_in_its_coding_is_an_error(coding: str) -> None:
    """A body that is not in the coding that its head declares is an error."""
    with pytest.raises(Undecodable):
        decode(coding, [b"this is not encoded"], 10_000)


def test_without_the_package_brotli_is_not_requested() -> None:
    """Without the package, or with a version that has no bound, brotli is neither requested nor decoded."""
    for brotli_is in ("None", "type(sys)('brotli')"):
        script = f"import sys; sys.modules['brotli'] = {brotli_is}; import tornado_fal_proxy.upstream.decoding as d; "
        script += "print(d.ACCEPT_ENCODING.decode(), d.decoder_for('br'))"
        output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
        assert output == "accept-encoding: deflate, gzip None\n"
