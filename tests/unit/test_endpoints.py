"""Which calls may be sent again, and which cost money: decided by what the target does, never by the method alone."""

import pytest

from tornado_fal_proxy.rules.endpoints import is_repeatable, kind_of, may_name_job
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


# A method, a target, whether the call is paid, its endpoint, and the id of its job.
RUN, QUEUE, REST, WMA = "https://fal.run", "https://queue.fal.run", "https://rest.fal.ai", "https://wma.fal.run"
PAID: list[tuple[str, str, bool, str, str | None]] = [
    ("POST", f"{RUN}/fal-ai/flux/dev", True, "fal-ai/flux/dev", None),
    ("GET", f"{RUN}/fal-ai/flux/dev?prompt=x", True, "fal-ai/flux/dev", None),
    ("POST", f"{RUN}/fal-ai/flux/dev/stream", True, "fal-ai/flux/dev", None),
    ("POST", f"{RUN}/fal-ai/stream", True, "fal-ai/stream", None),
    ("POST", f"{RUN}/workflows/me/flow/stream", True, "workflows/me/flow", None),
    ("POST", f"{RUN}/workflows/me", True, "other", None),
    ("POST", f"{RUN}/fal-ai/flux//dev", True, "other", None),
    ("POST", f"{RUN}/fal-ai/flux/dev/", True, "other", None),
    ("POST", f"{RUN}/fal-ai/fl%75x", True, "other", None),
    ("POST", f"{RUN}/fal-ai", True, "other", None),
    ("POST", f"{RUN}/", True, "other", None),
    ("POST", f"{RUN}/fal-ai/flux/requests/1/ice", True, "fal-ai/flux", None),
    ("POST", f"{RUN}/fal-ai/flux/dev/ice", False, "fal-ai/flux/dev", None),
    ("POST", f"{RUN}/fal-ai/flux/dev/ice?a", True, "fal-ai/flux/dev", None),
    ("GET", f"{RUN}/fal-ai/flux/dev/ice", True, "fal-ai/flux/dev", None),
    ("POST", f"{RUN}/fal-ai/ice", True, "fal-ai/ice", None),
    ("POST", f"{QUEUE}/fal-ai/flux/dev?fal_webhook=x", True, "fal-ai/flux/dev", None),
    ("POST", f"{QUEUE}/fal-ai/flux/dev/stream", True, "fal-ai/flux/dev/stream", None),
    ("GET", f"{QUEUE}/fal-ai/flux/dev", True, "fal-ai/flux/dev", None),
    ("GET", JOB, False, "fal-ai/flux", "764cabcf"),
    ("GET", f"{JOB}/status?logs=1", False, "fal-ai/flux", "764cabcf"),
    ("GET", f"{JOB}/status/stream?logs=1", False, "fal-ai/flux", "764cabcf"),
    ("PUT", f"{JOB}/cancel", False, "fal-ai/flux", "764cabcf"),
    ("GET", f"{QUEUE}/workflows/me/flow/requests/764cabcf", False, "workflows/me/flow", "764cabcf"),
    ("POST", JOB, True, "fal-ai/flux", None),
    ("GET", f"{JOB}/", True, "other", None),
    ("GET", f"{JOB}/cancel", True, "fal-ai/flux", None),
    ("GET", f"{QUEUE}/fal-ai/requests/764cabcf", True, "other", None),
    ("GET", f"{QUEUE}/requests/fal-ai/flux", True, "other", None),
    ("POST", f"{REST}/storage/upload/initiate?storage_type=fal-cdn-v3", False, "other", None),
    ("POST", "https://rest.alpha.fal.ai/storage/upload/initiate", False, "other", None),
    ("POST", f"{REST}/storage//upload", True, "other", None),
    ("POST", f"{REST}/storages/upload", True, "other", None),
    ("POST", "https://rest.beta.fal.ai/storage/upload", True, "other", None),
    ("POST", f"{REST}/tokens/", True, "realtime/token", None),
    ("POST", f"{REST}/tokens/realtime", True, "realtime/token", None),
    ("POST", f"{REST}/tokens//", True, "other", None),
    ("POST", f"{WMA}/session", True, "wma/session", None),
    ("POST", f"{WMA}/ice", False, "other", None),
    ("POST", f"{WMA}/session/heartbeat", False, "other", None),
    ("POST", f"{WMA}/session/heartbeat?a", True, "other", None),
    ("GET", f"{WMA}/session/heartbeat", True, "other", None),
    ("POST", f"{WMA}/session/heartbeat/", True, "other", None),
    ("POST", f"{WMA}/session/other", True, "other", None),
    ("POST", "https://new.fal.run/fal-ai/flux", True, "other", None),
]


@pytest.mark.parametrize(("method", "url", "paid", "endpoint", "job_id"), PAID)
def test_a_call_is_paid_unless_it_is_known_to_be_free(
    method: str, url: str, paid: bool, endpoint: str, job_id: str | None
) -> None:
    """A target knows its cost, its endpoint and its job; what nobody thought of is paid."""
    target = parse_target(url, method)
    assert (target.paid, target.endpoint, target.job_id) == (paid, endpoint, job_id)
    assert target.kind == kind_of(target)
    if not paid:
        assert not is_repeatable(method, target) or job_id


@pytest.mark.parametrize(
    ("url", "may"),
    [
        (JOB, True),
        (f"{JOB}/other/more", True),
        (f"{QUEUE}/fal-ai/flux//requests/764cabcf", True),
        (f"{QUEUE}/fal-ai/flux/%72equests/764cabcf", True),
        (f"{QUEUE}/fal-ai/flux/REQUESTS/764cabcf", True),
        (f"{QUEUE}/fal-ai/flux/../flux/requests/764cabcf", True),
        (f"{RUN}/fal-ai/flux/requests/764cabcf", True),
        (f"{RUN}/fal-ai/flux/dev", False),
        (f"{REST}/tokens/", False),
        (f"{RUN}/", False),
    ],
)
def test_no_spelling_hides_the_id_of_a_job(url: str, may: bool) -> None:
    """A path that a server may read in another way may name a job."""
    assert may_name_job(parse_target(url)) is may
