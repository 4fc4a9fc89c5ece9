"""The requests by which ``tornado-fal-proxy doctor`` looks at what stands in front of a proxy.

Strategy. Something in front may hold events back, end a silent call, or repeat a POST that failed. A response of fal's
that shows this costs money, so the proxy makes one by itself for a request that has ``x-fal-proxy-diagnostic``, and
neither a target nor a body. The response says nothing about the proxy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tornado_fal_proxy.rules.headers import Pairs

__all__ = ["DIAGNOSTIC_HEADER", "EVENTS", "EVENT_S", "FAILURE_S", "MAX_SILENCE_S", "Diagnostic", "diagnostic_of"]

DIAGNOSTIC_HEADER = "x-fal-proxy-diagnostic"
# The stream of events: long enough to tell events that come one by one from events that come together.
EVENTS, EVENT_S = 5, 0.2
# The time before a failure, in seconds. A client that waits for it several times knows that the request was repeated.
FAILURE_S = 0.5
# Limits a silence, in seconds: twice what proxies in front that end silent calls usually allow.
MAX_SILENCE_S = 300

_VALUE = re.compile(r"(events|error|disconnect)|(silence)=([1-9][0-9]{0,2})")


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """A response to make: ``events``; or, after ``seconds``, a late one (``silence``), ``error`` or ``disconnect``."""

    kind: str
    seconds: float = FAILURE_S

    @property
    def fails(self) -> bool:
        """Tell whether something in front may count the response as a failure of the proxy."""
        return self.kind != "events"


def diagnostic_of(headers: Pairs) -> Diagnostic | None:
    """Return what a request without a target asks for, or None. ``headers`` have lower-case names."""
    values = []
    for name, value in headers:
        if name == DIAGNOSTIC_HEADER:
            values.append(value)
        elif name == "transfer-encoding" or (name == "content-length" and value != "0"):
            return None
    match = _VALUE.fullmatch(values[0]) if len(values) == 1 else None
    if match is None:
        return None
    if match[1]:
        return Diagnostic(match[1])
    seconds = int(match[3])
    return Diagnostic(match[2], seconds) if seconds <= MAX_SILENCE_S else None
