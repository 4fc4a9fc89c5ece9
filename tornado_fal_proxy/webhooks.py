"""Receive fal's webhooks, and believe only those that fal has signed.

Strategy. :func:`verify` is pure: a delivery is fal's when the signature (Ed25519), the time and the body agree.
:class:`WebhookKeys` keeps fal's public keys, and asks for them again when a signature is by none of these, but not
more often than once a minute: anyone can send a wrong signature. :class:`FalWebhookHandler` calls ``on_webhook`` once
for each job, because fal delivers again what was not answered in time, and others may send again what they have seen.

The signature covers four headers and the body, and nothing is read from any other header: whoever repeats a delivery
could write a bill there. So a delivery ends a job, and does not settle it.

Needs the extra ``webhooks``. Source: fal's page on webhooks.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from tornado.httpclient import AsyncHTTPClient
from tornado.httputil import HTTPHeaders
from tornado.web import Application, RequestHandler, stream_request_body

from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.relay.backend import shared_backend
from tornado_fal_proxy.rules.endpoints import is_request_id

__all__ = [
    "JWKS_URL",
    "FalWebhookHandler",
    "KeysUnavailable",
    "WebhookKeys",
    "WebhookRefused",
    "end_job",
    "parse_keys",
    "verify",
]

logger = logging.getLogger("tornado_fal_proxy")

JWKS_URL = "https://rest.fal.ai/.well-known/jwks.json"
# Limits how far the time of a delivery may be from this machine's.
MAX_AGE_S = 300
# The time for which keys are kept, as fal asks for, and between two attempts to get others.
KEPT_S, REFRESH_INTERVAL_S = 24 * 3600.0, 60.0
# Limits the wait for fal's keys, their size, and the body of a delivery: results are URLs, or images in base64.
FETCH_TIMEOUT_S, MAX_KEYS_BYTES, MAX_BODY_BYTES = 10.0, 65_536, 32 * 1024 * 1024
# Limits how long, and how many, jobs are remembered: fal delivers again for two hours.
SEEN_S, MAX_SEEN = 3 * 3600.0, 10_000

_PREFIX = "X-Fal-Webhook-"
_PLAIN = re.compile(r"[!-~]{1,200}")
_SIGNATURE = re.compile(r"[0-9a-fA-F]{128}")


class WebhookRefused(ValueError):
    """Refuse a delivery that is not fal's, or not of now. The text says why, and has nothing of the delivery."""


class KeysUnavailable(Exception):
    """Report that fal's public keys are not known and cannot be had."""


def verify(
    headers: HTTPHeaders, body: bytes, keys: Iterable[Ed25519PublicKey], now: float | None = None
) -> dict[str, Any]:
    """Return the event in a delivery that fal has signed with one of these keys. Raise WebhookRefused.

    ``now`` is the time in seconds since 1970, by default this machine's.
    """
    request_id, user_id, timestamp, signature = (
        _only(headers, name) for name in ("Request-Id", "User-Id", "Timestamp", "Signature")
    )
    if not timestamp.isascii() or not timestamp.isdigit() or len(timestamp) > 15:
        raise WebhookRefused("the timestamp is no number")
    if abs((time.time() if now is None else now) - int(timestamp)) > MAX_AGE_S:
        raise WebhookRefused(f"the timestamp is more than {MAX_AGE_S} s away from this machine's time")
    if not _SIGNATURE.fullmatch(signature):
        raise WebhookRefused("the signature is not 64 bytes in hexadecimal digits")
    message = "\n".join([request_id, user_id, timestamp, hashlib.sha256(body).hexdigest()]).encode()
    if not any(_is_signed(key, bytes.fromhex(signature), message) for key in keys):
        raise WebhookRefused("the signature is by none of fal's keys")
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise WebhookRefused("the body is no JSON object")
    return event


def parse_keys(document: bytes) -> list[Ed25519PublicKey]:
    """Return the Ed25519 keys in a JSON Web Key Set (RFC 7517, RFC 8037). Others are left out. Raise ValueError."""
    entries = json.loads(document)["keys"]
    keys = []
    for entry in entries:
        if isinstance(entry, dict) and (entry.get("kty"), entry.get("crv")) == ("OKP", "Ed25519"):
            with suppress(ValueError, TypeError):
                text = str(entry.get("x"))
                raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
                keys.append(Ed25519PublicKey.from_public_bytes(raw))
    return keys


async def end_job(application: Application, config: ProxyConfig, request_id: str) -> None:
    """End a queued job in the account, if nothing has ended it yet: its user may have another one at once.

    Its estimate stays, and its bill still settles it when its result is fetched. ``application`` and ``config`` are
    those of the FalProxyHandler that has submitted it. Call it before ``close_upstreams``. Without limits on spending,
    or for a job that is none of this proxy's, nothing happens. A store that fails is logged, and the job ends by itself
    after ``job_lifetime_s``.
    """
    if config.spending is not None and config.spending.needs_store and is_request_id(request_id):
        ledger = shared_backend(application, config).ledger
        await ledger.wait(ledger.end_job(request_id))


class WebhookKeys:
    """Keep fal's public keys, which come from ``url``. Use it on one loop."""

    def __init__(self, url: str = JWKS_URL, **options: Any) -> None:
        """Take the URL of the key set, and options of its request, as Tornado's HTTPRequest has them."""
        self._url, self._options = url, options
        self._keys: Sequence[Ed25519PublicKey] = ()
        self._fetched_at = self._tried_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def get(self, *, others: bool = False) -> Sequence[Ed25519PublicKey]:
        """Return the keys. With ``others`` fetch them again first, where that was not done in the last minute.

        Raise KeysUnavailable where there are none. Keys that cannot be fetched again stay.
        """
        now = time.monotonic()
        if others or now - self._fetched_at > KEPT_S:
            if self._fetching is None and now - self._tried_at > REFRESH_INTERVAL_S:
                self._tried_at = now
                self._fetching = asyncio.create_task(self._fetch())
            if self._fetching is not None:
                await asyncio.shield(self._fetching)
        if not self._keys:
            raise KeysUnavailable(f"webhooks: no keys from {self._url}")
        return self._keys

    async def _fetch(self) -> None:
        client = AsyncHTTPClient()
        try:
            response = await client.fetch(self._url, request_timeout=FETCH_TIMEOUT_S, **self._options)
            if len(response.body) > MAX_KEYS_BYTES or not (keys := parse_keys(response.body)):
                raise ValueError("the response has no key set")
            self._keys, self._fetched_at = keys, time.monotonic()
        except Exception as exc:  # noqa: BLE001  (Tornado's clients raise their libraries' errors; it is logged)
            logger.warning("webhooks: cannot get fal's keys from %s: %s: %s", self._url, type(exc).__name__, exc)
        finally:
            self._fetching = None


@stream_request_body
class FalWebhookHandler(RequestHandler):
    """Receive fal's webhooks: ``(r"/webhooks/fal", MyHandler)``. A subclass overrides :meth:`on_webhook`.

    The rule's arguments may have ``keys``, a WebhookKeys, and ``config``: with limits on spending a queued job ends
    with its webhook, should nobody fetch its result.
    """

    SUPPORTED_METHODS = ("POST",)

    def initialize(self, keys: WebhookKeys | None = None, config: ProxyConfig | None = None) -> None:
        """Take the arguments of the rule."""
        settings = self.application.settings
        self._keys: WebhookKeys = keys or settings.setdefault("fal_webhook_keys", WebhookKeys())
        self._seen: OrderedDict[str, tuple[float, bool]] = settings.setdefault("fal_webhooks_seen", OrderedDict())
        self._config = config
        self._body: list[bytes] = []
        self._size = 0

    async def on_webhook(self, event: dict[str, Any]) -> None:
        """Handle the event: ``request_id``, ``status`` (OK or ERROR), ``payload``. Called once for each job.

        When it raises, the response is 500, and fal delivers again.
        """
        raise NotImplementedError

    def check_xsrf_cookie(self) -> None:
        """Do nothing: the signature counts."""

    def data_received(self, chunk: bytes) -> None:
        """Collect a piece of the body, and throw away what is too large."""
        self._size += len(chunk)
        if self._size > MAX_BODY_BYTES:
            self._body.clear()
        else:
            self._body.append(chunk)

    async def post(self, *_args: str, **_kwargs: str) -> None:
        """Respond 200 to a delivery that was handled, now or before."""
        if self._size > MAX_BODY_BYTES:
            self._respond(413, "The body is too large.")
            return
        body = b"".join(self._body)
        try:
            event = await self._verified(body)
        except WebhookRefused as exc:
            logger.warning("webhooks: refused: %s", exc)
            self._respond(401, f"This is no webhook of fal's: {exc}.")
            return
        except KeysUnavailable:
            self._respond(503, "fal's keys are not known at the moment; try again.")
            return
        job_id = self.request.headers[f"{_PREFIX}Request-Id"]
        if (seen := self._seen.get(job_id)) is not None:
            handled = seen[1]  # else the first delivery is being handled now, and may fail
            self._respond(200 if handled else 503, "Known." if handled else "It is being handled; try again.")
            return
        self._remember(job_id, handled=False)
        try:
            if self._config is not None:
                await end_job(self.application, self._config, job_id)
            await self.on_webhook(event)
        except BaseException:
            self._seen.pop(job_id, None)  # fal delivers again
            raise
        self._remember(job_id, handled=True)
        self._respond(200, "Thank you.")

    async def _verified(self, body: bytes) -> dict[str, Any]:
        headers = self.request.headers
        keys = await self._keys.get()
        try:
            return verify(headers, body, keys)
        except WebhookRefused:
            if (others := await self._keys.get(others=True)) is keys:
                raise
            return verify(headers, body, others)

    def _remember(self, job_id: str, *, handled: bool) -> None:
        now = time.monotonic()
        while self._seen and (len(self._seen) >= MAX_SEEN or now - next(iter(self._seen.values()))[0] > SEEN_S):
            self._seen.popitem(last=False)
        self._seen[job_id] = now, handled

    def _respond(self, status: int, message: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"message": message}))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Respond as the proxy does, without anything of the exception."""
        self._respond(status_code, "The webhook was not handled." if status_code == 500 else self._reason)


def _only(headers: HTTPHeaders, name: str) -> str:
    """Return the value of a header that stands there once. Raise WebhookRefused."""
    values = headers.get_list(_PREFIX + name)
    if len(values) != 1 or not _PLAIN.fullmatch(values[0]):
        raise WebhookRefused(f"it needs the header {_PREFIX}{name} once")
    return values[0]


def _is_signed(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True
