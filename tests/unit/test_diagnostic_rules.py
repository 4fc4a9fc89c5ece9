"""What a request without a target asks for, where ``tornado-fal-proxy doctor`` has sent it."""

import pytest

from tornado_fal_proxy.rules.diagnostics import DIAGNOSTIC_HEADER, Diagnostic, diagnostic_of

ASKED: list[tuple[list[tuple[str, str]], Diagnostic | None]] = [
    ([(DIAGNOSTIC_HEADER, "events")], Diagnostic("events")),
    ([(DIAGNOSTIC_HEADER, "error"), ("content-length", "0")], Diagnostic("error")),
    ([(DIAGNOSTIC_HEADER, "disconnect")], Diagnostic("disconnect")),
    ([(DIAGNOSTIC_HEADER, "silence=300")], Diagnostic("silence", 300)),
    ([(DIAGNOSTIC_HEADER, "silence=301")], None),
    ([(DIAGNOSTIC_HEADER, "silence=0")], None),
    ([(DIAGNOSTIC_HEADER, "silence=1.5")], None),
    ([(DIAGNOSTIC_HEADER, "silence")], None),
    ([(DIAGNOSTIC_HEADER, "Events")], None),
    ([(DIAGNOSTIC_HEADER, "")], None),
    ([(DIAGNOSTIC_HEADER, "events"), (DIAGNOSTIC_HEADER, "events")], None),
    ([(DIAGNOSTIC_HEADER, "events"), ("content-length", "1")], None),
    ([(DIAGNOSTIC_HEADER, "events"), ("transfer-encoding", "chunked")], None),
    ([], None),
]


@pytest.mark.parametrize(("headers", "asked"), ASKED)
def test_what_is_asked(headers: list[tuple[str, str]], asked: Diagnostic | None) -> None:
    """One value, in its exact form, without a body; anything else is a request without a target."""
    assert diagnostic_of(headers) == asked


def test_failures() -> None:
    """Something in front may take all but the events for a failure of the proxy."""
    assert not Diagnostic("events").fails
    assert all(Diagnostic(kind).fails for kind in ("silence", "error", "disconnect"))
