"""What a service holds, as it tells who asks for /inside: an ``authorize`` for the tests, which lets everybody in."""

import asyncio
import json

from tornado.web import HTTPError, RequestHandler

from tornado_fal_proxy.relay.backend import _backends
from tornado_fal_proxy.rules.target import Target


def authorize(handler: RequestHandler, target: Target) -> bool:
    if target.path != "/inside":
        return True
    (backend,) = _backends[handler.application].values()
    client = backend.client
    held = {
        "tasks": len(asyncio.all_tasks()),
        "calls": client.in_flight,
        "transfers": len(client._running),
        "waiting": client._hosts.waiting,
    }
    raise HTTPError(418, reason=json.dumps(held))
