"""The target: URLs of fal's beside those that are refused, as tables."""

import pytest

from tornado_fal_proxy.errors import (
    TargetRefused,
)
from tornado_fal_proxy.rules.target import Target, parse_target

LABEL_63 = "a" * 63
HOST_253 = ".".join([LABEL_63] * 3 + ["a" * (253 - 3 * 64 - len(".fal.run")), "fal.run"])

# URL, and the host, path and query that go upstream: byte for byte those of the client.
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
    # URLs that fal's SDKs send.
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
    # Upper case, which none of fal's SDKs writes.
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
    """The tables have enough cases, and none of them twice."""
    assert len(REFUSED) == len(set(REFUSED)) >= 150
    assert len(ACCEPTED) == len({case[0] for case in ACCEPTED}) >= 40


@pytest.mark.parametrize(("url", "host", "path", "query"), ACCEPTED)
def test_a_url_of_fals_is_taken_apart_and_changed_in_nothing(url: str, host: str, path: str, query: str | None) -> None:
    """The parts are the client's bytes, and the URL rebuilt from them is accepted as the same target."""
    target = parse_target(url)
    assert target == Target(host, path, query)
    assert parse_target(target.url) == target
    assert target.request_target == path + ("" if query is None else f"?{query}")


@pytest.mark.parametrize("url", REFUSED)
def test_anything_else_is_refused(url: str) -> None:
    """Any other URL is refused, alone and with something behind it that would make it look like fal's."""
    for variant in (url, f"{url}#https://fal.run/", f"{url}#.fal.ai"):
        with pytest.raises(TargetRefused):
            parse_target(variant)
