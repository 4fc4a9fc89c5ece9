"""A call's scenario: how the upstream responds to it, and which response is the right one. Both sides share it.

Every right response follows from the request alone, which shows one that is lost, swapped or incomplete.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

__all__ = ["ROLES", "Scenario", "speaks_http2"]

# Hosts of fal's by the calls that they serve, two of each: one speaks HTTP/2, the other HTTP/1.1. Whole connections
# that break harm other calls on them, so scenarios that break connections have hosts of their own.
ROLES = {
    "calm": ("fal.run", "queue.fal.run"),
    "going": ("going-0.fal.run", "going-1.fal.run"),
    "breaking": ("breaking-0.fal.run", "breaking-1.fal.run"),
}


def speaks_http2(host: str, generation: int) -> bool:
    """Tell whether a host speaks HTTP/2. With each restart of the upstream the two hosts of a role swap."""
    return (next(hosts.index(host) for hosts in ROLES.values() if host in hosts) + generation) % 2 == 0


@dataclass(frozen=True)
class Scenario:
    """A call and the way to respond to it, as the path of its target has it.

    ``how`` is a case in ``upstream.respond``. ``size`` is the least number of bytes in the response, or the number of
    its events. The upstream waits for ``pause_ms`` before the response, or before each event.
    """

    how: str
    number: int
    size: int = 0
    pause_ms: int = 0
    status: int = 200

    @property
    def path(self) -> str:
        return f"/{self.how}/{self.number}/{self.size}/{self.pause_ms}/{self.status}"

    @classmethod
    def from_path(cls, path: bytes) -> Scenario:
        """Return the scenario that has this ``path``."""
        _, how, *numbers = path.decode().split("/")
        return cls(how, *map(int, numbers))

    def events(self) -> list[bytes]:
        """Return the events of a stream, whose text has characters of several bytes."""
        return [f'data: {{"id": {self.number}, "n": {n}, "text": "日本"}}\n\n'.encode() for n in range(self.size)]

    def response_body(self, body: bytes) -> bytes:
        """Return the whole body of the right response to a request with ``body``."""
        if self.how == "stream":
            return b"".join(self.events())
        start = b'{"id": %d, "got": %d, "fill": "' % (self.number, zlib.crc32(body))
        return start + (b"%08d" % self.number) * (self.size // 8) + b'"}'
