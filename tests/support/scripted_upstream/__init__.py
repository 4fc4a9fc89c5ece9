"""An upstream that tests script: an HTTPS server on loopback that can misbehave in every way.

Each request becomes an `Exchange` and a task that runs the test's handler with it. The handler responds piece by
piece, or resets, aborts, closes, or never responds: a handler that returns early leaves its exchange open.
Everything is real (sockets, TLS, ALPN, HTTP/2 flow control), because the tests are about libcurl's reaction to it.

Requests are parsed strictly, by h11 and h2, and a client that breaks HTTP is a failure of the test. Responses are not
checked: HTTP/1.1 is written by hand, and h2's checks of what it sends are off. The server runs in the
loop of the test, never retries, and has no time limit of its own except for TLS handshakes.
"""

from tests.support.scripted_upstream.exchange import Exchange, Gone, Headers
from tests.support.scripted_upstream.server import Handler, Upstream

__all__ = ["Exchange", "Gone", "Handler", "Headers", "Upstream"]
