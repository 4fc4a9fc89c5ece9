"""Reset each connection as soon as the first record of a request has come, and print a line for each such request.

A process of its own can do so while the proxy still writes. The program gets a file with key and certificate, and
prints its address first.
"""

import socket
import ssl
import sys
from contextlib import suppress

from tests.support.bad_upstream.server import RST_ON_CLOSE


def main() -> None:
    """Serve until the process is killed."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sys.stdout.write("{}:{}\n".format(*listener.getsockname()))
        sys.stdout.flush()
        while True:
            connection, _ = listener.accept()
            came = b""
            with suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
                came = tls.recv(65536)
            if came:
                sys.stdout.write("a request\n")
                sys.stdout.flush()


main()
