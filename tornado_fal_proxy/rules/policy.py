"""The decision whether a request may pass, made from its head alone.

Strategy. :func:`decide` parses the target once, refuses in the order of fal's proxy formula (405, 400, 412, 415, then
413), and returns a frozen :class:`Target`. The operator's own rules, where there are any, come as soon as the target is
known (403, after 412). Without rules only calls for the key's account are refused there.

This module never reads a body: it checks what the head declares of it, and the reader of the body enforces its length.

Sources: fal's "server-side integration" page (the formula), RFC 9110 sections 8.3, 8.4 and 8.6.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tornado_fal_proxy.errors import (
    BodyTooLarge,
    MethodNotAllowed,
    TargetMissing,
    TargetRefused,
    UnsupportedMediaType,
)
from tornado_fal_proxy.rules.access import AccessRules, check_account
from tornado_fal_proxy.rules.endpoints import is_cancel
from tornado_fal_proxy.rules.excerpt import excerpt
from tornado_fal_proxy.rules.fal_headers import HeaderRules
from tornado_fal_proxy.rules.headers import Pairs, content_length
from tornado_fal_proxy.rules.target import TARGET_HEADER, Target, parse_target

__all__ = ["decide"]

_JSON = re.compile(r"application/json[ \t]*(?:;.*)?", re.IGNORECASE)


def decide(
    method: str,
    headers: Pairs,
    *,
    max_body_bytes: int,
    access: AccessRules | None = None,
    header_rules: HeaderRules | None = None,
) -> Target:
    """Return the target of a request that may pass.

    ``max_body_bytes`` limits the declared length of the body. Raises, in this order, MethodNotAllowed (405),
    TargetMissing (400), TargetRefused (412), AccessRefused (403), UnsupportedMediaType (415), BodyTooLarge (413).
    """
    urls = [value for name, value in headers if name == TARGET_HEADER]
    always_allowed = method in ("GET", "POST")
    try:
        target = _target(urls, method)
    except (TargetMissing, TargetRefused):
        if always_allowed:
            raise
        raise MethodNotAllowed(_refused_method(method, headers)) from None
    if not always_allowed:
        may_put = access is not None and access.allows_cancel(target)
        if method != "PUT" or not may_put:
            needs_cancel = method == "PUT" and is_cancel(target)
            detail = _refused_method(method, headers, target)
            raise MethodNotAllowed(detail, may_put=may_put, needs_cancel=needs_cancel)
    if access is None:
        check_account(target)
    else:
        access.check(method, target)
    if header_rules is not None:
        header_rules.check(headers)
    _check_body(headers, max_body_bytes)
    return target


def _target(urls: Sequence[str], method: str) -> Target:
    """Return the target that the only one of ``urls`` is. Raise TargetMissing or TargetRefused."""
    if len(urls) != 1 or not urls[0]:
        raise TargetMissing(f"{len(urls)} {TARGET_HEADER} headers" if len(urls) > 1 else f"no {TARGET_HEADER} header")
    try:
        return parse_target(urls[0], method)
    except TargetRefused as exc:
        raise TargetRefused(f"{exc.detail or TARGET_HEADER}: {excerpt(urls[0])}") from None


def _refused_method(method: str, headers: Pairs, target: Target | None = None) -> str:
    """Return what the log shows of a request with a wrong method: its cause, where an option would let it in."""
    named = dict(headers)
    if method == "OPTIONS" and "origin" in named and "access-control-request-method" in named:
        return f"preflight of {excerpt(named['origin'])}: no origin is allowed without --allowed-origins"
    if target is None:
        return f"method {excerpt(method)}"
    needs = ", which needs --allow-cancel" if method == "PUT" and is_cancel(target) else ""
    return f"{excerpt(method[:20])} {excerpt(target.host + target.path)}{needs}"


def _check_body(headers: Pairs, max_body_bytes: int) -> None:
    """Raise UnsupportedMediaType or BodyTooLarge unless the declared body, if there is one, is small JSON."""
    has_body = is_json = too_large = False
    other_type = encoded = False
    for name, value in headers:
        if name == "content-type":
            is_json = True
            other_type = other_type or not _JSON.fullmatch(value)
        elif name == "content-length":
            length = content_length(value)
            has_body = has_body or length != 0
            too_large = too_large or (length is not None and length > max_body_bytes)
        elif name == "transfer-encoding":
            has_body = True
        elif name == "content-encoding":
            encoded = encoded or value.lower() != "identity"
    if not has_body:
        return
    if other_type or encoded or not is_json:
        name = "content-encoding" if encoded and is_json and not other_type else "content-type"
        raise UnsupportedMediaType(f"{name} {excerpt(dict(headers).get(name, 'none'))}")
    if too_large:
        raise BodyTooLarge(f"declared longer than {max_body_bytes} bytes")
