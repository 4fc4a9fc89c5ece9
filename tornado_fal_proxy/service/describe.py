"""Say in plain words what the service opens to whom, and what it limits: for the start, ``check`` and a reload.

Strategy. A few lines, each with a label, from the checked settings alone. Nothing is contacted, no name is looked up,
and neither the key nor the store is shown, because a store's text may have a password.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_address

from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.rules.endpoints import is_account_call
from tornado_fal_proxy.rules.target import Target
from tornado_fal_proxy.service.settings import Settings
from tornado_fal_proxy.spending.limits import Limit, dollars
from tornado_fal_proxy.spending.plans import Plan, SpendingRules

__all__ = ["ADVICE", "describe", "is_open_to_all"]

# How to close what is_open_to_all() finds open.
ADVICE = "restrict it with --allowed-endpoints or --authorize, see docs/secure.md"
# The line about a key that is no more than half of one. It stops no start, because fal may change how its keys look.
KEY_WITHOUT_COLON = "FAL_KEY, or the file of FAL_KEY_FILE, has no colon, and fal's keys are ID:SECRET: copy all of it"


def is_open_to_all(config: ProxyConfig) -> bool:
    """Return whether nothing keeps any client from spending the key's money on any model."""
    return config.allowed_endpoints is None and config.authorize is None


def describe(settings: Settings, addresses: Sequence[str]) -> dict[str, str]:
    """Return lines by their labels: what is open to whom, what is closed, what is limited.

    ``addresses`` are those that the service listens on, or the paths of its sockets. In sandbox mode nothing is open,
    and there are no lines.
    """
    config = settings.relay
    if config is None:
        return {}
    lines = {"open": f"{_clients(settings, config, addresses)} may {_join(list(_permissions(config)))}"}
    if is_open_to_all(config):
        lines["open"] += f" ({ADVICE})"
    if not _open_account(config):
        lines["closed"] = "the key's account; a key should have the scope API all the same, not ADMIN"
    lines["limited"] = "; ".join([*_limits(config.spending), *_capacity(settings, config)])
    if config.key is not None and ":" not in config.key:
        lines["key"] = KEY_WITHOUT_COLON
    if missing := _missing_folder(config):
        lines["store"] = f"{missing!r} is no folder: until it is one, paid calls fail as on_store_failure says"
    return lines


def _clients(settings: Settings, config: ProxyConfig, addresses: Sequence[str]) -> str:
    who = " and ".join(dict.fromkeys(map(_reach, addresses)))
    parts = [f"{'anyone' if config.authorize is None else 'clients'} {who}"]
    if settings.trusted_proxies.texts:
        parts.append("and clients of a proxy in front")
    if config.authorize is not None:
        parts.append("if authorize accepts them")
    if config.allowed_origins:
        parts.append(f"also from pages of {_join(config.allowed_origins)}")
    return ", ".join(parts) + "," * (len(parts) > 1)


def _reach(address: str) -> str:
    """Return who can reach an address, as far as the address tells."""
    ip = None
    with suppress(ValueError):
        ip = ip_address(address)
    if address == "localhost" or (ip is not None and ip.is_loopback):
        return "on this machine"
    if not address or (ip is not None and ip.is_unspecified):
        return "who can reach this machine"
    return f"who can reach {address}"


def _permissions(config: ProxyConfig) -> Iterator[str]:
    where = "" if config.allowed_hosts is None else f" on {_join(config.allowed_hosts)}"
    yield f"call {'every model' if config.allowed_endpoints is None else _join(config.allowed_endpoints)}{where}"
    if config.allowed_endpoints is None or config.allow_uploads:
        yield "upload files"
    if config.allow_cancel:
        yield "cancel jobs"
    if account := _open_account(config):
        yield f"use the key's account on {_join(account)}"
    if config.access is not None and config.access.webhooks is not None:
        yield f"have results sent to {_join(config.access.webhooks) or 'no webhook'}"


def _open_account(config: ProxyConfig) -> list[str]:
    """Return the hosts on which the key's account is open."""
    hosts = config.allowed_hosts or () if config.allowed_endpoints is None else ()
    return [host for host in hosts if "*" not in host and is_account_call(Target(host, "/"))]


def _limits(rules: SpendingRules | None) -> Iterator[str]:
    if rules is None or not rules.needs_store:
        yield "nothing that users spend (see --jobs-per-user)"
        return
    noun = "units of paid calls" if rules.counts_units else "paid calls"
    found = False
    for who, limits in (("each user", _of_plan(rules.default, noun)), ("all together", _of_all(rules, noun))):
        if limits:
            found = True
            yield f"{who}: {', '.join(limits)}"
    if rules.plans:
        yield f"users of the plans {_join(list(rules.plans))}: as the plan says"
    elif not found:
        yield "nothing that users spend, which is counted all the same"


def _missing_folder(config: ProxyConfig) -> str | None:
    """Return the folder that the store's file needs, unless it is there. A disk may be mounted later."""
    if config.store is None or config.spending is None or not config.spending.needs_store:
        return None
    from tornado_fal_proxy.spending.stores import path_of  # costs memory, which is for those who spend

    path = path_of(config.store)
    return None if path is None or path.parent.is_dir() else str(path.parent)


def _of_plan(plan: Plan, noun: str) -> list[str]:
    unfinished = [] if plan.max_unfinished is None else [f"{plan.max_unfinished} unfinished at once"]
    return [*_amounts(plan.jobs, noun), *unfinished, *_budgets(plan.budget)]


def _of_all(rules: SpendingRules, noun: str) -> list[str]:
    return [*_amounts(rules.jobs, noun), *_budgets(rules.budget)]


def _amounts(limits: Sequence[Limit], noun: str) -> list[str]:
    return [f"{limit.amount} {noun} {_per(limit)}" for limit in limits]


def _budgets(limits: Sequence[Limit]) -> list[str]:
    return [f"${dollars(limit.amount)} {_per(limit)}" for limit in limits]


def _per(limit: Limit) -> str:
    return f"{'an' if limit.period == 'hour' else 'a'} {limit.period}"


def _capacity(settings: Settings, config: ProxyConfig) -> Iterator[str]:
    where = f" in each of {settings.processes} processes" if settings.processes > 1 else ""
    yield f"{config.max_in_flight} calls at once{where}"


def _join(texts: Sequence[str]) -> str:
    """Return texts as a list in a sentence."""
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))
