"""Strategies for hypothesis: URLs that are right, and near misses."""

import string

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

__all__ = ["TAILS", "examples", "mutated_urls"]


def examples(count: int) -> settings:
    """Return settings for ``count`` examples, the same in every run.

    One fixture serves all examples, and the suite has a deadline of its own.
    """
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


# Near misses: pieces that are right, pieces that look right, and pieces that are put anywhere.
GOOD_LABELS = st.from_regex(
    r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True, alphabet=string.ascii_lowercase + "0123456789-"
)
HOSTS = st.builds(
    lambda labels, apex: ".".join([*labels, apex]),
    st.lists(GOOD_LABELS, max_size=4),
    st.sampled_from(["fal.run", "fal.ai"]),
)
TAILS = st.text("abcAZ019-._~%2fFeE:/?#[]@!$&'()*+,;=\"<>^`{|}", max_size=24)
GOOD_URLS = st.builds(
    lambda host, port, path, query, fragment: f"https://{host}{port}{path}{query}{fragment}",
    HOSTS,
    st.sampled_from(["", "", "", ":443"]),
    st.just("")
    | TAILS.map(lambda text: "/" + text.replace("?", "").replace("#", ""))
    | st.sampled_from(["/a/../b", "//c", "/%2e%2E/"]),
    st.just("") | TAILS.map(lambda text: "?" + text.replace("#", "")),
    st.just("") | TAILS.map(lambda text: "#" + text),
)
INTRUDERS = st.sampled_from(
    [
        *"@:/\\?#[]%.-_;,&=*|\"' \t\n\r\0\x7f\xad。．／＃ａа",  # noqa: RUF001
        *("//", "\\\\", "..", "https://", "http://", "%2e", "%2f", "%00", "%40", "xn--", "xn--fal-"),
        *("@evil.com", ".evil.com", "evil.com/", "evil.com#", "evil.com?", "evil.com\\", "fal.run", ".fal.ai"),
        *(":80", ":443", ":0443", "[::1]", "127.0.0.1", "0x7f.1"),
    ]
)


@st.composite
def mutated_urls(draw: st.DrawFn) -> str:
    """Draw a good URL with up to three changes, each of which removes, replaces or adds something."""
    url = draw(GOOD_URLS)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(url)))
        end = draw(st.integers(start, min(len(url), start + 3)))
        url = url[:start] + draw(INTRUDERS | st.just("") | st.characters()) + url[end:]
    return url
