"""An upstream of raw bytes: an HTTPS server on loopback that follows a script, whatever HTTP says.

A script is a tuple of steps, and is followed once for each request, as soon as that is whole. A step is one of these:

* bytes, which are written as they are
* a function of the number of the request's stream, which returns such bytes. The frames of HTTP/2 are made by
  :func:`head`, :func:`data`, :func:`reset_stream`, :func:`goaway` and :func:`frame`
* a :class:`Do`: wait for something, or end the connection in one of the ways that TCP and TLS have

A request for which there is no script is answered with its own target, as :func:`own_response` returns it. Requests are
hardly checked. The server runs in the loop of the test. It has TLS in memory, because the transports of asyncio cannot
close half of a connection.
"""

from tests.support.bad_upstream.egress import EgressProxy
from tests.support.bad_upstream.script import (
    Do,
    Script,
    Step,
    block,
    chunked,
    data,
    drip,
    frame,
    goaway,
    head,
    many,
    own_response,
    reset_stream,
    response,
)
from tests.support.bad_upstream.server import BadUpstream

__all__ = [
    "BadUpstream",
    "Do",
    "EgressProxy",
    "Script",
    "Step",
    "block",
    "chunked",
    "data",
    "drip",
    "frame",
    "goaway",
    "head",
    "many",
    "own_response",
    "reset_stream",
    "response",
]
