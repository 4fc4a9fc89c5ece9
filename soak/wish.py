"""What a call asks the upstream for, and what must come of it: the one thing that both sides know.

Every right answer follows from the request alone, so one that is lost, swapped or cut is told from it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

__all__ = ["ROLES", "Wish", "speaks_http2"]

# Hosts of fal's by what they are called for, two of each: one speaks HTTP/2, the other HTTP/1.1. Where whole
# connections break, others that use them are harmed; so that has hosts of its own.
ROLES = {
    "calm": ("fal.run", "queue.fal.run"),
    "going": ("going-0.fal.run", "going-1.fal.run"),
    "breaking": ("breaking-0.fal.run", "breaking-1.fal.run"),
}


def speaks_http2(host: str, generation: int) -> bool:
    """With each restart of the upstream the two change places."""
    return (next(hosts.index(host) for hosts in ROLES.values() if host in hosts) + generation) % 2 == 0


@dataclass(frozen=True)
class Wish:
    """A call, and how it is to be answered, as its target's path says it.

    ``how`` is a case in ``upstream.respond``; ``size`` how many bytes the answer has at least, or how many events. The
    upstream waits for ``pause_ms`` before it, or before each of them.
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
    def of(cls, path: bytes) -> Wish:
        _, how, *numbers = path.decode().split("/")
        return cls(how, *map(int, numbers))

    def events(self) -> list[bytes]:
        """Their text has characters of several bytes."""
        return [f'data: {{"id": {self.number}, "n": {n}, "text": "日本"}}\n\n'.encode() for n in range(self.size)]

    def answer(self, body: bytes) -> bytes:
        """The whole body of the right answer to a request with that body."""
        if self.how == "stream":
            return b"".join(self.events())
        start = b'{"id": %d, "got": %d, "fill": "' % (self.number, zlib.crc32(body))
        return start + (b"%08d" % self.number) * (self.size // 8) + b'"}'
