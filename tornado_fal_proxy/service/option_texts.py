"""Parse the texts of the service's own options.

Strategy. Each function returns the value of a text, or raises ValueError with what is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NoReturn

from tornado_fal_proxy.config import DEFAULT_ROUTE, MAX_S
from tornado_fal_proxy.option_fields import FALSE, TRUE, as_list
from tornado_fal_proxy.rules.trusted_proxies import TrustedProxies

# The text of an admin port that is not opened.
NO_PORT = "none"
# Paths that the service itself serves, or may serve, beside the route.
TAKEN_ROUTES = ("/", "/healthz")
# Limits processes: more than any machine has cores, and far fewer than an operating system permits.
MAX_PROCESSES = 256
# Limits ports: TCP has two bytes for one.
MAX_PORT = 65_535
# Limits --worker-timeout-s: below, a busy machine would have sound workers killed.
MIN_WORKER_TIMEOUT_S = 1.0

_ROUTE = re.compile(r"/[A-Za-z0-9._~/-]*")
_SECONDS = re.compile(r"[0-9]{1,5}(\.[0-9]{1,9})?")


def _refuse(text: str, allowed: str) -> NoReturn:
    raise ValueError(f"must be {allowed}, not {text!r}")


def _whole_number(text: str, most: int, allowed: str = "") -> int:
    if not re.fullmatch(r"[0-9]+", text) or len(text) > len(str(most)) or int(text) > most:
        _refuse(text, allowed or f"a number from 0 to {most}")
    return int(text)


def port(text: str) -> int:
    return _whole_number(text, MAX_PORT)


def admin_port(text: str) -> int | None:
    return None if text == NO_PORT else _whole_number(text, MAX_PORT, f"a number from 0 to {MAX_PORT}, or {NO_PORT}")


def processes(text: str) -> int:
    return _whole_number(text, MAX_PROCESSES) or _cores()


def _cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(text: str) -> float:
    if not _SECONDS.fullmatch(text) or float(text) > MAX_S:
        _refuse(text, f"a number of seconds from 0 to {MAX_S}")
    return float(text)


def worker_timeout_s(text: str) -> float:
    value = seconds(text)
    if 0 < value < MIN_WORKER_TIMEOUT_S:
        _refuse(text, f"0, or a number of seconds from {MIN_WORKER_TIMEOUT_S:g} to {MAX_S}")
    return value


def route(text: str) -> str:
    if not _ROUTE.fullmatch(text) or text in TAKEN_ROUTES:
        _refuse(text, f"a path such as {DEFAULT_ROUTE}, and none of {', '.join(TAKEN_ROUTES)}")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            _refuse(text, f"one of {', '.join(choices)}")
        return text.lower()

    return parse


def switch(text: str) -> bool:
    return one_of(*TRUE, *FALSE)(text) in TRUE


def trusted_proxies(text: str) -> TrustedProxies:
    return TrustedProxies(as_list(text))
