"""This proxy's handler in an application of its own, under Tornado's HTTPServer. Arguments: PORT CA_FILE [CONNECT_TO].

Nothing is set that an application would not set, and nobody logs, as in the other peers.
"""

import asyncio
import sys

from tornado.web import Application

from benchmarks.calls import ROUTE
from tornado_fal_proxy import FalProxyHandler, ProxyConfig


async def main() -> None:
    port, ca_file, *connect_to = sys.argv[1:]
    config = ProxyConfig(ca_certs=ca_file, connect_to=connect_to[0] if connect_to else None)
    rule = (ROUTE, FalProxyHandler, {"config": config})
    Application([rule], log_function=lambda handler: None).listen(int(port), "127.0.0.1", backlog=4096)
    await asyncio.Event().wait()


asyncio.run(main())
