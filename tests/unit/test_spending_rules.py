"""The rules of spending: plans, prices, counters, users and their tags, and the words of a refusal."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_fal_proxy import ConfigError, ProxyConfig
from tornado_fal_proxy.errors import PriceUnknown, QuotaUsedUp
from tornado_fal_proxy.spending.identity import ADDRESS, address_user, identity, tag_of
from tornado_fal_proxy.spending.plans import SpendingRules, Terms
from tornado_fal_proxy.spending.prices import billed_units, estimated_units, prices_of
from tornado_fal_proxy.spending.refusals import limit_fields, refusal
from tornado_fal_proxy.spending.store import Standing

NOW = 1_795_737_599.5  # 2026-11-26T23:59:59.5Z
DAY = 1_795_651_200  # its beginning


def rules(**fields: Any) -> SpendingRules:
    spending = ProxyConfig(**fields).spending
    assert spending is not None
    return spending


def terms(spending: SpendingRules, user: str = "ann", units: int | None = None, plan: str | None = None) -> Terms:
    found = spending.plan(plan)
    assert found is not None
    return spending.terms(user, found, "fal-ai/flux/dev", units, NOW, "id")


# Which options make rules, and which need a store.
SET: list[tuple[dict[str, Any], bool | None]] = [
    ({}, None),
    ({"count": "units", "on_store_failure": "allow", "job_lifetime_s": 60, "account_days": 1}, None),
    ({"plans": {}}, None),
    ({"identify": print}, False),
    ({"check_input": print}, False),
    ({"tag_users": True}, False),
    ({"input_units": print}, False),
    ({"store": "memory"}, True),
    ({"jobs": "1/day"}, True),
    ({"jobs_per_user": "1/day"}, True),
    ({"unfinished_jobs_per_user": 1}, True),
    ({"own_jobs_only": True}, True),
    ({"prices": {"a/b": 1}}, True),
    ({"plans": {"free": {}}}, True),
]


@pytest.mark.parametrize(("fields", "needs_store"), SET)
def test_nothing_is_compiled_or_counted_without_need(fields: dict[str, Any], needs_store: bool | None) -> None:
    """Without an option of spending there are no rules, and a store is opened only where something is counted."""
    spending = ProxyConfig(**fields).spending
    assert (None if spending is None else spending.needs_store) is needs_store


def test_a_plan_has_the_rest_from_the_options() -> None:
    """A named plan has what it names, and ``none`` lifts what the options set."""
    spending = rules(
        jobs_per_user="1/day",
        unfinished_jobs_per_user=2,
        budget_per_user="1/day",
        prices={"**": 1},
        plans={
            "same": {},
            "more": {"jobs_per_user": "5/minute,9/day", "unfinished_jobs_per_user": "3"},
            "free": {"jobs_per_user": "none", "unfinished_jobs_per_user": "none", "budget_per_user": "none"},
        },
    )
    same, more, free = (spending.plans[name] for name in ("same", "more", "free"))
    assert (same.jobs, same.max_unfinished, same.budget) == (
        spending.default.jobs,
        spending.default.max_unfinished,
        spending.default.budget,
    )
    assert [(limit.amount, limit.period) for limit in more.jobs] == [(5, "minute"), (9, "day")]
    assert (more.max_unfinished, more.budget) == (3, spending.default.budget)
    assert (free.jobs, free.max_unfinished, free.budget) == ((), None, ())
    assert spending.plan(None) == spending.default
    assert spending.plan("gold") is None


@pytest.mark.parametrize(
    ("fields", "problems"),
    [
        ({"budget": "1/day", "budget_per_user": "1/day"}, ["budget_per_user", "budget"]),
        ({"plans": {"free": {"budget_per_user": "1/day"}}}, ["plans"]),
        ({"budget": "1/day", "prices": {"a": 1}}, ["prices"]),
    ],
)
def test_a_budget_needs_prices(fields: dict[str, Any], problems: list[str]) -> None:
    """A budget without prices would refuse every call."""
    with pytest.raises(ConfigError) as caught:
        ProxyConfig(**fields)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == problems


def test_the_password_of_a_store_is_shown_nowhere() -> None:
    """Neither a repr nor an error has it."""
    assert "secret" not in repr(ProxyConfig(store="redis://:secret@localhost"))
    with pytest.raises(ConfigError) as caught:
        ProxyConfig(store="rediis://:secret@localhost")
    assert "secret" not in str(caught.value)


# Counters.


def test_counters() -> None:
    """A call adds to the user's counters, then to those of all, first of jobs and then of money."""
    spending = rules(
        jobs_per_user="5/minute,20/day", jobs="9/hour", budget_per_user="1.50/month", budget="2/day", prices={"**": 0.5}
    )
    job = terms(spending).reservation
    assert [(each.key, each.limit, each.ends) for each in job.job_counters] == [
        (f"user/ann/jobs/minute/{DAY + 86_340}", 5, DAY + 86_400),
        (f"user/ann/jobs/day/{DAY}", 20, DAY + 86_400),
        (f"all/jobs/hour/{DAY + 82_800}", 9, DAY + 86_400),
    ]
    assert [(each.key, each.limit) for each in job.cost_counters] == [
        (f"user/ann/cost/month/{DAY - 25 * 86_400}", 1_500_000),
        (f"all/cost/day/{DAY}", 2_000_000),
    ]
    assert (job.jobs, job.units, job.cost, job.at, job.unfinished_until) == (
        1,
        10**6,
        500_000,
        int(NOW),
        int(NOW) + 3600,
    )


IDS = st.text(st.sampled_from("a/all0:jobsday"), min_size=1, max_size=20)


@given(IDS, IDS)
def test_no_two_users_share_a_counter(one: str, other: str) -> None:
    """Whatever is in an id, its counters are its own, and none is one of all users."""
    spending = rules(jobs_per_user="1/day,1/month", jobs="1/day")
    keys = [{each.key for each in terms(spending, user).reservation.job_counters} for user in (one, other)]
    assert all(len(each) == 3 for each in keys)
    assert keys[0] & keys[1] == {f"all/jobs/day/{DAY}"} or one == other


@pytest.mark.parametrize(
    ("count", "units", "jobs"), [("calls", 4_000_000, 1), ("units", 0, 1), ("units", 1, 1), ("units", 3_000_001, 4)]
)
def test_units_may_count_as_jobs(count: str, units: int, jobs: int) -> None:
    """Each begun unit counts as a job, and a call never as less than one."""
    assert terms(rules(jobs_per_user="9/day", count=count), units=units).reservation.jobs == jobs


def test_a_price_is_needed_for_a_budget_only() -> None:
    """Without a budget an endpoint without a price costs nothing that is known."""
    priced = {"fal-ai/other": 1}
    assert terms(rules(prices=priced)).reservation.cost == 0
    for fields in ({"budget": "1/day"}, {"budget_per_user": "1/day"}):
        with pytest.raises(PriceUnknown, match="fal-ai/flux/dev"):
            terms(rules(prices=priced, **fields))
    free = rules(prices=priced, budget_per_user="1/day", plans={"free": {"budget_per_user": "none"}})
    assert terms(free, plan="free").reservation.cost == 0


# Prices.


def test_prices_from_a_file(tmp_path: Path) -> None:
    """The first pattern that matches counts, and prices are exact, however small."""
    file = tmp_path / "prices.toml"
    file.write_text('"fal-ai/flux/dev" = 0.025\n"fal-ai/flux/**" = {price = 0.0000001, units = 2.5}\n"**" = 1\n')
    prices = prices_of(str(file))
    found = [prices.find(each) for each in ("fal-ai/flux/dev", "fal-ai/flux/pro", "realtime/token", "other", "A/b")]
    assert [None if each is None else (str(each.per_unit), each.units) for each in found] == [
        ("0.025", 10**6),
        ("1E-7", 2_500_000),
        ("1", 10**6),
        ("1", 10**6),
        None,
    ]
    assert found[1] is not None
    assert [found[1].cost(units) for units in (0, 1, 10**7, 10**7 + 1, 10**12)] == [0, 1, 1, 2, 100_000]


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "names no endpoint"), ("x", "cannot read"), ('"a/b" = "x"', "'a/b' must be"), ('"a/{b}" = 1', "'a/{b}' may")],
)
def test_a_file_of_prices_that_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    """A file that cannot be used is a problem that says where."""
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"prices: .*{problem}"):
        ProxyConfig(prices=str(file))


@pytest.mark.parametrize(
    ("values", "units"),
    [
        (["1"], 10**6),
        (["0"], 0),
        (["0.0000001"], 1),
        (["1.5e-05"], 15),
        (["1E+2"], 10**8),
        *[
            ([text], None)
            for text in ("", "-1", "+1", "1.", ".5", "1,5", "NaN", "inf", "1e99", "0x1", " 1", "1_0", "²")
        ],
        (["1", "1"], None),
        ([], None),
        (["1" + "0" * 9], None),
    ],
)
def test_bills(values: list[str], units: int | None) -> None:
    """A bill is one plain decimal number; any other is not known, and not zero."""
    assert billed_units([("x", "1"), *(("x-fal-billable-units", value) for value in values)]) == units


def test_estimates() -> None:
    """An estimate is a number, and text is one only where it is written as one."""
    assert [estimated_units(value) for value in (0, 4, 0.1, Decimal("2.5"), "3")] == [
        0,
        4 * 10**6,
        10**5,
        2_500_000,
        3 * 10**6,
    ]


# Users.


@pytest.mark.parametrize(
    ("address", "user"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix", "unix"),
        ("", "unix"),
    ],
)
def test_an_address_stands_for_a_user(address: str, user: str) -> None:
    """IPv6 counts by its /64, in a form that no id has."""
    assert identity(None, address) == (ADDRESS + user, None)
    assert identity((None, "free"), address) == (ADDRESS + user, "free")
    with pytest.raises(ValueError, match="address:"):
        identity(address_user(address), address)


def test_tags() -> None:
    """A tag is the id, or a hash where fal could read it in another way, and no id passes for the hash of another."""
    assert [tag_of(user) for user in ("ann", "a@b.example", "A-1_2+3")] == [
        "user=ann",
        "user=a@b.example",
        "user=A-1_2+3",
    ]
    hashed = [
        tag_of(user) for user in ("a,b", "a=b", "a b", "\u00e4", "address:1.2.3.4", "x" * 129, "sha256-" + "0" * 16)
    ]
    assert len({*hashed}) == len(hashed)
    assert all(tag.startswith("user=sha256-") and len(tag) == 28 for tag in hashed)


# Refusals.


def test_a_call_that_costs_more_than_the_budget() -> None:
    """A call that has no room in any period is not told to wait, and the numbers of all users are not shown."""
    spending = rules(jobs="2/minute", budget_per_user="1/minute", prices={"**": 3}, count="units")
    reserved = terms(spending, units=5_000_000)
    error = refusal(reserved, Standing([0, 0], 0, 1), NOW)
    assert isinstance(error, QuotaUsedUp)
    assert error.message == "Your budget of $1.00 a minute has no room for a call of $15.00."
    assert "15" not in str(refusal(reserved, Standing([0, 0], 0, 0), NOW).detail)
    assert [name for name, _ in limit_fields(reserved, Standing([0, 0], 0, None), NOW)] == [
        "RateLimit-Policy",
        "RateLimit",
    ]
    only_all = terms(rules(jobs="2/day"))
    assert limit_fields(only_all, Standing([1], 1, None), NOW) == ()
