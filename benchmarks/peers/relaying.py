"""What the relays written by hand have in common: which headers go which way.

As short as such relays are; the rules that make one safe are not in it.
"""

from collections.abc import Iterable, Iterator, Mapping

__all__ = ["HELD_BYTES", "is_short", "relayed", "request_headers"]

# An answer of known length up to this goes out whole, which is cheaper than a stream.
HELD_BYTES = 8 * 1024 * 1024

_NOT_RELAYED = frozenset({"connection", "content-encoding", "content-length", "keep-alive", "transfer-encoding"})


def request_headers(headers: Mapping[str, str], key: str) -> dict[str, str]:
    """The headers for fal of a call that came with ``headers``."""
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
    """The headers for the caller."""
    return ((name, value) for name, value in headers if name.lower() not in _NOT_RELAYED)


def is_short(headers: Mapping[str, str]) -> bool:
    return int(headers.get("content-length", HELD_BYTES + 1)) <= HELD_BYTES and "content-encoding" not in headers
