"""A relay with Tornado's curl client and its defaults. Arguments: PORT CA_FILE CALLS_AT_ONCE."""

import asyncio
import os
import sys

from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.web import Application, RequestHandler

from benchmarks.calls import ROUTE
from benchmarks.peers.relaying import relayed, request_headers

PORT, CA_FILE, CALLS_AT_ONCE = sys.argv[1:]


class Relay(RequestHandler):
    async def relay(self) -> None:
        target = self.request.headers["x-fal-target-url"]
        response = await AsyncHTTPClient().fetch(
            HTTPRequest(
                target,
                self.request.method or "",
                request_headers(self.request.headers, os.environ["FAL_KEY"]),
                self.request.body if self.request.method == "POST" else None,
                ca_certs=CA_FILE,
                request_timeout=0,
                follow_redirects=False,
            ),
            raise_error=False,
        )
        self.set_status(response.code)
        for name, value in relayed(response.headers.get_all()):
            self.set_header(name, value)
        self.finish(response.body)

    get = post = relay


async def main() -> None:
    AsyncHTTPClient.configure("tornado.curl_httpclient.CurlAsyncHTTPClient", max_clients=int(CALLS_AT_ONCE))
    Application([(ROUTE, Relay)]).listen(int(PORT), "127.0.0.1", backlog=4096)
    await asyncio.Event().wait()


asyncio.run(main())
