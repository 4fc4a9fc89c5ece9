"""Whatever parse_target accepts, urllib.parse and Ada (Node.js's WHATWG parser, as `ada-url`) read the same way."""

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from fuzz import properties
from tests.support.strategies import TAILS, examples, mutated_urls
from tornado_fal_proxy.errors import TargetRefused
from tornado_fal_proxy.rules.target import Target, parse_target


def accepted(url: str) -> Target | None:
    try:
        return parse_target(url)
    except TargetRefused:
        return None


@pytest.mark.slow
@examples(2000)
@given(url=mutated_urls() | st.text() | TAILS.map("https://".__add__))
def test_other_parsers_read_the_same_host_and_path(url: str) -> None:
    """The client's own string and the rebuilt URL are one and the same address to urllib and to a WHATWG parser."""
    event("accepted" if properties.target(url) else "refused")


@pytest.mark.slow
@examples(1000)
@given(url=mutated_urls())
def test_an_accepted_url_is_rebuilt_into_itself(url: str) -> None:
    """The rebuilt URL is accepted again as the same target, because there is one spelling."""
    target = accepted(url)
    if target is not None:
        assert accepted(target.url) == target
