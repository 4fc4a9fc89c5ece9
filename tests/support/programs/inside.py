"""An ``authorize`` for the tests that allows every call, and responds to /inside with the service's resources."""

import asyncio
import json

from tornado.web import HTTPError, RequestHandler

from tornado_fal_proxy.relay.backend import backends_of
from tornado_fal_proxy.rules.target import Target


def authorize(handler: RequestHandler, target: Target) -> bool:
    """Allow the call, or respond 418 with the resources as JSON."""
    if target.path != "/inside":
        return True
    (backend,) = backends_of(handler.application)
    resources = {
        "tasks": len(asyncio.all_tasks()),
        "calls": backend.slots.in_use,
        "transfers": len(backend.client._running),
        "waiting": backend.client._hosts.waiting,
    }
    raise HTTPError(418, reason=json.dumps(resources))
