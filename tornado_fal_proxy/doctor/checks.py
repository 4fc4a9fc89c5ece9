"""Check what stands between a browser and a proxy that answers: CORS, events, repeated calls, sizes and times.

Strategy. Each check sends few requests and yields what it has found. A doubtful time is measured twice, because a busy
network delays as something in front does.
"""

from __future__ import annotations

from collections.abc import Iterator

from tornado_fal_proxy.doctor.findings import NOTE, OK, SKIPPED, WRONG, Finding
from tornado_fal_proxy.doctor.route import front_of, message_of
from tornado_fal_proxy.doctor.visitor import Seen, Visitor
from tornado_fal_proxy.rules.diagnostics import DIAGNOSTIC_HEADER, EVENT_S, EVENTS, FAILURE_S
from tornado_fal_proxy.rules.headers import list_members
from tornado_fal_proxy.rules.target import TARGET_HEADER

__all__ = ["BODY_BYTES", "check_body_size", "check_cors", "check_events", "check_fal", "check_retries", "check_silence"]

# The size of a body that should pass: the default of max_body_bytes.
BODY_BYTES = 32 * 1024 * 1024
SMALL_BODY_BYTES = 1024 * 1024
# Codings that gather what they compress.
_COMPRESSED = frozenset({"gzip", "br", "deflate", "zstd"})
_ASKED_HEADERS = f"content-type,{TARGET_HEADER}"
# libcurl's error for a time-out.
TIMED_OUT = 28
# The job that check_fal asks about. Nobody has submitted it.
NO_JOB = "00000000-0000-0000-0000-000000000000"


def check_cors(visitor: Visitor, origin: str | None) -> Iterator[Finding]:
    """Yield whether pages of ``origin`` may call, and read the responses."""
    if origin is None:
        text = "not looked at; --origin=https://app.example.com looks as a page of that origin"
        yield Finding("cors", SKIPPED, text)
        return
    preflight = visitor.send(
        "OPTIONS",
        [
            f"origin: {origin}",
            "access-control-request-method: POST",
            f"access-control-request-headers: {_ASKED_HEADERS}",
        ],
    )
    response = visitor.send("GET", [f"origin: {origin}"])
    for what, seen in (("the preflight", preflight), ("a response", response)):
        problem = _cors_problem(seen, origin, what)
        if problem is None and seen is preflight:
            problem = _preflight_problem(seen, origin)
        if problem is not None:
            yield problem
            return
    exposed = list_members(",".join(response.all("access-control-expose-headers")))
    if not exposed & {"x-fal-request-id", "*"}:
        change = "remove what replaces access-control-expose-headers in front of the proxy"
        yield Finding("cors", NOTE, f"pages of {origin} may call, but not read x-fal-request-id", change)
    else:
        yield Finding("cors", OK, f"pages of {origin} may call and read responses")


def _preflight_problem(seen: Seen, origin: str) -> Finding | None:
    if not 200 <= seen.status < 300:
        text = f"the preflight of {origin} is answered {seen.status}, which browsers take for a no"
        change = "let OPTIONS through to the proxy without a login: browsers send no cookie with it"
        return Finding("cors", WRONG, text, change)
    allowed = list_members(",".join(seen.all("access-control-allow-headers")))
    if "*" not in allowed and (missing := sorted({TARGET_HEADER, "content-type"} - allowed)):
        text = f"the preflight does not allow the headers {', '.join(missing)}"
        return Finding("cors", WRONG, text, "let the proxy answer OPTIONS, and nothing in front of it")
    return None


def _cors_problem(seen: Seen, origin: str, what: str) -> Finding | None:
    values = seen.all("access-control-allow-origin")
    if values in ([origin], ["*"]):
        return None
    if len(values) > 1:
        text = f"{what} has {len(values)} headers access-control-allow-origin, and browsers accept one"
        return Finding("cors", WRONG, text, "remove add_header Access-Control-Allow-Origin in front of the proxy")
    change = f"--allowed-origins={origin} of tornado-fal-proxy (FAL_PROXY_ALLOWED_ORIGINS)"
    if values:
        text = f"{what} allows pages of {values[0]}, not of {origin}"
    else:
        text = f"{what} does not allow pages of {origin} (status {seen.status}: {message_of(seen) or 'no message'})"
    return Finding("cors", WRONG, text, change)


def check_events(visitor: Visitor) -> Iterator[Finding]:
    """Yield whether each event arrives when it was sent, and as it was sent."""
    spread, compressed = 0.0, ""
    for _ in range(2):
        seen = visitor.send(
            "GET", [f"{DIAGNOSTIC_HEADER}: events", "accept: text/event-stream", "accept-encoding: gzip, br"]
        )
        if (finding := _no_diagnostic(seen, "events")) is not None:
            yield finding
            return
        if seen.error:
            text = f"the stream was cut off after {seen.seconds:.1f} s ({seen.reason})"
            yield Finding("events", WRONG, text, "look at the time-outs of what stands in front, and the proxy's log")
            return
        compressed = ", ".join(list_members(",".join(seen.all("content-encoding"))) & _COMPRESSED)
        spread = max(spread, seen.arrivals[-1] - seen.arrivals[0] if seen.arrivals else 0)
        if spread > EVENT_S * (EVENTS - 1) / 2:
            break
    else:
        text = f"{EVENTS} events that were sent {EVENT_S * 1000:.0f} ms apart came all at once"
        if compressed:
            text += f": {front_of(seen)} compresses them ({compressed})"
            change = "gzip off; in nginx's location, or no text/event-stream in gzip_types"
        else:
            text += f": {front_of(seen)} holds them back"
            change = "proxy_buffering off; in nginx's location, or no proxy_ignore_headers X-Accel-Buffering"
        yield Finding("events", WRONG, text, change)
        return
    if compressed:
        text = f"events come as they were sent, but {front_of(seen)} compresses them ({compressed}), which is slow"
        yield Finding("events", NOTE, text, "no text/event-stream in gzip_types of nginx")
    else:
        yield Finding("events", OK, "each event came when it was sent")


def _no_diagnostic(seen: Seen, check: str) -> Finding | None:
    """Return why the proxy has not made a response for the doctor, or None where it has."""
    if seen.status == 400:
        text = f"not looked at: this proxy makes no diagnostic responses, or {DIAGNOSTIC_HEADER} does not arrive"
        return Finding(check, SKIPPED, text, "update tornado-fal-proxy, or let the header through")
    if seen.status == 403 and "allow_diagnostics" in (message_of(seen) or ""):
        text = "not looked at: the proxy has to fail on purpose, and something in front may then avoid it for seconds"
        return Finding(check, SKIPPED, text, "--allow-diagnostics of tornado-fal-proxy, while the doctor looks")
    if seen.status == 429:
        return Finding(check, SKIPPED, "not looked at: the proxy was asked too often", "try again in a minute")
    return None


def check_retries(visitor: Visitor) -> Iterator[Finding]:
    """Yield whether something in front repeats a POST that fails. fal bills a repeated job again."""
    usual_s = visitor.send().wait_s
    counts = []
    for kind in ("error", "disconnect"):
        seen = _failed(visitor, kind)
        finding = _no_diagnostic(seen, "retries")
        if finding is None and not _is_failure(seen, kind):
            text = f"not looked at: a POST that fails ({kind}) is answered {seen.status or seen.reason}"
            finding = Finding("retries", SKIPPED, text)
        if finding is not None:
            yield finding
            return
        count = _sent(seen, usual_s)
        if count > 1:
            count = min(count, _sent(_failed(visitor, kind), usual_s))
        counts.append(count)
        if count == 1 and kind == "disconnect" and seen.status in (502, 503, 504):
            text = (
                f"{front_of(seen)} answers {seen.status} for a POST that was lost on the way, and fal's SDKs send it "
            )
            text += "again, so a job may be paid twice"
            change = "error_page 502 504 = @no_response; as in deploy/nginx/tornado-fal-proxy.conf"
            yield Finding("retries", WRONG, text, change)
            return
    if max(counts) > 1:
        text = f"a POST that fails was sent {max(counts)} times by what stands in front, and each may be a paid job"
        change = "no non_idempotent in nginx's proxy_next_upstream; no retries for POST elsewhere"
        yield Finding("retries", WRONG, text, change)
    else:
        yield Finding("retries", OK, "a POST that fails is sent once")


def _failed(visitor: Visitor, kind: str) -> Seen:
    """Return what comes of a POST that fails in this way."""
    return visitor.send("POST", [f"{DIAGNOSTIC_HEADER}: {kind}", "content-type: application/json"])


def _is_failure(seen: Seen, kind: str) -> bool:
    """Return whether this is how a failed POST ends: with an error, or where the proxy hangs up with none at all."""
    return seen.status >= 500 or (kind == "disconnect" and seen.status == 0 and seen.error != TIMED_OUT)


def _sent(seen: Seen, usual_s: float) -> int:
    """Return how many times a POST was sent that fails after FAILURE_S. ``usual_s`` is the way there and back."""
    return max(1, int((seen.wait_s - usual_s) / FAILURE_S + 0.1))


def check_body_size(visitor: Visitor) -> Iterator[Finding]:
    """Yield whether a large body would be taken. Only its length is sent."""
    if _takes(visitor, BODY_BYTES):
        yield Finding("body size", OK, f"a body of {BODY_BYTES} bytes is taken")
        return
    text = f"a body of {BODY_BYTES} bytes is refused before it is sent"
    text += f", and one of {SMALL_BODY_BYTES} bytes " + ("taken" if _takes(visitor, SMALL_BODY_BYTES) else "too")
    change = "client_max_body_size 32m; in nginx's location (as max_body_bytes of the proxy)"
    yield Finding("body size", WRONG, text, change)


def _takes(visitor: Visitor, size: int) -> bool:
    seen = visitor.send("POST", ["content-type: application/json", "expect: 100-continue"], announced_bytes=size)
    return seen.took_body or seen.status not in (0, 413)


def check_silence(visitor: Visitor, seconds: int | None) -> Iterator[Finding]:
    """Yield whether a call may be silent for so long, as one that waits for a slow model is."""
    if seconds is None:
        text = "not looked at; --wait-s=120 looks whether a call may be silent for so long"
        yield Finding("time-outs", SKIPPED, text)
        return
    headers = [f"{DIAGNOSTIC_HEADER}: silence={seconds}", "content-type: application/json"]
    seen = visitor.send("POST", headers, timeout_s=seconds + 15)
    finding = _no_diagnostic(seen, "time-outs")
    if finding is None and seen.status == 200:
        finding = Finding("time-outs", OK, f"a call may be silent for {seconds} s")
    elif finding is None:
        how = f"with {seen.status}" if seen.status else f"without a response ({seen.reason})"
        text = f"a silent call was ended after {seen.seconds:.0f} s {how}"
        change = "proxy_read_timeout 960s; in nginx's location (longer than idle_timeout_s of the proxy)"
        finding = Finding("time-outs", WRONG, text, change)
    yield finding


def check_fal(visitor: Visitor, endpoint: str) -> Iterator[Finding]:
    """Yield whether the proxy reaches fal, and fal takes its key: by the status of no job, which costs nothing."""
    target = f"https://queue.fal.run/{endpoint}/requests/{NO_JOB}/status"
    seen = visitor.send("GET", [f"{TARGET_HEADER}: {target}"])
    message, status = message_of(seen), seen.status
    if message is None and status in (401, 403):
        text = f"fal refuses the proxy's key ({status})"
        yield Finding("fal", WRONG, text, "FAL_KEY of tornado-fal-proxy, to a key of https://fal.ai/dashboard/keys")
    elif message is None and 200 <= status < 500:
        yield Finding("fal", OK, f"fal answered through the proxy after {seen.seconds:.2f} s, and takes its key")
    elif message is None or status in (500, 502, 504):
        text = f"the proxy has no response of fal's: {status or seen.reason} ({message or 'no message'})"
        change = "what the message names; the log of the proxy has the cause (upstream error, or refused)"
        yield Finding("fal", WRONG, text, change)
    elif status in (401, 403):
        text = f"not looked at: the proxy refuses this call ({status}: {message})"
        yield Finding("fal", SKIPPED, text, "--endpoint=ID of an endpoint that is allowed, or --header of a user")
    else:
        yield Finding("fal", SKIPPED, f"not looked at: the proxy answers {status} by itself ({message})")
