"""Ids of users that a store could mix up, and a check that it keeps them apart."""

from tests.support.spending_model import NOON
from tornado_fal_proxy import ProxyConfig
from tornado_fal_proxy.spending.identity import identity
from tornado_fal_proxy.spending.store import Store

__all__ = ["ODD_USERS", "keep_apart"]

ODD_USERS = (
    *("ann", "Ann", "ann ", " ann", "an n", "a/b", "a//b", "/", "//", "a/jobs/day/1798675200", "user/ann", "all"),
    *("*", "?", "[a]", "{fal-proxy}:unfinished:ann", "' OR 1=1 --", '"', "\\", "%2F", "a:b", "127.0.0.1", "None", "0"),
    *("\u00e4", "a\u0308", "\u65e5\u672c\u8a9e", "\U0001f431", "x" * 127 + "y", "x" * 128, "\U0001f431" * 128),
)


async def keep_apart(store: Store) -> None:
    """Assert that each of these users has limits, unfinished jobs and rows of the account of their own."""
    rules = ProxyConfig(jobs_per_user="1/day", budget_per_user="1/day", unfinished_jobs_per_user=1, prices={"**": 1})
    assert rules.spending is not None
    plan, at = rules.spending.default, NOON
    for refused in (False, True):
        for number, user in enumerate(ODD_USERS):
            assert identity(user, "") == (user, None)
            terms = rules.spending.terms(user, plan, "fal-ai/flux/dev", None, at, f"{number}{refused}")
            standing = await store.reserve(terms.reservation)
            assert (standing.refused_by is not None) is refused, user
            assert (list(standing.used), standing.unfinished) == ([1, 1_000_000], 1)
    for number, user in enumerate(ODD_USERS):
        assert await store.owner(f"{number}False") == user
    rows = (await store.usage("2026-12-31", "2026-12-31", ("user",))).rows
    assert {(row.user, row.jobs, row.refused) for row in rows} == {(user, 1, 1) for user in ODD_USERS}
    await store.give_back("0False")
    rows = (await store.usage("2026-12-31", "2026-12-31", ("user",))).rows
    assert {row.user for row in rows if row.jobs} == set(ODD_USERS) - {"ann"}
