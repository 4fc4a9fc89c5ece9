"""A relay written by hand with aiohttp's server and client. Arguments: PORT CA_FILE."""

import os
import ssl
import sys
from collections.abc import AsyncIterator

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

from benchmarks.calls import ROUTE
from benchmarks.peers.relaying import is_short, relayed, request_headers

PORT, CA_FILE = sys.argv[1:]
SESSION = web.AppKey("session", ClientSession)


async def relay(request: web.Request) -> web.StreamResponse:
    async with request.app[SESSION].request(
        request.method,
        request.headers["x-fal-target-url"],
        headers=request_headers(request.headers, os.environ["FAL_KEY"]),
        data=await request.read() or None,
        allow_redirects=False,
    ) as upstream:
        headers = dict(relayed(upstream.headers.items()))
        if is_short(upstream.headers):
            return web.Response(status=upstream.status, headers=headers, body=await upstream.read())
        response = web.StreamResponse(status=upstream.status, headers=headers)
        await response.prepare(request)
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def session(app: web.Application) -> AsyncIterator[None]:
    connector = TCPConnector(limit=0, ssl=ssl.create_default_context(cafile=CA_FILE))
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=None)) as app[SESSION]:
        yield


app = web.Application()
app.router.add_route("GET", ROUTE, relay)
app.router.add_route("POST", ROUTE, relay)
app.cleanup_ctx.append(session)
web.run_app(app, host="127.0.0.1", port=int(PORT), backlog=4096, access_log=None, print=None)
