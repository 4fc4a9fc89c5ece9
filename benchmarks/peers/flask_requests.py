"""A relay with Flask and requests, to be run by gunicorn with threads. CA_FILE and FAL_KEY are in the environment.

Each call makes a connection of its own, as examples of such relays do.
"""

import os
from collections.abc import Iterator

import requests
from flask import Flask, Response, request

from benchmarks.calls import ROUTE
from benchmarks.peers.relaying import is_short, relayed, request_headers

app = Flask(__name__)


@app.route(ROUTE, methods=["GET", "POST"])
def relay() -> Response:
    upstream = requests.request(
        request.method,
        request.headers["x-fal-target-url"],
        headers=request_headers(request.headers, os.environ["FAL_KEY"]),
        data=request.get_data(),
        verify=os.environ["CA_FILE"],
        stream=True,
        timeout=None,
    )
    short = is_short(upstream.headers)
    body: bytes | Iterator[bytes] = upstream.content if short else upstream.iter_content(None)
    return Response(body, upstream.status_code, list(relayed(upstream.headers.items())))
