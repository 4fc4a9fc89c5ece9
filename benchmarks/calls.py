"""The calls that are measured: the request of each, and the response that is expected.

Every response of the upstream follows from the request, so a lost, swapped or incomplete one is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BLOCK_BYTES", "FLOOR_RESPONSE", "RESPONSE_BYTES", "Call", "get", "poll", "post"]

ROUTE = "/api/fal/proxy"
# The sizes of responses and of blocks in large responses, as upstream.mjs has them.
RESPONSE_BYTES = 200
BLOCK_BYTES = 64 * 1024

# The response of the handler that relays nothing, to every request.
FLOOR_RESPONSE = b'{"padding": "'.ljust(RESPONSE_BYTES - 2, b"x") + b'"}'

# As fal's JavaScript SDK sends them from a browser.
_HEAD = """\
{method} {route} HTTP/1.1
host: app.example
user-agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0
accept: application/json
accept-language: en-US,en;q=0.5
content-type: application/json
x-fal-target-url: https://{host}{path}
connection: keep-alive
"""


@dataclass(frozen=True)
class Call:
    """The bytes of a request, and the body of the expected response; None if the client checks it in another way."""

    request: bytes
    response: bytes | None = None


def post(path: str, number: int, *, relayed: bool = True) -> Call:
    """Return a POST with ``number`` in its body, and so in its response. ``relayed`` is false for the floor."""
    body = (
        b'{"prompt":"a lighthouse","seed":%d}' % number
    )  # as JSON.stringify writes it, because some peers parse and write it again
    head = _head("POST", path) + f"content-length: {len(body)}\r\n\r\n".encode()
    response = (b'{"echo": %s, "padding": "' % body).ljust(RESPONSE_BYTES - 2, b"x") + b'"}'
    return Call(head + body, response if relayed else FLOOR_RESPONSE)


def get(path: str) -> Call:
    """Return a GET whose response is too large to be compared as a whole."""
    return Call(_head("GET", path) + b"\r\n")


def poll() -> Call:
    """Return a request for the status of a queued job that never ends."""
    response = b'{"echo": {"status":"IN_PROGRESS"}, "padding": "'.ljust(RESPONSE_BYTES - 2, b"x") + b'"}'
    return Call(_head("GET", "/bench/app/requests/1/status", "queue.fal.run") + b"\r\n", response)


def _head(method: str, path: str, host: str = "fal.run") -> bytes:
    return _HEAD.format(method=method, route=ROUTE, host=host, path=path).replace("\n", "\r\n").encode()
