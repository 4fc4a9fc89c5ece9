"""Record the facts of one call for logs and metrics.

Strategy. The handler notes a few facts on a :class:`Call` while it serves the call. When all is known it passes the
:class:`Call` once to ``FalProxyHandler.on_call_end``. The relay itself formats and counts nothing: a line of the log is
made where one is written. Texts that a client or fal has sent are shown only if they are plain, printable and short.
"""

from __future__ import annotations

import random
import re
import time
from decimal import Decimal
from typing import Any

from tornado_fal_proxy.errors import ClientDisconnected, ProxyError, UpstreamError
from tornado_fal_proxy.rules.headers import ResponseHead
from tornado_fal_proxy.rules.target import Target

__all__ = ["REQUEST_ID", "Call", "request_id"]

REQUEST_ID = "X-Request-Id"

# Limits a request id to what load balancers and tracing libraries make: no character that a log or terminal interprets.
_ID = re.compile(r"[0-9A-Za-z._:+/=@-]{1,128}")
# The methods that have names of their own in logs and metrics. All others, which are always refused, are "other".
METHODS = ("GET", "POST", "PUT", "OPTIONS")
# Limits a target and a detail in the log: longer than any endpoint of fal's, and short enough for a line.
_MAX_CHARS = 200


def request_id(given: str | None) -> str:
    """Return the client's own id for its call (``x-request-id``) if its characters allow that, else a new one."""
    return given if given is not None and _ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


class Call:
    """Hold what is known of one call of a client, from its head to its end.

    ``target`` is None while the URL at fal is not known. ``head`` is the head of fal's response. Times are in seconds
    since the head of the request had arrived; ``first_byte_s`` is None when there was no response. ``sent_bytes`` and
    ``received_bytes`` count bodies, to and from the client. ``error`` is the name of the exception because of which
    there is no response of fal's, or no whole one. It is empty when all went well. ``detail`` explains it to an
    operator. If the call was refused, ``detail`` has the rule and an excerpt of the text that was refused.

    Where an option of spending is set, a paid call has ``user``, ``plan`` (None for the default one) and ``endpoint``.
    ``units`` and its ``cost`` in dollars are fal's bill where ``billed`` is true, else an estimate: a queued job has
    its estimate with the submit, and its bill with the result. ``job_id`` is fal's id of a queued job. Each is None
    where it is not known.

    ``outcome`` is one of these:

    * ``ok``: fal's response was passed on, whatever its status; or the response was an application's own
    * ``refused``: fal was not asked
    * ``upstream_error``: fal gave no response, or not all of it
    * ``client_disconnected``: the client left before it had all of it
    * ``failed``: a fault of the proxy, its configuration or its application
    """

    __slots__ = (
        "accounted",
        "began",
        "billed",
        "cost",
        "detail",
        "endpoint",
        "error",
        "failed_over",
        "first_byte_s",
        "head",
        "job_id",
        "method",
        "outcome",
        "plan",
        "received_bytes",
        "relayed",
        "request_id",
        "seconds",
        "sent_bytes",
        "status",
        "target",
        "units",
        "user",
    )

    def __init__(self, method: str, given_id: str | None) -> None:
        self.began = time.monotonic()
        self.method = method if method in METHODS else "other"
        self.request_id = request_id(given_id)
        self.target: Target | None = None
        self.head: ResponseHead | None = None
        self.relayed = False  # whether the request went to fal
        self.failed_over = False  # whether it went to fal's backup domain
        self.status = 0
        self.first_byte_s: float | None = None
        self.seconds = 0.0
        self.sent_bytes = 0
        self.received_bytes = 0
        self.outcome = ""
        self.error = ""
        self.detail = ""
        self.accounted = False  # whether an option of spending is set
        self.user: str | None = None
        self.plan: str | None = None
        self.endpoint: str | None = None
        self.units: Decimal | None = None
        self.cost: Decimal | None = None
        self.billed = False
        self.job_id: str | None = None

    def mark_first_byte(self) -> None:
        """Note the time at which the first byte of the response is about to leave."""
        self.first_byte_s = time.monotonic() - self.began

    def finish(self, status: int, error: BaseException | None = None) -> None:
        """Note the end. The exception is not kept, because its frames refer to this object."""
        self.status = status
        self.seconds = time.monotonic() - self.began
        if error is not None:
            self.error = type(error).__name__
            self.detail = error.detail if isinstance(error, ProxyError) else ""
        if isinstance(error, ClientDisconnected):
            self.outcome = "client_disconnected"
        elif isinstance(error, UpstreamError):
            self.outcome = "upstream_error"
        elif not self.relayed and (400 <= status < 500 or status in (501, 503, 505)):
            self.outcome = "refused"
        else:
            self.outcome = "failed" if self.error else "ok"

    def fields(self, client: str) -> dict[str, Any]:
        """Return the fields of its line in the log, in the order of the line."""
        head, target = self.head, self.target
        fields = {
            "client": client,
            "method": self.method,
            "target": None if target is None else f"{target.host}{target.path}"[:_MAX_CHARS],
            "status": self.status,
            "bytes": self.sent_bytes,
            "first_byte_s": None if self.first_byte_s is None else round(self.first_byte_s, 6),
            "total_s": round(self.seconds, 6),
            "upstream_protocol": None if head is None else head.protocol,
            "upstream_status": None if head is None else head.status,
            "fal_request_id": None if head is None else _fal_request_id(head),
            "request_id": self.request_id,
            "outcome": self.outcome,
            "error": self.error or None,
            "detail": self.detail[:_MAX_CHARS] or None,
        }
        if self.accounted:
            fields |= {
                "user": self.user,
                "plan": self.plan,
                "endpoint": self.endpoint,
                "units": None if self.units is None else float(self.units),
                "cost": None if self.cost is None else float(self.cost),
                "billed": self.billed,
                "job_id": self.job_id,
            }
        return fields


def _fal_request_id(head: ResponseHead) -> str | None:
    for name, value in head.headers:
        if name.lower() == "x-fal-request-id" and _ID.fullmatch(value):
            return value
    return None
