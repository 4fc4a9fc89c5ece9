"""No input makes the rules work for longer than in proportion to its length. Work is counted, not timed."""

import contextlib
import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import pytest

import tornado_fal_proxy
from tests.support.access_rules import rules
from tests.support.backtracking import TooManySteps, growth
from tests.support.work import lines_run
from tornado_fal_proxy.errors import EndpointNotAllowed, TargetRefused
from tornado_fal_proxy.rules.headers import list_members, parse_response_head
from tornado_fal_proxy.rules.paths import MAX_PATH_CHARS, MAX_SEGMENTS
from tornado_fal_proxy.rules.patterns import Pattern
from tornado_fal_proxy.rules.target import MAX_URL_CHARS, Target, parse_target

# Twice the input is twice the work, and a little for what is done once. Quadratic work is almost four times as much.
MAX_GROWTH = 2.5


def patterns() -> dict[str, re.Pattern[Any]]:
    """Return all that modules of the package have compiled."""
    found = {}
    for info in pkgutil.walk_packages(tornado_fal_proxy.__path__, "tornado_fal_proxy."):
        if not info.name.endswith("__main__"):
            for name, value in vars(importlib.import_module(info.name)).items():
                if isinstance(value, re.Pattern):
                    found[f"{info.name}.{name}"] = value
    return found


PATTERNS = patterns()


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_no_expression_backtracks_over_and_over(name: str) -> None:
    """libcurl lets lines of 100 kB through, and a query may have 60 kB: one may not stop the process."""
    assert growth(PATTERNS[name]) < MAX_GROWTH


@pytest.mark.parametrize(
    "text", ["x/" + "*a" * 12 + "b", "x/*" + "a*" * 12 + "b", "x/*a*b*c", "a*/*-b*", "x/" + "*a" * 3 + "*"]
)
def test_no_endpoint_pattern_backtracks_over_and_over(text: str) -> None:
    """However many stars an operator writes."""
    for segment in Pattern.parse(text).segments:
        assert segment is not None
        assert growth(segment) < MAX_GROWTH


@pytest.mark.parametrize(
    "expression", ["a*a*b", r"x:[ \t]*([ -~]*)[ \t]*\r?", "(?:a|a)+b", "[a-z]+[0-9a-z]+!", "(?:ab?)+c*(?:ab?)+!"]
)
def test_what_backtracks_is_found(expression: str) -> None:
    """The count tells those that take quadratic or exponential time."""
    with contextlib.suppress(TooManySteps):
        assert growth(re.compile(expression), 20) > MAX_GROWTH


OK = b"HTTP/1.1 200 OK\r\n"
# Parts of a response's head that stand there many times: in a header, in one that lists names, or as lines.
HEADS: list[tuple[bytes, bytes, bytes]] = [
    *((b"x-a:", part, b"\x01\r\n") for part in (b" ", b"a ", b" \t", b"a")),
    *((b"connection:", part, b"\r\n") for part in (b"a,", b" ", b",")),
    (b"x-a: 1\r\n", b" a\r\n", b""),
    (b"", b"x-a: 1\r\n", b""),
]
# And of a query.
QUERIES = [
    ("", "%25", ""),
    ("", "&", ""),
    ("", "a=b&", ""),
    ("", "%2525", "=x"),
    ("fal_webhook=https://hooks.example/", "%41", ""),
]


@pytest.mark.parametrize(("begin", "part", "end"), HEADS)
def test_a_head_is_work_in_proportion_to_its_length(begin: bytes, part: bytes, end: bytes) -> None:
    """Twice the length is twice the work, or less."""

    def parse(times: int) -> object:
        return parse_response_head([OK, *(begin + part * times + end).splitlines(keepends=True)])

    assert growth_of(parse) <= MAX_GROWTH


@pytest.mark.parametrize(("begin", "part", "end"), QUERIES)
def test_a_query_is_work_in_proportion_to_its_length(begin: str, part: str, end: str) -> None:
    """Looking for webhooks in it decodes it three times."""
    access = rules(allowed_webhooks=("https://hooks.example",))
    assert (
        growth_of(lambda times: access.check("GET", Target("fal.run", "/x", begin + part * times + end))) <= MAX_GROWTH
    )


def growth_of(function: Callable[[int], object]) -> float:
    """Return how much more work is done for twice as many parts."""
    function(1)  # what is done for the first call alone
    return lines_run(lambda: function(1000)) / lines_run(lambda: function(500))


def allows(pattern: str, path: str) -> bool:
    try:
        rules(allowed_endpoints=(pattern,)).check("GET", Target("fal.run", path))
    except EndpointNotAllowed:
        return False
    return True


def test_what_a_pattern_is_asked_about_is_bounded() -> None:
    """One character or one segment more is refused, though ** would match it."""
    for path in ("/a/" + "a" * (MAX_PATH_CHARS - 3), "/a" * MAX_SEGMENTS):
        assert allows("**", path)
        assert not allows("**", path + "a" if path.endswith("aaa") else path + "/a")


def test_many_stars_are_not_tried_in_all_ways() -> None:
    """Twice the segments are twice the work."""
    access = rules(allowed_endpoints=("**/a/**/a/**/a/**/b",))

    def check(segments: int) -> None:
        with pytest.raises(EndpointNotAllowed):
            access.check("GET", Target("fal.run", "/a" * segments))

    check(2)
    assert lines_run(lambda: check(MAX_SEGMENTS)) <= MAX_GROWTH * lines_run(lambda: check(MAX_SEGMENTS // 2))


def test_a_list_of_commas_is_no_work() -> None:
    """Each different member of a list is looked at once, however often it is there."""
    assert list_members("a, B ,,b,\tA" + ", ,a" * 1000) == {"a", "b", ""}
    assert lines_run(lambda: list_members(", ,a" * 10_000)) < 20


@pytest.mark.parametrize("url", ["https://{}.fal.run", "https://{}", "https://fal.run/{} "])
def test_a_target_that_is_too_long_is_not_parsed(url: str) -> None:
    """One that is just short enough is refused in steps that grow with its length, like all expressions here."""
    with pytest.raises(TargetRefused, match=r"a URL of [0-9]+ characters"):
        parse_target(url.format("a" * MAX_URL_CHARS))
