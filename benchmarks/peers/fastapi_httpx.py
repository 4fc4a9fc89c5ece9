"""A relay with FastAPI and httpx, under uvicorn as ``fastapi[standard]`` installs it. Arguments: PORT CA_FILE."""

import os
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from benchmarks.calls import ROUTE
from benchmarks.peers.relaying import is_short, relayed, request_headers

PORT, CA_FILE = sys.argv[1:]
client = httpx.AsyncClient(
    verify=ssl.create_default_context(cafile=CA_FILE),
    timeout=None,
    limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with client:
        yield


app = FastAPI(lifespan=lifespan)


@app.api_route(ROUTE, methods=["GET", "POST"])
async def relay(request: Request) -> Response:
    upstream = await client.send(
        client.build_request(
            request.method,
            request.headers["x-fal-target-url"],
            headers=request_headers(request.headers, os.environ["FAL_KEY"]),
            content=await request.body(),
        ),
        stream=True,
    )
    headers = dict(relayed(upstream.headers.items()))
    if is_short(upstream.headers):
        content = await upstream.aread()
        await upstream.aclose()
        return Response(content, upstream.status_code, headers)

    async def body() -> AsyncIterator[bytes]:
        try:
            async for chunk in upstream.aiter_bytes():
                yield chunk
        finally:
            await upstream.aclose()

    return StreamingResponse(body(), upstream.status_code, headers)


uvicorn.run(app, host="127.0.0.1", port=int(PORT), backlog=4096, access_log=False, log_level="warning")
