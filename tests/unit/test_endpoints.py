"""Which calls may be sent again: decided by what the target does, never by the method alone."""

import pytest

from tornado_fal_proxy.rules.endpoints import is_repeatable, kind_of
from tornado_fal_proxy.rules.target import parse_target

JOB = "https://queue.fal.run/fal-ai/flux/requests/764cabcf"

# A method, a target, and whether a second request costs no more than one.
CALLS: list[tuple[str, str, bool]] = [
    ("GET", JOB, True),
    ("GET", f"{JOB}/status", True),
    ("GET", f"{JOB}/status?logs=1", True),
    ("GET", f"{JOB}/status/stream", True),
    ("GET", "https://queue.fal.run/workflows/me/flow/requests/764cabcf", True),
    ("PUT", f"{JOB}/cancel", True),
    ("POST", JOB, False),
    ("POST", "https://fal.run/fal-ai/flux/dev", False),
    ("GET", "https://fal.run/fal-ai/flux/dev", False),
    ("GET", "https://fal.run/fal-ai/flux/requests/764cabcf", False),
    ("GET", "https://queue.fal.run/fal-ai/flux/dev", False),
    ("GET", "https://queue.fal.run/fal-ai/flux/dev/requests/764cabcf", False),
    ("GET", f"{JOB}/cancel", False),
    ("GET", f"{JOB}/other", False),
    ("GET", f"{JOB}/", False),
    ("GET", f"{JOB}%2Fstatus", False),
    ("GET", "https://queue.fal.run/fal-ai/flux//requests/764cabcf", False),
    ("GET", "https://queue.fal.run/requests/requests/requests", False),
    ("GET", "https://other.fal.run/fal-ai/flux/requests/764cabcf", False),
    ("GET", "https://rest.fal.ai/tokens/", False),
    ("PUT", JOB, False),
    ("PUT", f"{JOB}/cancel?a", False),
]


@pytest.mark.parametrize(("method", "url", "repeatable"), CALLS)
def test_only_reads_of_jobs_and_their_cancel_are_repeated(method: str, url: str, repeatable: bool) -> None:
    """A GET of an endpoint runs the model and is billed, and any path that is not known may be one."""
    assert is_repeatable(method, parse_target(url)) is repeatable


def test_a_request_without_a_target_has_a_kind() -> None:
    """Logs and metrics name a request without a valid target too."""
    assert kind_of(None) == "none"
