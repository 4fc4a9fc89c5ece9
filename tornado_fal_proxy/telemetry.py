"""What became of a call, for logs and metrics.

Strategy. The handler notes a few facts on a :class:`Call` while it serves it and hands that over once, when all is
known, to ``FalProxyHandler.on_call_end``. Nothing is formatted or counted in the relay's way; a line for the log is
made where one is written. What a caller or fal has sent is shown only if it is plain, printable and short.
"""

from __future__ import annotations

import random
import re
import time
from typing import Any

from tornado_fal_proxy.errors import CallerGone, ProxyError, UpstreamError
from tornado_fal_proxy.policy import ResponseHead, Target

__all__ = ["REQUEST_ID", "Call", "endpoint_class", "request_id"]

REQUEST_ID = "X-Request-Id"

# What load balancers and tracing libraries make, and nothing that a log or a terminal could trip over.
_ID = re.compile(r"[0-9A-Za-z._:+/=@-]{1,128}")
# Those that can be answered with anything but a refusal; a call by any other method is told as "other".
METHODS = ("GET", "POST", "PUT", "OPTIONS")
# An endpoint's name in the log: longer ones are cut.
_MOST_CHARS = 200


def request_id(given: str | None) -> str:
    """The caller's own id for its call (``x-request-id``), if it can be one; else a new one."""
    return given if given is not None and _ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


class Call:
    """One call of a caller's, from its head to its end.

    ``target`` is None while it is not known what the caller wants of fal; ``head`` is fal's answer's. All times are in
    seconds since the head of the request was here: ``first_byte_s`` is None when there was no answer. ``sent_bytes``
    and ``received_bytes`` are of bodies, to and from the caller. ``why`` is the name of the exception for which there
    is no answer of fal's, or no whole one, empty when all went well; ``detail`` what it says to an operator.

    ``outcome`` is one of these:

    * ``ok``: fal's answer was passed on, whatever its status; or the answer was an application's own
    * ``refused``: fal was not asked
    * ``upstream_error``: fal gave no answer, or not all of it
    * ``caller_gone``: the caller left before it had all of it
    * ``failed``: a fault of the proxy's, its configuration's or its application's
    """

    __slots__ = (
        "began",
        "detail",
        "first_byte_s",
        "head",
        "method",
        "outcome",
        "received_bytes",
        "relayed",
        "request_id",
        "seconds",
        "sent_bytes",
        "status",
        "target",
        "why",
    )

    def __init__(self, method: str, given_id: str | None) -> None:
        self.began = time.monotonic()
        self.method = method if method in METHODS else "other"
        self.request_id = request_id(given_id)
        self.target: Target | None = None
        self.head: ResponseHead | None = None
        self.relayed = False  # fal's server was asked
        self.status = 0
        self.first_byte_s: float | None = None
        self.seconds = 0.0
        self.sent_bytes = 0
        self.received_bytes = 0
        self.outcome = ""
        self.why = ""
        self.detail = ""

    def answer_begins(self) -> None:
        """The first byte of the answer is about to leave."""
        self.first_byte_s = time.monotonic() - self.began

    def ends(self, status: int, error: BaseException | None = None) -> None:
        """All is known. The exception is not kept, for it knows of frames that know of this."""
        self.status = status
        self.seconds = time.monotonic() - self.began
        if error is not None:
            self.why = type(error).__name__
            self.detail = error.detail if isinstance(error, ProxyError) else ""
        if isinstance(error, CallerGone):
            self.outcome = "caller_gone"
        elif isinstance(error, UpstreamError):
            self.outcome = "upstream_error"
        elif not self.relayed and (400 <= status < 500 or status == 503):
            self.outcome = "refused"
        else:
            self.outcome = "failed" if self.why else "ok"

    def fields(self, caller: str) -> dict[str, Any]:
        """What a log tells of it, in the order of a line."""
        head, target = self.head, self.target
        return {
            "caller": caller,
            "method": self.method,
            "endpoint": None if target is None else f"{target.host}{target.path}"[:_MOST_CHARS],
            "status": self.status,
            "bytes": self.sent_bytes,
            "first_byte_s": None if self.first_byte_s is None else round(self.first_byte_s, 6),
            "total_s": round(self.seconds, 6),
            "upstream_protocol": None if head is None else head.protocol,
            "upstream_status": None if head is None else head.status,
            "fal_request_id": None if head is None else _fal_request_id(head),
            "request_id": self.request_id,
            "outcome": self.outcome,
            "why": self.why or None,
            "detail": self.detail[:_MOST_CHARS] or None,
        }


def _fal_request_id(head: ResponseHead) -> str | None:
    for name, value in head.headers:
        if name.lower() == "x-fal-request-id" and _ID.fullmatch(value):
            return value
    return None


def endpoint_class(target: Target | None) -> str:
    """What kind of call it is: one of a dozen names, whatever callers send."""
    if target is None:
        return "none"
    host, path = target.host, target.path
    if host == "fal.run":
        return "stream" if path.endswith("/stream") else "run"
    if host == "queue.fal.run":
        _, found, rest = path.partition("/requests/")
        if not found:
            return "queue_submit"
        for end in ("stream", "cancel", "status"):
            if rest.endswith("/" + end):
                return "queue_" + end
        return "queue_result"
    if host.startswith("rest."):
        return "token" if path.startswith("/tokens") else "storage" if path.startswith("/storage/") else "other"
    return "other"
