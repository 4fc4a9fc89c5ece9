"""The properties of ``fuzz/``, tried with hypothesis and with the corpus. ``python -m fuzz`` tries them for longer."""

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from fuzz import properties
from fuzz.targets import TARGETS
from tests.support.strategies import examples, mutated_urls
from tests.support.tools import ROOT

CORPUS = ROOT / "fuzz/corpus"
INPUTS = sorted(str(path.relative_to(CORPUS)) for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_inputs() -> None:
    """Every target has inputs, and there are none for a target that was removed."""
    assert {name.partition("/")[0] for name in INPUTS} == set(TARGETS)


@pytest.mark.parametrize("name", INPUTS)
def test_corpus(name: str) -> None:
    """The properties are true for each input that once showed a fault, and for each that fuzzing starts from."""
    TARGETS[name.partition("/")[0]].run((CORPUS / name).read_bytes())


# Near misses, of pieces that are right and pieces that look so.

SEGMENTS = st.sampled_from(
    [
        *("fal-ai", "flux", "dev", "fast-sdxl", "flux-dev", "Flux-1-pro", "workflows", "me", "comfy", "x", "tts", "a"),
        *("stream", "requests", "764cabcf", "status", "cancel", "tokens", "storage", "upload", "initiate", ""),
        *(".", "..", "%2e%2e", "..;", ";a", "%2f", "%5c", "\\", "%252e", "FLUX", "flux%00", "flux.", "%66lux", "+"),
    ]
)
QUERIES = st.sampled_from(
    [
        *("", "?", "?logs=1", "?storage_type=fal-cdn-v3", "?fal_webhook=https%3A%2F%2Fhooks.example%2Fa", "?a&b;c"),
        *("?fal_webhook=https://hooks.example;@evil.example/", "?fal%5Fwebhook=https://evil.example", "?FAL_WEBHOOK=x"),
    ]
)
CALLS = st.builds(
    lambda host, segments, query: f"https://{host}/{'/'.join(segments)}{query}",
    st.sampled_from(["fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "new.fal.run"]),
    st.lists(SEGMENTS, max_size=7),
    QUERIES,
)


@pytest.mark.slow
@examples(1500)
@given(number=st.integers(0, 3), method=st.sampled_from(properties.METHODS), url=CALLS | mutated_urls())
def test_access(number: int, method: str, url: str) -> None:
    """If a server of any habit reads some endpoint in a path that passes, then that endpoint is allowed."""
    event("passes" if properties.access(number, method, url) else "refused")


NAMES = st.sampled_from(
    [
        *("accept", "content-type", "user-agent", "x-fal-a", "x-fal-b", "x-app-fal-c", "x-fal-target-url", "cookie"),
        *("authorization", "x-fal-client-proxy", "connection", "te", "transfer-encoding", "host", "x-fal-", "x-fal-\n"),
    ]
)
VALUES = st.sampled_from(["", "x-fal-a, accept", "close", "a\r\nb: c", "a\0", "\x85", "\t"]) | st.text(
    st.characters(max_codepoint=255), max_size=20
)


@pytest.mark.slow
@examples(1000)
@given(pairs=st.lists(st.tuples(NAMES, VALUES), max_size=8))
def test_request(pairs: list[tuple[str, str]]) -> None:
    """No header of a client's makes a second line, replaces the key, or gets past Connection."""
    properties.request(pairs)


LINES = st.builds(
    lambda name, separator, value, end: (name + separator + value).encode("latin-1") + end,
    NAMES | st.sampled_from(["Set-Cookie", "Content-Length", "proxy-x", " folded", "\tfolded", "", "a b", "é"]),
    st.sampled_from([":", ": ", " : ", "", "::"]),
    VALUES,
    st.sampled_from([b"\r\n", b"\n", b"", b"\r", b"\r\r\n"]),
)


@pytest.mark.slow
@examples(1000)
@given(status=st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/2 404 \r\n", b"HTTP/1.0 099\r\n"]), lines=st.lists(LINES))
def test_response(status: bytes, lines: list[bytes]) -> None:
    """No line of the target's splits the response, frames it, or is one that Tornado would not take."""
    event("read" if properties.response([status, *lines]) else "malformed")


JSON = st.recursive(
    st.sampled_from(
        ['"flux"', '"fast-x"', '"other"', '"c"', "120", "300", "301", "1e2", "-1", "true", "null", '"fl\\u0075x"']
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.lists(
            st.tuples(st.sampled_from(['"allowed_apps"', '"token_expiration"', '"Allowed_apps"', '"x"']), inner),
            max_size=3,
        ).map(lambda items: "{" + ", ".join(f"{name}: {value}" for name, value in items) + "}"),
    ),
    max_leaves=5,
)
TOKENS = st.builds(
    lambda apps, life, more: f'{{"allowed_apps": {apps}, "token_expiration": {life}{more}}}',
    st.sampled_from(['["flux"]', '["flux", "fast-a"]', '["c"]', "[]", '"flux"']) | JSON,
    st.sampled_from(["1", "120", "300", "301", "0"]) | JSON,
    st.sampled_from(["", "", ', "allowed_apps": ["other"]', " /* */", ",", "\n"]),
)


@pytest.mark.slow
@examples(1000)
@given(text=JSON | TOKENS, encoding=st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_token(text: str, encoding: str) -> None:
    """A body that passes asks for allowed apps and a short life, whichever of several JSON readers reads it."""
    event("given" if properties.token(text.encode(encoding)) else "refused")


SESSIONS = st.builds(
    lambda name, app, more: f'{{"sdp": "v=0", {name}: {app}{more}}}',
    st.sampled_from(['"app_id"', '"app_id"', '"App_Id"', '"\\u0061pp_id"']),
    st.sampled_from(['"fal-ai/flux"', '"a/b/c"', '"a/b"', '"other/app"', '"a\\/b/c"', '["a/b/c"]']) | JSON,
    st.sampled_from(["", "", ', "app_id": "other/app"', ', "APP_ID": "other/app"', ', "x": {"y": 1, "y": 2}', ","]),
)


@pytest.mark.slow
@examples(1000)
@given(text=JSON | SESSIONS, encoding=st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_session(text: str, encoding: str) -> None:
    """A body that passes names one allowed endpoint, whichever of several JSON readers reads it."""
    event("allowed" if properties.session(text.encode(encoding)) else "refused")


ORIGINS = st.builds(
    lambda scheme, labels, apex, port: f"{scheme}{'.'.join([*labels, apex])}{port}",
    st.sampled_from(["https://", "http://", "HTTPS://", ""]),
    st.lists(st.sampled_from(["a", "b-c", "*", "xn--a", "A", "", "evil@x", "é"]), max_size=2),
    st.sampled_from(["app.example.com", "example.org", "example.net", "evilexample.org", "localhost", "[::1]"]),
    st.sampled_from(["", ":443", ":8443", ":3000", ":8080", "/", "\n"]),
)


@pytest.mark.slow
@examples(1000)
@given(text=ORIGINS | st.text(max_size=40))
def test_origin(text: str) -> None:
    """A text that may call is what a browser sends for a page of an allowed origin, and no header has a line break."""
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return  # no header can carry it
    event("allowed" if properties.origin(text) else "not allowed")


@pytest.mark.slow
@examples(1000)
@given(
    pieces=st.lists(st.tuples(st.text(max_size=8).map(str.encode) | st.binary(max_size=4), st.booleans()), max_size=10)
)
def test_chunks(pieces: list[tuple[bytes, bool]]) -> None:
    """A stream arrives byte for byte, and where it is text no chunk begins or ends within a character."""
    properties.chunks(pieces)


@pytest.mark.slow
@examples(500)
@given(text=st.text("é日🌊a\n", max_size=12), data=st.data())
def test_chunks_of_text(text: str, data: st.DataObject) -> None:
    """A text arrives whole, wherever its pieces begin and end."""
    whole = text.encode()
    splits = sorted(data.draw(st.sets(st.integers(0, len(whole)))))
    ends = zip([0, *splits], [*splits, len(whole)], strict=True)
    properties.chunks([(whole[start:end], data.draw(st.booleans())) for start, end in ends])
