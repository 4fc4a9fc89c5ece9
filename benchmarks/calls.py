"""The calls that are measured: what is sent, and what must come back.

Every answer of the upstream follows from the request, so one that is lost, swapped or cut is told from a right one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ANSWER_BYTES", "BLOCK_BYTES", "FLOOR_ANSWER", "Call", "get", "post"]

ROUTE = "/api/fal/proxy"
# As upstream.mjs has them.
ANSWER_BYTES = 200
BLOCK_BYTES = 64 * 1024

# What the handler that relays nothing answers, whatever was sent.
FLOOR_ANSWER = b'{"padding": "'.ljust(ANSWER_BYTES - 2, b"x") + b'"}'

# As fal's client sends them from a browser.
_HEAD = """\
{method} {route} HTTP/1.1
host: app.example
user-agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0
accept: application/json
accept-language: en-US,en;q=0.5
content-type: application/json
x-fal-target-url: https://fal.run{path}
connection: keep-alive
"""


@dataclass(frozen=True)
class Call:
    """The bytes of a request, and the body of its right answer; None where the caller checks it by other means."""

    request: bytes
    answer: bytes | None = None


def post(path: str, number: int, *, relayed: bool = True) -> Call:
    """A POST whose body, and so whose answer, bears ``number``. ``relayed`` is false for the floor."""
    body = b'{"prompt":"a lighthouse","seed":%d}' % number  # as JSON.stringify writes it, for some peers do again
    head = _head("POST", path) + f"content-length: {len(body)}\r\n\r\n".encode()
    answer = (b'{"echo": %s, "padding": "' % body).ljust(ANSWER_BYTES - 2, b"x") + b'"}'
    return Call(head + body, answer if relayed else FLOOR_ANSWER)


def get(path: str) -> Call:
    """A GET of what is too large, or too long, to be compared as a whole."""
    return Call(_head("GET", path) + b"\r\n")


def _head(method: str, path: str) -> bytes:
    return _HEAD.format(method=method, route=ROUTE, path=path).replace("\n", "\r\n").encode()
