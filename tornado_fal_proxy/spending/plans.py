"""The operator's limits, compiled once: plans, limits for all users, prices, and what one call is reserved with.

Strategy. A :class:`Plan` is what one user may do. The options make the default plan; a named plan has what it names,
and everything else from the options. :meth:`SpendingRules.terms` turns a paid call into a reservation. It is pure: it
gets user, time and id, and the store decides.

This module reads no clock. It keeps only what it would work out again: the windows of a minute, and what the operator's
patterns say of an endpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from tornado_fal_proxy.errors import ConfigError, PriceUnknown
from tornado_fal_proxy.rules.access import AccessRules, access_rules
from tornado_fal_proxy.rules.endpoints import OTHER
from tornado_fal_proxy.rules.patterns import Pattern
from tornado_fal_proxy.spending.limits import MILLION, Limit, Window, parse_budget, parse_jobs
from tornado_fal_proxy.spending.prices import Price, Prices, prices_of
from tornado_fal_proxy.spending.store import JOB_KEPT_S, Counter, Reservation

__all__ = [
    "ALLOW",
    "CALLS",
    "NEEDS_PRICES",
    "NO_RULES",
    "REFUSE",
    "UNITS",
    "Plan",
    "Rule",
    "SpendingRules",
    "Terms",
    "spending_rules",
]

COUNTS = CALLS, UNITS = ("calls", "units")
ON_STORE_FAILURE = REFUSE, ALLOW = ("refuse", "allow")
# The text that lifts a limit in a plan which the options set for all others.
NO_LIMIT = "none"
# Tells where the prices go that a budget needs, in its help and in its error.
NEEDS_PRICES = "needs prices (--prices=FILE, or [prices] in the file of --config)"
# Limits unfinished jobs of one user, and days of the account.
MAX_UNFINISHED, MAX_DAYS = 1_000_000, 3660
# Limits the endpoints of which is kept what the patterns say: clients may invent any number of them.
MAX_ENDPOINTS = 1000

_PLAN_OPTIONS = ("jobs_per_user", "unfinished_jobs_per_user", "budget_per_user", "allowed_endpoints")


@dataclass(frozen=True, slots=True)
class Plan:
    """Tell what one user of this plan may do. ``name`` is None for the default; ``access`` narrows the endpoints."""

    name: str | None = None
    jobs: tuple[Limit, ...] = ()
    max_unfinished: int | None = None
    budget: tuple[Limit, ...] = ()
    access: AccessRules | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit that a reservation is held against: the name of its option, and whether it is one of all users."""

    option: str
    limit: Limit
    window: Window
    place: str = field(init=False, compare=False, repr=False)  # the end of its counters' keys

    def __post_init__(self) -> None:
        what = "cost" if self.is_budget else "jobs"
        object.__setattr__(self, "place", f"{what}/{self.limit.period}/{self.window.begins}")

    @property
    def is_budget(self) -> bool:
        """Return whether it limits money, and not jobs."""
        return self.option.startswith("budget")

    @property
    def of_all(self) -> bool:
        """Return whether all users share it."""
        return not self.option.endswith("_per_user")


class Frame:
    """The rules of one plan in one minute, from which the terms of its calls are made. No window turns within it.

    A rule's place in ``own_jobs``, ``all_jobs``, ``own_cost`` and ``all_cost`` is (end of key, amount, end of window).
    """

    __slots__ = ("all_cost", "all_jobs", "minute", "own_cost", "own_jobs", "plan", "rules", "texts")

    def __init__(self, plan: Plan, rules: SpendingRules, minute: int) -> None:
        self.plan, self.minute = plan, minute
        own_jobs, all_jobs = _rules("jobs_per_user", plan.jobs, minute), _rules("jobs", rules.jobs, minute)
        own_cost, all_cost = _rules("budget_per_user", plan.budget, minute), _rules("budget", rules.budget, minute)
        self.own_jobs, self.own_cost = _places("", own_jobs), _places("", own_cost)
        self.all_jobs = tuple(Counter(*place) for place in _places("all", all_jobs))
        self.all_cost = tuple(Counter(*place) for place in _places("all", all_cost))
        self.rules = (*own_jobs, *all_jobs, *own_cost, *all_cost)
        #: The part of a response's header fields that is the same for all calls. Their module keeps it here.
        self.texts: Any = None


@dataclass(slots=True)
class Terms:
    """Hold what one paid call is reserved with. ``rules`` are those of the job counters, then of the cost counters."""

    reservation: Reservation
    frame: Frame
    price: Price | None

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of the plan."""
        return self.frame.rules


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendingRules:
    """The rules of one configuration. Only :func:`spending_rules` makes one.

    ``jobs`` and ``budget`` are limits of all users together. ``patterns`` are those of the prices, and then those of
    ``allowed_endpoints``. Without ``needs_store`` nothing is counted.
    """

    default: Plan = Plan()
    plans: Mapping[str, Plan]
    jobs: tuple[Limit, ...] = ()
    budget: tuple[Limit, ...] = ()
    prices: Prices | None = None
    patterns: tuple[Pattern, ...] = ()
    counts_units: bool = False
    refuses_on_failure: bool = True
    own_jobs_only: bool = False
    tags_users: bool = False
    needs_store: bool = False
    job_lifetime_s: int
    account_days: int
    _endpoints: dict[str, tuple[Price | None, str]] = field(default_factory=dict, compare=False, repr=False)
    _frames: dict[str | None, Frame] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, name: str | None) -> Plan | None:
        """Return a plan by its name; None where there is none of that name."""
        return self.default if name is None else self.plans.get(name)

    def label(self, endpoint: str) -> str:
        """Return the first of the operator's patterns that matches: a client may invent any number of endpoints."""
        return self._known(endpoint)[1]

    def price(self, endpoint: str) -> Price | None:
        """Return the price of an endpoint; None where none is known."""
        return self._known(endpoint)[0]

    def _known(self, endpoint: str) -> tuple[Price | None, str]:
        """Return price and label of an endpoint, which are worked out once."""
        known = self._endpoints.get(endpoint)
        if known is None:
            if len(self._endpoints) >= MAX_ENDPOINTS:
                self._endpoints.clear()
            price = None if self.prices is None else self.prices.find(endpoint)
            segments = endpoint.split("/")
            label = next((pattern.text for pattern in self.patterns if pattern.matches(segments)), OTHER)
            known = self._endpoints[endpoint] = price, label
        return known

    def terms(self, user: str, plan: Plan, endpoint: str, units: int | None, now: float, id: str) -> Terms:
        """Return what a paid call is reserved with. Raise PriceUnknown where a budget applies and no price.

        ``units`` is an estimate in millionths of a unit, or None for that of the endpoint's price. ``now`` is the time
        in seconds since 1970, and ``id`` is random.
        """
        price, label = self._known(endpoint)
        if price is None and (plan.budget or self.budget):
            raise PriceUnknown(f"prices: none for {endpoint}")
        if units is None:
            units = MILLION if price is None else price.units
        at = int(now)
        frame = self._frames.get(plan.name)
        if frame is None or frame.minute != at // 60 or frame.plan is not plan:
            frame = self._frames[plan.name] = Frame(plan, self, at // 60)
        owner = f"user/{user}"
        reservation = Reservation(
            id=id,
            user=user,
            endpoint=endpoint,
            refused_as=label,
            at=at,
            jobs=max(1, -(-units // MILLION)) if self.counts_units else 1,
            units=units,
            cost=0 if price is None else price.cost(units),
            job_counters=[*[Counter(owner + end, most, ends) for end, most, ends in frame.own_jobs], *frame.all_jobs],
            cost_counters=[*[Counter(owner + end, most, ends) for end, most, ends in frame.own_cost], *frame.all_cost],
            max_unfinished=plan.max_unfinished,
            unfinished_until=at + self.job_lifetime_s,
        )
        return Terms(reservation, frame, price)


def _rules(option: str, limits: tuple[Limit, ...], minute: int) -> tuple[Rule, ...]:
    """Return the rules of limits in a minute since 1970: no window begins or ends within it."""
    return tuple(Rule(option, limit, Window.around(limit.period, minute * 60)) for limit in limits)


def _places(owner: str, rules: tuple[Rule, ...]) -> list[tuple[str, int, int]]:
    """Return what the counters of rules are made of.

    A user's id stands before, and may have a slash. The three parts behind it have none, so no two users share a key.
    """
    return [(f"{owner}/{rule.place}", rule.limit.amount, rule.window.ends) for rule in rules]


# Counts nothing: for a handler that overrides check_input, without any option of spending.
NO_RULES = SpendingRules(plans={}, job_lifetime_s=0, account_days=0)


# From options to rules.


def spending_rules(fields: Mapping[str, Any]) -> SpendingRules | None:
    """Return the rules for these fields of the configuration, or None where none is set.

    Raise ConfigError, which names every problem.
    """
    problems: list[str] = []
    default = _plan(fields, Plan(), problems, "")
    own = {name: _parsed(fields, name, problems) for name in ("jobs", "budget", "prices", "store")}
    plans = _plans(fields, default, problems)
    _check_numbers(fields, problems)
    budgets = ["budget_per_user"] * bool(default.budget) + ["budget"] * bool(own["budget"])
    budgets += ["plans"] * any(plan.budget and plan.budget != default.budget for plan in plans.values())
    if own["prices"] is None and fields["prices"] is None:
        problems.extend(f"{name}: a budget {NEEDS_PRICES}" for name in dict.fromkeys(budgets))
    if problems:
        raise ConfigError(problems)
    counted = (default.jobs, default.budget, default.max_unfinished, plans, *own.values(), fields["own_jobs_only"])
    needs_store = any(value not in (None, (), {}, False) for value in counted)
    if needs_store and own["store"] is None:
        _check_default_store()
    others = (fields["identify"], fields["check_input"], fields["input_units"])
    if not needs_store and others == (None, None, None) and not fields["tag_users"]:
        return None
    return SpendingRules(
        default=default,
        plans=plans,
        jobs=own["jobs"] or (),
        budget=own["budget"] or (),
        prices=own["prices"],
        patterns=tuple(_patterns(own["prices"], fields["allowed_endpoints"])),
        counts_units=fields["count"] == UNITS,
        refuses_on_failure=fields["on_store_failure"] == REFUSE,
        own_jobs_only=fields["own_jobs_only"],
        tags_users=fields["tag_users"],
        needs_store=needs_store,
        job_lifetime_s=fields["job_lifetime_s"],
        account_days=fields["account_days"],
    )


def _patterns(prices: Prices | None, allowed_endpoints: object) -> Iterator[Pattern]:
    """Yield the operator's patterns. One that is wrong is a problem of its own field."""
    yield from () if prices is None else (price.pattern for price in prices.prices)
    for text in allowed_endpoints if isinstance(allowed_endpoints, tuple) else ():
        with suppress(ValueError, TypeError):
            yield Pattern.parse(text)


def _plan(values: Mapping[str, Any], base: Plan, problems: list[str], prefix: str) -> Plan:
    """Return the plan that these options make of ``base``, and add a problem for each that is wrong."""
    changes: dict[str, Any] = {}
    for option, name, unlimited in (
        ("jobs_per_user", "jobs", ()),
        ("budget_per_user", "budget", ()),
        ("unfinished_jobs_per_user", "max_unfinished", None),
    ):
        if prefix and values.get(option) == NO_LIMIT:
            changes[name] = unlimited
        elif (value := _parsed(values, option, problems, prefix)) is not None:
            changes[name] = value
    return replace(base, **changes)


def _plans(fields: Mapping[str, Any], default: Plan, problems: list[str]) -> dict[str, Plan]:
    """Return the named plans, and add a problem for each that is wrong."""
    given = fields["plans"]
    if given is None:
        return {}
    if not _is_table(given) or not all(isinstance(name, str) and name and _is_table(plan) for name, plan in given):
        problems.append(f"plans: must be a mapping of names to options, not {given!r}")
        return {}
    plans = {}
    for name, pairs in given:
        options, prefix = dict(pairs), f"plans: {name}: "
        unknown = [option for option in options if option not in _PLAN_OPTIONS]
        problems.extend(f"{prefix}{option}: {_unknown(option)}" for option in unknown)
        plan = replace(_plan(options, default, problems, prefix), name=name)
        endpoints = options.get("allowed_endpoints", NO_LIMIT)
        if endpoints != NO_LIMIT:
            plan = replace(plan, access=_access(fields, endpoints, problems, prefix))
        plans[name] = plan
    return plans


def _unknown(option: object) -> str:
    near = get_close_matches(str(option), _PLAN_OPTIONS, n=1)
    return f"unknown, did you mean {near[0]}?" if near else f"unknown, a plan has only {', '.join(_PLAN_OPTIONS)}"


def _is_table(value: object) -> bool:
    """Tell whether ``value`` is what ProxyConfig makes of a mapping, to be hashable: a tuple of pairs."""
    return isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)


def _access(fields: Mapping[str, Any], endpoints: object, problems: list[str], prefix: str) -> AccessRules | None:
    if isinstance(endpoints, str):
        endpoints = tuple(text.strip() for text in endpoints.split(","))
    try:
        return access_rules(
            allowed_endpoints=endpoints, allow_uploads=True, max_token_expiration_s=fields["max_token_expiration_s"]
        )
    except ConfigError as exc:
        problems.extend(f"{prefix}{problem}" for problem in exc.problems)
        return None


def _parsed(values: Mapping[str, Any], name: str, problems: list[str], prefix: str = "") -> Any:
    """Return the value of a text, or add a problem and return None. None stays None."""
    value = values.get(name)
    if value is None:
        return None
    try:
        return _PARSERS[name](value)
    except ValueError as exc:
        problems.append(f"{prefix}{name}: {exc}")
        return None


def _jobs(value: object) -> tuple[Limit, ...]:
    return parse_jobs(value if isinstance(value, str) else repr(value))


def _budget(value: object) -> tuple[Limit, ...]:
    return parse_budget(value if isinstance(value, str) else repr(value))


def _unfinished(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 9:
        value = int(value)
    if type(value) is not int or not 1 <= value <= MAX_UNFINISHED:
        raise ValueError(f"must be a whole number from 1 to {MAX_UNFINISHED}, not {value!r}")
    return value


def _store(value: object) -> str:
    """Return where the store is. The problem does not repeat the text, which may have a password."""
    from tornado_fal_proxy.spending.stores import ALLOWED, parse_store  # costs memory, which is for those who spend

    if not isinstance(value, str):
        raise ValueError(f"must be {ALLOWED}")
    parse_store(value)
    return value


_PARSERS = {
    "jobs_per_user": _jobs,
    "jobs": _jobs,
    "budget_per_user": _budget,
    "budget": _budget,
    "unfinished_jobs_per_user": _unfinished,
    "prices": prices_of,
    "store": _store,
}


def _check_default_store() -> None:
    """Raise ConfigError where nobody has named a store, and the file for that has no place."""
    from tornado_fal_proxy.spending.stores import default_path  # costs memory, likewise

    try:
        default_path()
    except ValueError as exc:
        raise ConfigError([f"store: {exc}"]) from None


def _check_numbers(fields: Mapping[str, Any], problems: list[str]) -> None:
    """Add a problem for each field that is a choice or a number, and wrong."""
    for name, choices in (("count", COUNTS), ("on_store_failure", ON_STORE_FAILURE)):
        if fields[name] not in choices:
            problems.append(f"{name}: must be one of {', '.join(choices)}, not {fields[name]!r}")
    for name, most in (("job_lifetime_s", JOB_KEPT_S), ("account_days", MAX_DAYS)):
        value = fields[name]
        if type(value) is not int or not 1 <= value <= most:
            problems.append(f"{name}: must be a whole number from 1 to {most}, not {value!r}")
