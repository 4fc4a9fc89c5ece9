"""The common part of the relays written by hand: which headers go which way.

It is as short as such relays usually are, without the rules that make one safe.
"""

from collections.abc import Iterable, Iterator, Mapping

__all__ = ["MAX_BUFFERED_BYTES", "is_short", "relayed", "request_headers"]

# The largest response of known length that is sent whole, which is cheaper than a stream; as in this proxy.
MAX_BUFFERED_BYTES = 8 * 1024 * 1024

_NOT_RELAYED = frozenset({"connection", "content-encoding", "content-length", "keep-alive", "transfer-encoding"})


def request_headers(headers: Mapping[str, str], key: str) -> dict[str, str]:
    """Return the headers for fal of a call that arrived with ``headers``."""
    passed = {
        name: value
        for name, value in headers.items()
        if name.lower().startswith("x-fal-") and name.lower() != "x-fal-target-url"
    }
    return {
        **passed,
        "authorization": f"Key {key}",
        "content-type": "application/json",
        "accept": "application/json",
    }


def relayed(headers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the headers for the client."""
    return ((name, value) for name, value in headers if name.lower() not in _NOT_RELAYED)


def is_short(headers: Mapping[str, str]) -> bool:
    """Return whether a response with ``headers`` is sent whole."""
    return (
        int(headers.get("content-length", MAX_BUFFERED_BYTES + 1)) <= MAX_BUFFERED_BYTES
        and "content-encoding" not in headers
    )
