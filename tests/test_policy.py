"""The rules of the relay: fal's proxy formula and PROTOCOL's lists of headers, as tables."""

import itertools
import time

import pytest

from tornado_fal_proxy import __version__
from tornado_fal_proxy.errors import (
    BodyTooLarge,
    HeadersTooLarge,
    MalformedAnswer,
    MethodNotAllowed,
    ProxyError,
    TargetMissing,
    TargetRefused,
    UnsupportedMediaType,
)
from tornado_fal_proxy.policy import Target, decide, parse_response_head, parse_target, request_headers

LABEL_63 = "a" * 63
HOST_253 = ".".join([LABEL_63] * 3 + ["a" * (253 - 3 * 64 - len(".fal.run")), "fal.run"])

# URL, and the host, path and query that go upstream: byte for byte those of the caller.
ACCEPTED = [
    # Hosts.
    ("https://fal.run", "fal.run", "/", None),
    ("https://fal.ai", "fal.ai", "/", None),
    ("https://fal.run/", "fal.run", "/", None),
    ("https://queue.fal.run/a", "queue.fal.run", "/a", None),
    ("https://rest.fal.ai/a", "rest.fal.ai", "/a", None),
    ("https://rest.alpha.fal.ai/tokens/", "rest.alpha.fal.ai", "/tokens/", None),
    ("https://a.b.c.d.e.f.fal.run/", "a.b.c.d.e.f.fal.run", "/", None),
    ("https://110602490-lora.fal.run/", "110602490-lora.fal.run", "/", None),
    ("https://0.fal.run/", "0.fal.run", "/", None),
    ("https://127.0.0.1.fal.run/", "127.0.0.1.fal.run", "/", None),
    ("https://a--b.fal.run/", "a--b.fal.run", "/", None),
    ("https://ab--c.fal.run/", "ab--c.fal.run", "/", None),
    ("https://xn.axn--b.fal.run/", "xn.axn--b.fal.run", "/", None),
    ("https://fal.run.fal.run/", "fal.run.fal.run", "/", None),
    ("https://evil.com.fal.ai/", "evil.com.fal.ai", "/", None),
    ("https://www.fal.fal.ai/", "www.fal.fal.ai", "/", None),
    (f"https://{LABEL_63}.fal.run/", f"{LABEL_63}.fal.run", "/", None),
    (f"https://{HOST_253}/", HOST_253, "/", None),
    ("https://fal.run/" + "a" * (8000 - 16), "fal.run", "/" + "a" * (8000 - 16), None),
    # The one port that https has anyway is dropped.
    ("https://fal.run:443", "fal.run", "/", None),
    ("https://fal.run:443/a?b", "fal.run", "/a", "b"),
    ("https://queue.fal.run:443?b", "queue.fal.run", "/", "b"),
    # What fal's clients send.
    ("https://fal.run/fal-ai/flux/dev", "fal.run", "/fal-ai/flux/dev", None),
    (
        "https://queue.fal.run/fal-ai/flux/dev?fal_webhook=https%3A%2F%2Fapp.example%2Fhook%3Fa%3Db",
        "queue.fal.run",
        "/fal-ai/flux/dev",
        "fal_webhook=https%3A%2F%2Fapp.example%2Fhook%3Fa%3Db",
    ),
    (
        "https://queue.fal.run/fal-ai/flux/requests/764cabcf-b745-4b3e-ae38-1200304cf45b/status/stream?logs=0",
        "queue.fal.run",
        "/fal-ai/flux/requests/764cabcf-b745-4b3e-ae38-1200304cf45b/status/stream",
        "logs=0",
    ),
    ("https://queue.fal.run/workflows/me/flow", "queue.fal.run", "/workflows/me/flow", None),
    (
        "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3",
        "rest.fal.ai",
        "/storage/upload/initiate",
        "storage_type=fal-cdn-v3",
    ),
    # Paths: nothing is decoded, encoded, resolved or re-cased.
    ("https://fal.run/a%2Fb", "fal.run", "/a%2Fb", None),
    ("https://fal.run/%e6%97%A5", "fal.run", "/%e6%97%A5", None),
    ("https://fal.run/a+b", "fal.run", "/a+b", None),
    ("https://fal.run/A/b", "fal.run", "/A/b", None),
    ("https://fal.run/a/../b/./c", "fal.run", "/a/../b/./c", None),
    ("https://fal.run/..", "fal.run", "/..", None),
    ("https://fal.run/%2e%2E/", "fal.run", "/%2e%2E/", None),
    ("https://fal.run//evil.com/", "fal.run", "//evil.com/", None),
    ("https://fal.run/a//b///", "fal.run", "/a//b///", None),
    ("https://fal.run/a;b=c;d", "fal.run", "/a;b=c;d", None),
    ("https://fal.run/@evil.com", "fal.run", "/@evil.com", None),
    ("https://fal.run/a:b", "fal.run", "/a:b", None),
    ("https://fal.run/https://evil.com/", "fal.run", "/https://evil.com/", None),
    ("https://fal.run/,https://evil.com/", "fal.run", "/,https://evil.com/", None),
    ("https://fal.run/%", "fal.run", "/%", None),
    ("https://fal.run/%zz%0", "fal.run", "/%zz%0", None),
    ("https://fal.run/%0d%0Ax:y", "fal.run", "/%0d%0Ax:y", None),
    ("https://fal.run/%00", "fal.run", "/%00", None),
    ("https://fal.run/!$&'()*,=~_-", "fal.run", "/!$&'()*,=~_-", None),
    # RFC 3986 wants these encoded. They cannot end a request line, so they are fal's to judge and not the proxy's.
    ('https://fal.run/{a}|^`<b>"[c]', "fal.run", '/{a}|^`<b>"[c]', None),
    # Queries.
    ("https://fal.run/a?", "fal.run", "/a", ""),
    ("https://fal.run?", "fal.run", "/", ""),
    ("https://fal.run?a=b", "fal.run", "/", "a=b"),
    ("https://fal.run/a?b=&c&=d&&", "fal.run", "/a", "b=&c&=d&&"),
    ("https://fal.run/a?b=1&b=2", "fal.run", "/a", "b=1&b=2"),
    ("https://fal.run/a?b+c=%20%2b", "fal.run", "/a", "b+c=%20%2b"),
    ("https://fal.run/a?b?c", "fal.run", "/a", "b?c"),
    ("https://fal.run/a?/../b", "fal.run", "/a", "/../b"),
    ("https://fal.run/a?u=https://evil.com/@x", "fal.run", "/a", "u=https://evil.com/@x"),
    ("https://fal.run/a?b;c|{d}", "fal.run", "/a", "b;c|{d}"),
    # A fragment never leaves a client.
    ("https://fal.run/a#b", "fal.run", "/a", None),
    ("https://fal.run/a?b#c?d", "fal.run", "/a", "b"),
    ("https://fal.run#@evil.com", "fal.run", "/", None),
    ("https://fal.run/#", "fal.run", "/", None),
    ("https://fal.run/a?#b", "fal.run", "/a", ""),
]

REFUSED = [
    # Not a URL at all.
    "fal",
    "fal.run",
    "fal.run/a",
    "queue.fal.run/fal-ai/flux",
    "fal.run:443",
    "/",
    "/fal-ai/flux",
    "?",
    "#",
    "*",
    "undefined",
    "null",
    "[object Object]",
    "<https://fal.run/>",
    '"https://fal.run/"',
    "url=https://fal.run/",
    # Relative to a scheme.
    "//fal.run/",
    "://fal.run/",
    "///fal.run/",
    # Slashes that are missing, doubled or turned.
    "https:",
    "https:/",
    "https://",
    "https:///",
    "https:fal.run",
    "https:fal.run/a",
    "https:/fal.run",
    "https:/fal.run/a",
    "https:///fal.run/a",
    "https:////fal.run/a",
    "https:\\\\fal.run\\a",
    "https:/\\fal.run/a",
    "https:\\/fal.run/a",
    "https//fal.run/",
    "https;//fal.run/",
    # Other schemes.
    "http://fal.run/",
    "http://fal.run:443/",
    "httpss://fal.run/",
    "shttps://fal.run/",
    "ws://fal.run/",
    "wss://fal.run/",
    "ftp://fal.run/",
    "file://fal.run/",
    "gopher://fal.run/",
    "dict://fal.run/",
    "data:,https://fal.run/",
    "javascript:https://fal.run/",
    "blob:https://fal.run/",
    "view-source:https://fal.run/",
    "url:https://fal.run/",
    "https+unix://fal.run/",
    "https://https://fal.run/",
    # Upper case, which no client of fal's writes.
    "HTTPS://fal.run/",
    "Https://fal.run/",
    "https://FAL.RUN/",
    "https://Fal.run/",
    "https://fal.Run/",
    "https://Queue.fal.run/",
    # Userinfo.
    "https://user@fal.run/",
    "https://user:password@fal.run/",
    "https://@fal.run/",
    "https://:@fal.run/",
    "https://fal.run@evil.com/",
    "https://fal.run:443@evil.com/",
    "https://fal.run%40evil.com/",
    "https://evil.com@fal.run/",
    "https://evil.com@@fal.run/",
    "https://evil.com:443@fal.run/",
    "https://evil.com#@fal.run/",
    "https://evil.com/@fal.run/",
    "https://evil.com?@fal.run/",
    "https://evil.com\\@fal.run/",
    "https://evil.com/.fal.run/",
    "https://fal.run;@evil.com/",
    # Ports.
    "https://fal.run:/",
    "https://fal.run:80/",
    "https://fal.run:8443/",
    "https://fal.run:0/",
    "https://fal.run:4430/",
    "https://fal.run:44/",
    "https://fal.run:0443/",
    "https://fal.run:+443/",
    "https://fal.run:-443/",
    "https://fal.run: 443/",
    "https://fal.run:443 /",
    "https://fal.run:443:443/",
    "https://fal.run:443.evil.com/",
    "https://fal.run:443a/",
    "https://fal.run:https/",
    "https://fal.run:65979/",  # 443 modulo 2**16
    "https://fal.run:4\u06643/",
    "https://fal.run:443\\evil.com",
    # Addresses.
    "https://127.0.0.1/",
    "https://127.1/",
    "https://0/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0177.0.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://10.0.0.1/fal.run",
    "https://localhost/",
    "https://localhost/?fal.run",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[fe80::1%25eth0]/",
    "https://[fal.run]/",
    "https://[::1].fal.run/",
    "https://fal.run[::1]/",
    "https://[::1]fal.run/",
    "https://fal.run]/",
    # Other domains.
    "https://evil.com/",
    "https://evil.com/fal.run",
    "https://evil.com/?https://fal.run/",
    "https://evil.com/#https://fal.run/",
    "https://evil.com?.fal.run/",
    "https://evil.com#.fal.run/",
    "https://fal.com/",
    "https://fal.dev/",
    "https://fal.media/",
    "https://v3.fal.media/files/a.png",
    "https://fal.io/",
    "https://fal.ru/",
    "https://fal.runs/",
    "https://fal.air/",
    "https://fal.a/",
    "https://fa.run/",
    "https://fall.run/",
    "https://fa1.run/",
    "https://fal-ai.run/",
    "https://fal-run/",
    "https://fal/",
    "https://run/",
    "https://ai/",
    "https://al.run/",
    # Suffix and prefix tricks.
    "https://fal.run.evil.com/",
    "https://fal.ai.cn/",
    "https://fal.ai.fal.com/",
    "https://evilfal.run/",
    "https://evilfal.ai/",
    "https://evil-fal.run/",
    "https://evil_fal.run/",
    "https://queuefal.run/",
    "https://falxrun/",
    "https://falrun/",
    "https://fal-run.com/",
    "https://fal.run-evil.com/",
    "https://fal.runevil.com/",
    "https://fal.run,evil.com/",
    "https://fal.run&evil.com/",
    "https://fal.run;evil.com/",
    "https://fal.run|evil.com/",
    "https://fal.run'evil.com/",
    "https://fal.run$evil.com/",
    "https://fal.run=evil.com/",
    "https://fal.run\\evil.com/",
    "https://fal.run\\.evil.com/",
    "https://evil.com\\.fal.run/",
    "https://evil.com:443.fal.run/",
    "https://evil.com;.fal.run/",
    "https://evil.com,.fal.run/",
    "https://evil.com&fal.run/",
    # Labels.
    "https://.fal.run/",
    "https://..fal.run/",
    "https://a..fal.run/",
    "https://fal..run/",
    "https://.run/",
    "https://fal./",
    "https://fal.run./",
    "https://fal.run.:443/",
    "https://fal.run../",
    "https://./",
    "https://-a.fal.run/",
    "https://a-.fal.run/",
    "https://-.fal.run/",
    "https://-fal.run/",
    "https://a_b.fal.run/",
    "https://_.fal.run/",
    "https://*.fal.run/",
    "https://a~b.fal.run/",
    "https://a+b.fal.run/",
    "https://a!b.fal.run/",
    "https://{a}.fal.run/",
    "https://${a}.fal.run/",
    "https://(a).fal.run/",
    f"https://{LABEL_63}a.fal.run/",
    f"https://a{HOST_253}/",
    "https://fal.run/" + "a" * (8001 - 16),
    f"https://{'a.' * 200}fal.run/",
    # Percent-encoding in the host.
    "https://%66al.run/",
    "https://fal%2erun/",
    "https://fal%2Erun/",
    "https://evil.com%2f.fal.run/",
    "https://evil.com%23.fal.run/",
    "https://evil.com%00.fal.run/",
    "https://evil.com%5c.fal.run/",
    "https://fal.run%2f@evil.com/",
    "https://fal.run%00.evil.com/",
    "https://fal.run%20/",
    "https%3A%2F%2Ffal.run%2Fa",
    # Unicode: look-alikes, and what NFKC or IDNA would turn into something else.
    "https://f\u0430l.run/",  # Cyrillic a
    "https://fal.r\u03c5n/",  # Greek upsilon
    "https://\uff46al.run/",  # full-width f
    "https://fal\u3002run/",  # ideographic full stop
    "https://fal\uff0erun/",  # full-width full stop
    "https://fal\uff61run/",  # half-width ideographic full stop
    "https://fal\u2024run/",  # one dot leader
    "https://evil.com\uff0f.fal.run/",  # full-width solidus
    "https://evil.com\u2044.fal.run/",  # fraction slash
    "https://evil.com\uff03.fal.run/",  # full-width number sign
    "https://evil.com\u2100.fal.run/",  # a/c
    "https://fal\u00ad.run/",  # soft hyphen
    "https://fal\u200b.run/",  # zero width space
    "https://fal.run\u200d/",  # zero width joiner
    "https://fal.run\u202e/",  # right-to-left override
    "https://fa\u0301l.run/",  # combining acute
    "https://\u2113al.run/",
    "https://\U0001f600.fal.run/",
    "https://fal\u00b7run/",
    "https\uff1a//fal.run/",
    "\ufeffhttps://fal.run/",
    "https://fal.run/\u00e6",
    "https://fal.run/?\u65e5",
    "https://fal.run/#\u65e5",
    "https://fal.run/\udcff",
    "https://fal.run/\x85",
    "https://fal.run/\u2028",
    # Punycode.
    "https://xn--fl-7kc.run/",
    "https://xn--fal-.fal.run/",
    "https://xn--a.fal.run/",
    "https://xn--80ak6aa92e.fal.run/",
    "https://a.xn--p1ai.fal.run/",
    "https://xn--.fal.run/",
    # White space and control characters.
    " https://fal.run/",
    "https://fal.run/ ",
    "\thttps://fal.run/",
    "https://fal.run/\t",
    "https://fal.run/\n",
    "https://fal.run/\r",
    "https://fal.run/\r\n",
    "https://fal.run\n",
    "https://fal.run\r\nx-injected: yes",
    "https://fal.run/\r\nauthorization: Key mine",
    "https://fal.run/ HTTP/1.1",
    "https://fal.run/a b",
    "https://fal.run/?a b",
    "https://fal.run/#a b",
    "https://fal. run/",
    "https://fal.run /",
    "https:// fal.run/",
    "https ://fal.run/",
    "ht\ttps://fal.run/",
    "https://f\tal.run/",
    "https://fal\n.run/",
    "https://evil.com\t.fal.run/",
    "https://evil.com\x00.fal.run/",
    "https://fal.run\x00.evil.com/",
    "https://fal.run/\x00",
    "https://fal.run/\x01",
    "https://fal.run/?\x1f",
    "https://fal.run/\x7f",
    "https://fal.run/?\x7f",
    "https://fal.run/#\x7f",
    "https://fal.run/\xa0",
    "https://fal.run/\x0b",
    "https://fal.run/\x0c",
    # Backslashes, which a WHATWG parser takes for slashes.
    "https://fal.run\\",
    "https://fal.run/\\evil.com",
    "https://fal.run/a\\b",
    "https://fal.run/?\\",
    "https://fal.run/#\\",
    # Several at once.
    "https://fal.run, https://fal.run/",
    "https://fal.run https://evil.com/",
    "https://fal.run;https://evil.com/",
    "https://fal.run|https://evil.com/",
]


def test_the_tables_are_as_large_as_they_should_be() -> None:
    """No case of the tables stands there twice."""
    assert len(REFUSED) == len(set(REFUSED)) >= 150
    assert len(ACCEPTED) == len({case[0] for case in ACCEPTED}) >= 40


@pytest.mark.parametrize(("url", "host", "path", "query"), ACCEPTED)
def test_a_url_of_fals_is_taken_apart_and_changed_in_nothing(url: str, host: str, path: str, query: str | None) -> None:
    """The parts are the caller's bytes, and the URL rebuilt from them is accepted as the same target."""
    target = parse_target(url)
    assert target == Target(host, path, query)
    assert parse_target(target.url) == target
    assert target.request_target == path + ("" if query is None else f"?{query}")


@pytest.mark.parametrize("url", REFUSED)
def test_anything_else_is_refused(url: str) -> None:
    """412, alone and also with something behind it that would make it look like fal's."""
    for variant in (url, f"{url}#https://fal.run/", f"{url}#.fal.ai"):
        with pytest.raises(TargetRefused):
            parse_target(variant)


def test_every_character_of_ascii_has_one_place() -> None:
    """In a path, a query and a fragment all printable ASCII passes but the backslash, and no other character does."""
    for code in range(256):
        character = chr(code)
        passes = "!" <= character <= "~" and character != "\\"
        for frame in ("https://fal.run/a{}b", "https://fal.run/?a{}b", "https://fal.run/#a{}b"):
            url = frame.format(character)
            if passes:
                assert parse_target(url).host == "fal.run"
            else:
                with pytest.raises(TargetRefused):
                    parse_target(url)


def test_in_a_host_only_lower_case_letters_digits_and_inner_hyphens_pass() -> None:
    """Any other character makes the URL refused; those that end a host leave one that is not fal's."""
    for code in range(0x3000):
        character = chr(code)
        url = f"https://a{character}b.fal.run/"
        if character in "abcdefghijklmnopqrstuvwxyz0123456789-.":
            assert parse_target(url).host == f"a{character}b.fal.run"
        else:
            with pytest.raises(TargetRefused):
                parse_target(url)


# The order of refusals: a fault, what it does to a call that may pass, and what it alone is answered.

Call = dict[str, str]
GOOD: Call = {"method": "POST", "url": "https://fal.run/a", "type": "application/json", "length": "10"}
FAULTS: list[tuple[Call, type[ProxyError], int]] = [
    ({"method": "PUT"}, MethodNotAllowed, 405),
    ({"url": ""}, TargetMissing, 400),
    ({"url": "https://evil.com/"}, TargetRefused, 412),
    ({"type": "text/plain"}, UnsupportedMediaType, 415),
    ({"length": "11"}, BodyTooLarge, 413),
]


def decided(call: Call) -> Target:
    headers = [("host", "app.example"), ("x-fal-target-url", call["url"])]
    headers += [("content-type", call["type"]), ("content-length", call["length"])]
    return decide(call["method"], headers, max_body_bytes=10)


@pytest.mark.parametrize("faults", [set_ for n in range(6) for set_ in itertools.combinations(FAULTS, n)])
def test_of_several_faults_the_first_of_the_formulas_order_is_answered(
    faults: tuple[tuple[Call, type[ProxyError], int], ...],
) -> None:
    """405, 400, 412, 415, 413: for every set of faults, the first. (A missing and a refused target: missing.)"""
    call = dict(GOOD)
    for change, _, _ in reversed(faults):
        call.update(change)
    if not faults:
        assert decided(call) == Target("fal.run", "/a")
    else:
        _, error, status = faults[0]
        with pytest.raises(error) as caught:
            decided(call)
        assert type(caught.value) is error
        assert caught.value.status == status


METHODS = {
    "GET": True,
    "POST": True,
} | dict.fromkeys(
    ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "CONNECT", "TRACE", "PROPFIND", "get", "Post", ""], False
)


@pytest.mark.parametrize(("method", "allowed"), METHODS.items())
def test_only_get_and_post_are_allowed(method: str, allowed: bool) -> None:
    """Any other method is 405 and names the allowed ones, be it written in another case."""
    headers = [("x-fal-target-url", "https://fal.run/")]
    if allowed:
        assert decide(method, headers, max_body_bytes=1).host == "fal.run"
    else:
        with pytest.raises(MethodNotAllowed) as caught:
            decide(method, headers, max_body_bytes=1)
        assert caught.value.headers == (("Allow", "GET, POST"),)


@pytest.mark.parametrize(
    "urls",
    [
        [],
        [""],
        ["", ""],
        ["https://fal.run/", "https://fal.run/"],
        ["https://fal.run/", "https://evil.com/"],
        ["https://evil.com/", "https://fal.run/"],
        ["", "https://fal.run/"],
        ["https://fal.run/", ""],
    ],
)
def test_exactly_one_target_header_is_needed(urls: list[str]) -> None:
    """None, an empty one and a repeated one are 400, whatever stands in them."""
    with pytest.raises(TargetMissing):
        decide("GET", [("x-fal-target-url", url) for url in urls], max_body_bytes=1)


# Headers about the body, and what they are answered: None for a call that passes. At most 100 bytes are allowed.
JSON = ("content-type", "application/json")
BODIES: list[tuple[list[tuple[str, str]], type[ProxyError] | None]] = [
    # No body, no check.
    ([], None),
    ([("content-length", "0")], None),
    ([("content-length", "00")], None),
    ([("content-length", "0"), ("content-type", "text/plain")], None),
    ([("content-type", "text/plain")], None),
    ([JSON], None),
    ([("content-encoding", "gzip")], None),
    # JSON, however it is spelled.
    ([JSON, ("content-length", "2")], None),
    ([("content-type", "application/json; charset=utf-8"), ("content-length", "2")], None),
    ([("content-type", "application/json;charset=UTF-8"), ("content-length", "2")], None),
    ([("content-type", "application/json ; a=b; c"), ("content-length", "2")], None),
    ([("content-type", "application/json\t;"), ("content-length", "2")], None),
    ([("content-type", "Application/JSON"), ("content-length", "2")], None),
    ([JSON, JSON, ("content-length", "2")], None),
    ([JSON, ("transfer-encoding", "chunked")], None),
    ([JSON, ("content-length", "2"), ("content-encoding", "identity")], None),
    ([JSON, ("content-length", "2"), ("content-encoding", "Identity")], None),
    # Anything else.
    ([("content-length", "2")], UnsupportedMediaType),
    ([("transfer-encoding", "chunked")], UnsupportedMediaType),
    ([("transfer-encoding", "chunked"), ("content-length", "0")], UnsupportedMediaType),
    ([("content-type", ""), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "text/plain"), ("transfer-encoding", "chunked")], UnsupportedMediaType),
    ([("content-type", "text/json"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/jsonp"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json5"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json-seq"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/problem+json"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "xapplication/json"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json, text/plain"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "text/plain; application/json"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json charset=utf-8"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json\n"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/json;\n"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "multipart/form-data; boundary=a"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "application/x-www-form-urlencoded"), ("content-length", "2")], UnsupportedMediaType),
    ([JSON, ("content-type", "text/plain"), ("content-length", "2")], UnsupportedMediaType),
    ([("content-type", "text/plain"), JSON, ("content-length", "2")], UnsupportedMediaType),
    # It would reach fal as JSON that is none, for content-encoding is not relayed.
    ([JSON, ("content-length", "2"), ("content-encoding", "gzip")], UnsupportedMediaType),
    ([JSON, ("transfer-encoding", "chunked"), ("content-encoding", "br")], UnsupportedMediaType),
    ([JSON, ("content-length", "2"), ("content-encoding", "identity, gzip")], UnsupportedMediaType),
    # Sizes.
    ([JSON, ("content-length", "100")], None),
    ([JSON, ("content-length", "101")], BodyTooLarge),
    ([JSON, ("content-length", "999999999999999999")], BodyTooLarge),
    ([JSON, ("content-length", "2"), ("content-length", "101")], BodyTooLarge),
    ([JSON, ("content-length", "0"), ("content-length", "101")], BodyTooLarge),
    # What is no length at all is Tornado's to refuse, and a body is counted while it is read.
    ([JSON, ("content-length", "-1")], None),
    ([JSON, ("content-length", "1e9")], None),
    ([JSON, ("content-length", "1_000")], None),
    ([JSON, ("content-length", "\u0661")], None),
]


@pytest.mark.parametrize(("headers", "error"), BODIES)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_body_must_be_json_and_not_too_large(
    method: str, headers: list[tuple[str, str]], error: type[ProxyError] | None
) -> None:
    """The same for GET and POST, for both can have a body or none."""
    headers = [("x-fal-target-url", "https://fal.run/"), *headers]
    if error is None:
        assert decide(method, headers, max_body_bytes=100).host == "fal.run"
    else:
        with pytest.raises(error):
            decide(method, headers, max_body_bytes=100)


# What goes upstream. The authorization is a constant here, for the rules never look into it.

AUTHORIZATION = b"authorization: Key a:b"

# A header of the caller's, and the line that it becomes.
RELAYED = [
    (("accept", "application/json, text/event-stream"), b"accept: application/json, text/event-stream"),
    (("content-type", "application/json; charset=utf-8"), b"content-type: application/json; charset=utf-8"),
    (("user-agent", "fal-client/1.10.1"), b"user-agent: fal-client/1.10.1"),
    (("x-fal-queue-priority", "normal"), b"x-fal-queue-priority: normal"),
    (("x-fal-request-timeout", "1.5"), b"x-fal-request-timeout: 1.5"),
    (("x-fal-object-lifecycle-preference", '{"a": 1}'), b'x-fal-object-lifecycle-preference: {"a": 1}'),
    (("x-fal-runner-hint", "a:b;c"), b"x-fal-runner-hint: a:b;c"),
    (("x-fal-a_b.c~d", "1"), b"x-fal-a_b.c~d: 1"),
    (("x-app-fal-disable-fallback", "true"), b"x-app-fal-disable-fallback: true"),
    (("x-fal-note", "tab\there"), b"x-fal-note: tab\there"),
    (("x-fal-note", "\xe6\x80\xff"), b"x-fal-note: \xe6\x80\xff"),
    # libcurl's notation of an empty value; with a colon it would send no such header.
    (("x-fal-empty", ""), b"x-fal-empty;"),
    (("accept", ""), b"accept;"),
]
# Headers of the caller's that stay here.
WITHHELD = [
    *[(name, "Key theirs") for name in ("authorization", "proxy-authorization", "x-api-key", "cookie", "cookie2")],
    ("x-fal-target-url", "https://fal.run/"),
    ("x-fal-client-proxy", "another/1"),
    ("host", "evil.com"),
    ("origin", "https://app.example"),
    ("referer", "https://app.example/page"),
    ("x-forwarded-for", "10.0.0.1"),
    ("x-forwarded-host", "evil.com"),
    ("forwarded", "for=10.0.0.1"),
    ("x-real-ip", "10.0.0.1"),
    ("via", "1.1 a"),
    ("connection", "close"),
    ("keep-alive", "timeout=5"),
    ("proxy-connection", "keep-alive"),
    ("te", "trailers"),
    ("trailer", "x-fal-a"),
    ("transfer-encoding", "chunked"),
    ("upgrade", "h2c"),
    ("http2-settings", "AAA"),
    ("content-length", "2"),
    ("content-encoding", "identity"),
    ("accept-encoding", "gzip"),
    ("accept-language", "en"),
    ("expect", "100-continue"),
    ("range", "bytes=0-1"),
    ("if-none-match", '"a"'),
    ("sec-fetch-site", "same-origin"),
    ("x-requested-with", "fetch"),
    ("x-fal", "1"),
    ("x-fal-", "1"),
    ("x-app-fal-", "1"),
    ("x-app-fal", "1"),
    ("x-app-x-fal-a", "1"),
    ("xx-fal-a", "1"),
    ("x_fal_a", "1"),
    # Names and values that could become, or end, another line.
    ("x-fal-a\r\nauthorization", "Key theirs"),
    ("x-fal-a: b\r\nauthorization", "Key theirs"),
    ("x-fal-a:", "1"),
    ("x-fal-a;", ""),
    ("x-fal-a ", "1"),
    ("x-fal-\xe6", "1"),
    ("x-fal-a", "b\r\nauthorization: Key theirs"),
    ("x-fal-a", "b\nc"),
    ("x-fal-a", "b\r"),
    ("x-fal-a", "b\n"),
    ("x-fal-a", "\x00"),
    ("x-fal-a", "\x1b[0m"),
    ("x-fal-a", "\x7f"),
    ("x-fal-a", "\u0100"),
    ("x-fal-a", "\u560d\u560a"),  # CR LF, if cut to a byte each
    ("user-agent", "a\r\nb: c"),
    ("accept", "a\x00"),
    ("content-type", "application/json\r\n"),
]
# An absent one of these is kept from being added by libcurl.
SILENCED = {b"accept:", b"content-type:", b"user-agent:"}


def test_of_a_bare_call_go_the_key_and_the_proxys_name() -> None:
    """libcurl adds none of its own accept, content-type, user-agent and Expect; the version is the package's."""
    lines = request_headers([], AUTHORIZATION)
    assert (
        set(lines)
        == {AUTHORIZATION, f"x-fal-client-proxy: tornado-fal-proxy/{__version__}".encode(), b"Expect:"} | SILENCED
    )
    assert len(lines) == len(set(lines))


def relayed(*headers: tuple[str, str]) -> list[bytes]:
    """The lines that these headers of a caller add."""
    constant = request_headers([], AUTHORIZATION)
    return [line for line in request_headers(headers, AUTHORIZATION) if line not in constant]


@pytest.mark.parametrize(("header", "line"), RELAYED)
def test_what_fal_reads_is_relayed(header: tuple[str, str], line: bytes) -> None:
    """As it came, and in place of the line that silences libcurl's own."""
    assert relayed(header) == [line]
    assert f"{header[0]}:".encode() not in request_headers([header], AUTHORIZATION)


@pytest.mark.parametrize("header", WITHHELD)
def test_nothing_else_is_relayed(header: tuple[str, str]) -> None:
    """With the header the lines are the same as without it."""
    assert sorted(request_headers([header], AUTHORIZATION)) == sorted(request_headers([], AUTHORIZATION))


def test_all_together_are_relayed_as_each_alone() -> None:
    """Order and duplicates stay, and what is withheld changes nothing about what is not."""
    headers = [
        pair for pairs in itertools.zip_longest([case[0] for case in RELAYED], WITHHELD) for pair in pairs if pair
    ]
    headers = [("x-fal-twice", "1"), *(header for header in headers if header[0] != "connection"), ("x-fal-twice", "2")]
    assert relayed(*headers) == [b"x-fal-twice: 1", *[case[1] for case in RELAYED], b"x-fal-twice: 2"]


def test_what_connection_lists_stays_here() -> None:
    """RFC 9110 section 7.6.1: such a header was meant for the proxy. It cannot take the key away."""
    listed = ("connection", "close, X-Fal-A ,x-fal-client-proxy,authorization")
    lines = request_headers(
        [("x-fal-a", "1"), listed, ("x-fal-b", "2"), ("connection", "accept"), ("accept", "c")], AUTHORIZATION
    )
    assert lines == [*request_headers([], AUTHORIZATION)[:3], b"x-fal-b: 2", *lines[4:]]
    assert set(lines[4:]) == SILENCED


@pytest.mark.parametrize(
    ("headers", "fits"),
    [
        ([("x-fal-a", "b")] * 64, True),
        ([("x-fal-a", "b")] * 65, False),
        ([("x-fal-a", "b" * (8192 - 32 - len("x-fal-a: ")))], True),
        ([("x-fal-a", "b" * (8193 - 32 - len("x-fal-a: ")))], False),
        ([("x-fal-a", "b" * 91)] * 62, True),
        ([("x-fal-a", "b" * 92)] * 62, False),
        ([("cookie", "b" * 60_000)] * 100, True),
        ([("x-fal-target-url", "b" * 60_000)] * 100, True),
    ],
)
def test_what_is_relayed_is_bounded(headers: list[tuple[str, str]], fits: bool) -> None:
    """In number and in size, with 32 bytes more for each; what stays here does not count."""
    if fits:
        request_headers(headers, AUTHORIZATION)
    else:
        with pytest.raises(HeadersTooLarge):
            request_headers(headers, AUTHORIZATION)


def test_no_line_holds_more_than_one_header() -> None:
    """Of all that is tried above nothing puts a line break, or a header's end, into what libcurl gets."""
    for line in request_headers([*(case[0] for case in RELAYED), *WITHHELD], AUTHORIZATION):
        assert not set(line) & {0, 10, 13}


# Answers.

OK = b"HTTP/1.1 200 OK\r\n"

# A status line, and the status and protocol that it says.
STATUS_LINES = [
    (b"HTTP/1.1 200 OK\r\n", 200, "1.1"),
    (b"HTTP/1.1 200 OK\n", 200, "1.1"),
    (b"HTTP/1.1 200 OK", 200, "1.1"),
    (b"HTTP/1.1 200 \r\n", 200, "1.1"),
    (b"HTTP/1.1 200\r\n", 200, "1.1"),
    (b"HTTP/1.0 404 Not Found\r\n", 404, "1.0"),
    (b"HTTP/2 200 \r\n", 200, "2"),
    (b"HTTP/2 429\r\n", 429, "2"),
    (b"HTTP/3 503 \r\n", 503, "3"),
    (b"HTTP/1.1 422 caf\xe9 \xff\r\n", 422, "1.1"),
    (b"HTTP/1.1 200 a  b\tc\r\n", 200, "1.1"),
    (b"HTTP/1.1 100 Continue\r\n", 100, "1.1"),
    (b"HTTP/1.1 103 Early Hints\r\n", 103, "1.1"),
    (b"HTTP/1.1 599 Odd\r\n", 599, "1.1"),
    (b"HTTP/1.1 999 Odd\r\n", 999, "1.1"),
]
BAD_STATUS_LINES = [
    b"",
    b"\r\n",
    b"OK\r\n",
    b"200 OK\r\n",
    b"HTTP/1.1\r\n",
    b"HTTP/1.1 \r\n",
    b"HTTP/1.1  200 OK\r\n",
    b"HTTP/1.1 20 OK\r\n",
    b"HTTP/1.1 2000 OK\r\n",
    b"HTTP/1.1 099 OK\r\n",
    b"HTTP/1.1 000 OK\r\n",
    b"HTTP/1.1 -20 OK\r\n",
    b"HTTP/1.1 2x0 OK\r\n",
    b"HTTP/1.1 200OK\r\n",
    b"HTTP/11 200 OK\r\n",
    b"HTTP/1.10 200 OK\r\n",
    b"HTTP/ 200 OK\r\n",
    b"http/1.1 200 OK\r\n",
    b" HTTP/1.1 200 OK\r\n",
    b"ICY 200 OK\r\n",
    b"SSH-2.0-OpenSSH\r\n",
    b"\x00\xff\r\n",
    b"HTTP/1.1\t200 OK\r\n",
    b"content-type: application/json\r\n",
]


@pytest.mark.parametrize(("line", "status", "protocol"), STATUS_LINES)
def test_a_status_line_says_status_and_protocol(line: bytes, status: int, protocol: str) -> None:
    """Its reason is nobody's business and may be anything."""
    head = parse_response_head([line])
    assert (head.status, head.protocol, head.headers, head.length) == (status, protocol, [], None)
    assert head.has_body is (status not in (204, 304))


@pytest.mark.parametrize("line", BAD_STATUS_LINES)
def test_anything_else_is_a_malformed_answer(line: bytes) -> None:
    """502 to the caller, and at most 80 bytes of the line to the log."""
    with pytest.raises(MalformedAnswer) as caught:
        parse_response_head([line, b"content-type: application/json\r\n"])
    assert caught.value.status == 502
    assert repr(line[:80]) in caught.value.detail


def test_no_head_at_all_is_a_malformed_answer() -> None:
    """And a very long line does not fill the log."""
    for lines in ([], [b"x" * 100_000]):
        with pytest.raises(MalformedAnswer) as caught:
            parse_response_head(lines)
        assert len(caught.value.detail) < 200


@pytest.mark.parametrize("status", [204, 304])
def test_two_statuses_have_no_body(status: int) -> None:
    """RFC 9110 sections 15.3.5 and 15.4.5."""
    assert not parse_response_head([b"HTTP/1.1 %d \r\n" % status]).has_body


# The lines of an answer, and the headers that the caller gets.
ANSWERS: list[tuple[list[bytes], list[tuple[str, str]]]] = [
    ([b"Content-Type: application/json\r\n"], [("content-type", "application/json")]),
    ([b"content-type:application/json\n"], [("content-type", "application/json")]),
    ([b"x-a: \t b c \t \r\n"], [("x-a", "b c")]),
    ([b"x-a:\r\n"], [("x-a", "")]),
    ([b"x-a:  \t\r\n"], [("x-a", "")]),
    ([b"x-a: b:c: d\r\n"], [("x-a", "b:c: d")]),
    ([b"x-a: caf\xc3\xa9 \xe9\xff\x80\r\n"], [("x-a", "caf\xc3\xa9 \xe9\xff\x80")]),
    (
        [b"x-fal-request-id: 1\r\n", b"x-fal-request-timeout-type: user\r\n"],
        [("x-fal-request-id", "1"), ("x-fal-request-timeout-type", "user")],
    ),
    # Duplicates and order.
    (
        [b"Set-Cookie: a=1\r\n", b"x-b: 1\r\n", b"Set-Cookie: c=2\r\n"],
        [("set-cookie", "a=1"), ("x-b", "1"), ("set-cookie", "c=2")],
    ),
    # What the server sets itself.
    ([b"Content-Length: 5\r\n", b"Content-Encoding: gzip\r\n", b"x-a: 1\r\n"], [("x-a", "1")]),
    # Hop by hop.
    (
        [
            b"Connection: keep-alive\r\n",
            b"Keep-Alive: timeout=5\r\n",
            b"Proxy-Connection: close\r\n",
            b"Proxy-Authenticate: Basic\r\n",
            b"Proxy-Authentication-Info: a\r\n",
            b"Proxy-Anything: a\r\n",
            b"TE: trailers\r\n",
            b"Trailer: x-a\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Upgrade: h2c\r\n",
            b"x-a: 1\r\n",
        ],
        [("x-a", "1")],
    ),
    ([b"X-A: 1\r\n", b"connection: close, X-a\r\n", b"x-b: 2\r\n"], [("x-b", "2")]),
    (
        [
            b"connection: x-a\r\n",
            b"Connection:\tx-b ,, X-C\r\n",
            b"x-a: 1\r\n",
            b"x-b: 2\r\n",
            b"x-c: 3\r\n",
            b"x-d: 4\r\n",
        ],
        [("x-d", "4")],
    ),
    # Lines that are no field are left out, and their neighbours stay.
    ([b"x-a: 1\r\n", b"no colon\r\n", b"x-b: 2\r\n"], [("x-a", "1"), ("x-b", "2")]),
    ([b": 1\r\n", b"x b: 1\r\n", b"x-c : 1\r\n", b"x(d): 1\r\n", b"x-\xe9: 1\r\n", b"x-f: 2\r\n"], [("x-f", "2")]),
    (
        [b"x-a: 1\x002\r\n", b"x-b: 1\r2\r\n", b"x-c: \x7f\r\n", b"x-d: \x1b\r\n", b"x-e: 1\n2\r\n", b"x-f: 2\r\n"],
        [("x-f", "2")],
    ),
    ([b"\r\n", b"x-a: 1\r\n"], [("x-a", "1")]),
    # Folds.
    ([b"x-a: 1\r\n", b"  2\r\n", b"\t3\r\n", b"x-b: 4\r\n"], [("x-a", "1 2 3"), ("x-b", "4")]),
    ([b"x-a:\r\n", b" 1\r\n"], [("x-a", "1")]),
    ([b" 1\r\n", b"x-a: 2\r\n"], [("x-a", "2")]),
    ([b"no colon\r\n", b" x-a: 1\r\n", b"x-b: 2\r\n"], [("x-b", "2")]),
    ([b"connection: x-a,\r\n", b" x-b\r\n", b"x-b: 1\r\n"], []),
]


@pytest.mark.parametrize(("lines", "headers"), ANSWERS)
def test_the_callers_headers_are_the_targets(lines: list[bytes], headers: list[tuple[str, str]]) -> None:
    """But for what HTTP forbids to forward and what the server sets itself."""
    assert parse_response_head([OK, *lines]).headers == headers


# The lines of an answer, and the length that may be promised to the caller.
LENGTHS: list[tuple[list[bytes], int | None]] = [
    ([], None),
    ([b"content-length: 0\r\n"], 0),
    ([b"Content-Length: 12345678901\r\n"], 12_345_678_901),
    ([b"content-length: 12\r\n", b"content-encoding: gzip\r\n"], None),
    ([b"content-encoding: br\r\n", b"content-length: 12\r\n"], None),
    ([b"content-length: 12\r\n", b"transfer-encoding: chunked\r\n"], None),
    ([b"content-length: -1\r\n"], None),
    ([b"content-length: +1\r\n"], None),
    ([b"content-length: 1_0\r\n"], None),
    ([b"content-length: 0x1\r\n"], None),
    ([b"content-length: 5, 5\r\n"], None),
    ([b"content-length: 9999999999999999999\r\n"], None),
    ([b"content-length:\r\n"], None),
]


@pytest.mark.parametrize(("lines", "length"), LENGTHS)
def test_a_length_counts_only_where_it_is_the_bodys(lines: list[bytes], length: int | None) -> None:
    """An encoded body reaches the caller decoded; a transfer-encoding makes a length void (RFC 9112 section 6.3)."""
    assert parse_response_head([OK, *lines]).length == length


@pytest.mark.parametrize(
    ("value", "event_stream"),
    [
        (b"text/event-stream", True),
        (b"Text/Event-Stream; charset=utf-8", True),
        (b"application/json", False),
        (b"application/json; a=text/event-stream", False),
        (b"", False),
    ],
)
def test_an_event_stream_is_known_by_its_type(value: bytes, event_stream: bool) -> None:
    """As fal's client knows it: by how the content-type begins."""
    assert parse_response_head([OK, b"content-type: %b\r\n" % value]).event_stream is event_stream


@pytest.mark.parametrize("value", [b" " * 100_000 + b"\x01", b"a " * 50_000 + b"\x01", b" \t" * 50_000, b"a" * 100_000])
def test_a_hostile_line_costs_no_time(value: bytes) -> None:
    """libcurl lets lines of 100 kB through; one may not stop the process while a pattern backtracks."""
    started = time.process_time()
    parse_response_head([OK, b"x-a:" + value + b"\r\n"])
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "url",
    ["https://" + "a-" * 50_000 + ".fal.run", "https://" + "a." * 50_000, "https://fal.run/" + "/" * 65_536 + " "],
)
def test_a_hostile_target_costs_no_time(url: str) -> None:
    """Nor may a caller's."""
    started = time.process_time()
    with pytest.raises(TargetRefused):
        parse_target(url)
    assert time.process_time() - started < 1
