"""Decode the bodies of fal's responses a bounded piece at a time.

Strategy. libcurl can decode, but it decodes at once all that it has read, whether its reader is paused or not: a few
bytes become 64 MB for each client that does not read. Therefore bodies arrive encoded, and the reader of a transfer
decodes as much as it takes. gzip and deflate are the standard library's. ``br`` is requested, and decoded, where the
package ``brotli`` is installed. A response in a coding that was not requested passes unchanged with its
``content-encoding``, because it is paid for.

Source: RFC 9110 section 8.4.1.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol

try:
    import brotli
except ImportError:  # an extra
    brotli = None
if not hasattr(getattr(brotli, "Decompressor", None), "can_accept_more_data"):  # before 1.2: no bound
    brotli = None

__all__ = ["ACCEPT_ENCODING", "Decoder", "Undecodable", "decoder_for"]

ACCEPT_ENCODING = b"accept-encoding: deflate, gzip, br" if brotli else b"accept-encoding: deflate, gzip"

# zlib's wbits: for a gzip header and trailer, for those of zlib, for none.
_GZIP, _ZLIB, _RAW = 31, 15, -15
_GZIP_MAGIC = b"\x1f\x8b"


class Undecodable(ValueError):
    """Report a body that is not in the coding that its head declares, or that ends too early."""


class Decoder(Protocol):
    """Decode one body. ``has_more`` is true while :meth:`decode` can return more without more data."""

    has_more: bool

    def decode(self, data: bytes, max_bytes: int) -> bytes:
        """Return about ``max_bytes`` decoded from ``data`` and what came before it. Raise Undecodable.

        While ``has_more`` is true ``data`` must be empty.
        """

    def end(self) -> None:
        """Note that there is no more data. Raise Undecodable where there should be, as in a body of no bytes."""


def decoder_for(coding: str) -> Decoder | None:
    """Return the decoder for the value of a content-encoding in lower case, None where there is none."""
    if coding in ("gzip", "x-gzip"):
        return _Zlib(_GZIP)
    if coding == "deflate":
        return _Deflate()
    return _Brotli() if coding == "br" and brotli else None


class _Zlib:
    def __init__(self, wbits: int) -> None:
        self.has_more = False
        self._wbits = wbits
        self._stream = zlib.decompressobj(wbits)
        self._rest = b""

    def decode(self, data: bytes, max_bytes: int) -> bytes:
        self._rest += data
        pieces = []
        while max_bytes > 0 and not (self._stream.eof and not self._begin_member()):
            piece = self._decompress(self._rest, max_bytes)
            pieces.append(piece)
            max_bytes -= len(piece)
            self._rest = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
            if not self._rest:
                break
        if self._stream.eof and not (self._wbits == _GZIP and _GZIP_MAGIC.startswith(self._rest[:2])):
            self._rest = b""
        self.has_more = max_bytes <= 0 or bool(self._rest and not self._stream.eof)
        return b"".join(pieces)

    def end(self) -> None:
        if self._rest or not self._stream.eof:
            raise Undecodable("it ends too early")

    def _decompress(self, data: bytes, max_bytes: int) -> bytes:
        try:
            return self._stream.decompress(data, max_bytes)
        except zlib.error as exc:
            raise Undecodable(str(exc)) from None

    def _begin_member(self) -> bool:
        """Tell whether another member of a gzip file follows (RFC 1952 section 2.2); other bytes are ignored."""
        if self._wbits != _GZIP or not self._rest.startswith(_GZIP_MAGIC):
            return False
        self._stream = zlib.decompressobj(_GZIP)
        return True


class _Deflate(_Zlib):
    """Decode deflate also without zlib's header (RFC 1950 section 2.2), which some servers omit."""

    def __init__(self) -> None:
        super().__init__(_ZLIB)
        self._first = b""

    def decode(self, data: bytes, max_bytes: int) -> bytes:
        if len(self._first) < 2:
            first, self._first = self._first, (self._first + data)[:2]
            if len(self._first) < 2:
                return b""
            data = first + data
            if self._first[0] & 15 != 8 or int.from_bytes(self._first, "big") % 31:
                self._stream = zlib.decompressobj(_RAW)
        return super().decode(data, max_bytes)


class _Brotli:
    def __init__(self) -> None:
        self.has_more = False
        self._stream: Any = brotli.Decompressor()

    def decode(self, data: bytes, max_bytes: int) -> bytes:
        if self._stream.is_finished():
            self.has_more = False
            return b""
        try:
            decoded: bytes = self._stream.process(data, output_buffer_limit=max_bytes)
        except brotli.error as exc:
            raise Undecodable(str(exc)) from None
        self.has_more = len(decoded) >= max_bytes or not self._stream.can_accept_more_data()
        return decoded

    def end(self) -> None:
        if not self._stream.is_finished():
            raise Undecodable("it ends too early")
