"""Make the operator's rules, and judge calls by them."""

from typing import Any

from tornado_fal_proxy.errors import ProxyError
from tornado_fal_proxy.rules.access import AccessRules, access_rules
from tornado_fal_proxy.rules.policy import decide

__all__ = ["JOB", "QUEUE", "RUN", "refusal", "rules"]

RUN, QUEUE = "https://fal.run", "https://queue.fal.run"
JOB = "764cabcf-b745-4b3e-ae38-1200304cf45b"


def rules(**fields: Any) -> AccessRules:
    made = access_rules(**fields)
    assert made is not None
    return made


def refusal(access: AccessRules | None, method: str, url: str) -> type[ProxyError] | None:
    """Return the error that a call with that head is refused with, None if it is allowed."""
    headers = [("x-fal-target-url", url), ("content-type", "application/json")]
    try:
        decide(method, headers, max_body_bytes=100, access=access)
    except ProxyError as exc:
        return type(exc)
    return None
