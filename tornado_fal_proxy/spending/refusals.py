"""The words for limits that a client gets: why a paid call is refused, and how much is left.

Strategy. fal's SDKs repeat a 429, and never a 402. So a limit that opens soon is 429 with ``retry-after``, and one that
opens tomorrow, or never for this call, is 402. The limits of all users together are named in a refusal, without their
numbers, because these are the operator's. ``RateLimit`` and ``RateLimit-Policy`` have the user's own.

Source: draft-ietf-httpapi-ratelimit-headers-10.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime

from tornado_fal_proxy.errors import LimitReached, QuotaUsedUp, SpendingRefused
from tornado_fal_proxy.spending.limits import MILLION, dollars
from tornado_fal_proxy.spending.plans import Frame, Rule, Terms
from tornado_fal_proxy.spending.store import UNFINISHED, Standing

__all__ = ["limit_fields", "refusal"]

# The seconds after which a client may ask whether one of its jobs has ended. Nobody knows when one does.
UNFINISHED_RETRY_S = 5
# The periods whose end a client may wait for.
_SHORT = ("minute", "hour")
# Budgets are shown in whole cents, rounded down where something is left.
_CENT = MILLION // 100
_UNFINISHED_NAME = '"unfinished-jobs-per-user"'


def refusal(terms: Terms, standing: Standing, now: float) -> SpendingRefused:
    """Return the error for a call that was not reserved. ``now`` is in seconds since 1970."""
    fields = limit_fields(terms, standing, now)
    assert standing.refused_by is not None
    if standing.refused_by == UNFINISHED:
        most = terms.reservation.max_unfinished
        message = f"You may have {most} unfinished {_plural('job', most or 0)} at once; wait until one has ended."
        return LimitReached(message, (*fields, ("Retry-After", str(UNFINISHED_RETRY_S))), "unfinished_jobs_per_user")
    rule = terms.rules[standing.refused_by]
    needed = terms.reservation.cost if rule.is_budget else terms.reservation.jobs
    never = needed > rule.limit.amount
    message = f"{_described(rule)} {_needed(rule, needed) if never else _opens(rule)}."
    detail = f"{rule.option}: {_amount(rule)}/{rule.limit.period}"
    if never or rule.is_budget or rule.limit.period not in _SHORT:
        return QuotaUsedUp(message, fields, detail)
    return LimitReached(message, (*fields, ("Retry-After", str(_seconds_left(rule, now)))), detail)


def _described(rule: Rule) -> str:
    """Return the beginning of a sentence about a limit that has no room."""
    if rule.of_all:
        kind = "budget" if rule.is_budget else "number of jobs"
        return f"The {kind} of all users together for this {rule.limit.period}"
    if rule.is_budget:
        return f"Your budget of ${_amount(rule)} a {rule.limit.period}"
    return f"Your limit of {_amount(rule)} {_plural('job', rule.limit.amount)} {_each(rule)}"


def _each(rule: Rule) -> str:
    return f"an {rule.limit.period}" if rule.limit.period == "hour" else f"a {rule.limit.period}"


def _opens(rule: Rule) -> str:
    opens = datetime.fromtimestamp(rule.window.ends, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"is used up; the next job can start at {opens}"


def _needed(rule: Rule, needed: int) -> str:
    if rule.is_budget:
        return f"has no room for a call of ${dollars(needed)}"
    return f"has no room for a call that counts as {needed} {_plural('job', needed)}"


def _amount(rule: Rule) -> str:
    return dollars(rule.limit.amount) if rule.is_budget else str(rule.limit.amount)


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _seconds_left(rule: Rule, now: float) -> int:
    return max(1, math.ceil(rule.window.ends - now))


def limit_fields(terms: Terms, standing: Standing, now: float) -> tuple[tuple[str, str], ...]:
    """Return the header fields for a response to a paid call; none where the user has no limits."""
    frame = terms.frame
    if frame.texts is None:
        frame.texts = _texts(frame)
    policy, parts = frame.texts
    if not policy:
        return ()
    states = []
    for index, name, amount, size, ends in parts:
        left = amount - standing.used[index]
        states.append(f"{name};r={left // size if left > 0 else 0};t={max(1, math.ceil(ends - now))}")
    if (most := terms.reservation.max_unfinished) is not None:
        left = most - standing.unfinished
        states.append(f"{_UNFINISHED_NAME};r={left if left > 0 else 0}")
    return ("RateLimit-Policy", policy), ("RateLimit", ", ".join(states))


def _texts(frame: Frame) -> tuple[str, list[tuple[int, str, int, int, int]]]:
    """Return the policy, and of each limit of the user: its place among all, name, amount, unit, and end."""
    policies, parts = [], []
    for index, rule in enumerate(frame.rules):
        if rule.of_all:
            continue
        name = f'"{rule.option.replace("_", "-")}-{rule.limit.period}"'
        size, unit = (_CENT, ';qu="cents"') if rule.is_budget else (1, "")
        policies.append(f"{name};q={rule.limit.amount // size}{unit};w={rule.window.ends - rule.window.begins}")
        parts.append((index, name, rule.limit.amount, size, rule.window.ends))
    if (most := frame.plan.max_unfinished) is not None:
        policies.append(f'{_UNFINISHED_NAME};q={most};qu="concurrent-requests"')
    return ", ".join(policies), parts
