"""Deliver webhooks as fal does: signed, and again when they are not answered with 200.

Strategy. No call leaves this machine, so only addresses of this machine get a delivery. The key is made anew in each
sandbox, and its public part is at ``/sandbox/jwks.json`` of the proxy's application, where fal has its own at another
address.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tornado.httpclient import AsyncHTTPClient, HTTPError
from tornado.web import RequestHandler

__all__ = ["Deliveries", "KeySet"]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# Limits a delivery, and how often it is tried: as fal, but without its pauses of minutes.
TIMEOUT_S, ATTEMPTS, PAUSE_S = 15.0, 3, 1.0
# The user that the headers name.
USER = "sandbox"


def is_here(url: str) -> bool:
    """Return whether a URL is on this machine."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and parts.hostname in LOOPBACK
    except ValueError:
        return False


class Deliveries:
    """The key of a sandbox, and what it delivers."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._running: set[asyncio.Task[None]] = set()

    def key_set(self) -> bytes:
        """Return the public key as a JSON Web Key Set (RFC 8037)."""
        text = base64.urlsafe_b64encode(self._key.public_key().public_bytes_raw()).rstrip(b"=").decode()
        return json.dumps({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "sandbox", "x": text}]}).encode()

    def deliver(self, url: str, request_id: str, event: dict[str, object]) -> None:
        """Begin to deliver an event to a URL of this machine. Any other gets none."""
        if is_here(url):
            task = asyncio.create_task(self._deliver(url, request_id, json.dumps(event).encode()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def close(self) -> None:
        """Stop to deliver."""
        for task in self._running:
            task.cancel()

    async def _deliver(self, url: str, request_id: str, body: bytes) -> None:
        client = AsyncHTTPClient()
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(attempt * PAUSE_S)
            try:
                await client.fetch(
                    url, method="POST", body=body, headers=self._headers(request_id, body), request_timeout=TIMEOUT_S
                )
            except (HTTPError, OSError):
                continue
            return

    def _headers(self, request_id: str, body: bytes) -> dict[str, str]:
        at = str(int(time.time()))
        message = "\n".join([request_id, USER, at, hashlib.sha256(body).hexdigest()])
        return {
            "Content-Type": "application/json",
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": USER,
            "X-Fal-Webhook-Timestamp": at,
            "X-Fal-Webhook-Signature": self._key.sign(message.encode()).hex(),
        }


class KeySet(RequestHandler):
    """The public key of the sandbox."""

    SUPPORTED_METHODS = ("GET",)

    def initialize(self, deliveries: Deliveries) -> None:
        self.deliveries = deliveries

    def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(self.deliveries.key_set())
