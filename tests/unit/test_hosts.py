"""Who waits for whom: the decisions of ``hosts``, without libcurl and without a clock."""

from dataclasses import dataclass

import pytest

from tornado_fal_proxy.rules.endpoints import WELL_KNOWN_HOSTS
from tornado_fal_proxy.upstream.hosts import IDLE_CONNECTION_S, MAX_HOSTS, MAX_LOOKUPS, SUSPICION_S, Hosts

STRANGER, OTHER = "a.fal.run", "b.fal.run"


@dataclass(eq=False)
class Call:
    host: str
    leads: bool = False
    looks_up: bool = False


def strangers(count: int) -> list[Call]:
    return [Call(f"stranger-{number}.fal.run") for number in range(count)]


@pytest.mark.parametrize("host", [*sorted(WELL_KNOWN_HOSTS), STRANGER])
def test_one_leads_and_the_others_follow_when_it_has_its_connection(host: str) -> None:
    """Of the first calls to a host one goes; when it is connected the others go, and later ones wait for nobody."""
    hosts: Hosts[Call] = Hosts()
    first, second, third = Call(host), Call(host), Call(host)
    assert hosts.arrive(first, 0)
    assert first.leads
    assert not hosts.arrive(second, 0)
    assert not hosts.arrive(third, 0)
    hosts.learn(host, True)
    assert hosts.reached(first) == [second, third]
    assert hosts.waiting == 0
    late = Call(host)
    assert hosts.arrive(late, 1)
    assert (late.leads, late.looks_up) == (False, False)
    assert hosts.speaks_http2(host)


def test_a_slow_lead_holds_up_nobody_but_strangers() -> None:
    """Where a host is known to exist, calls go by themselves when the lead takes long; a stranger's wait on."""
    for host, freed in (("fal.run", True), (STRANGER, False)):
        hosts: Hosts[Call] = Hosts()
        lead, waiter = Call(host), Call(host)
        hosts.arrive(lead, 0)
        hosts.arrive(waiter, 0)
        assert hosts.too_slow(lead) == ([waiter] if freed else [])
        assert hosts.waiting == (0 if freed else 1)


def test_strangers_wait_for_strangers_only() -> None:
    """No more strangers than MAX_LOOKUPS go at once, whoever else calls goes, and each that is done lets the next go."""
    hosts: Hosts[Call] = Hosts()
    calls = strangers(MAX_LOOKUPS + 3)
    assert [hosts.arrive(call, 0) for call in calls] == [True] * MAX_LOOKUPS + [False] * 3
    assert all(hosts.arrive(Call(host), 0) for host in WELL_KNOWN_HOSTS)
    assert hosts.reached(calls[0]) == [calls[MAX_LOOKUPS]]
    assert hosts.leave(calls[1], 0, hangs=False) == [calls[MAX_LOOKUPS + 1]]
    assert hosts.leave(calls[MAX_LOOKUPS + 2], 0, hangs=False) == []  # its caller left while it waited
    assert hosts.waiting == 0
    for call in calls:
        hosts.leave(call, 0, hangs=False)
    assert hosts._looking_up == 0


def test_a_look_up_that_may_hang_keeps_its_place() -> None:
    """A call that gives up lets no other look-up begin before its own has had its time."""
    hosts: Hosts[Call] = Hosts()
    calls = strangers(MAX_LOOKUPS + 1)
    for call in calls:
        hosts.arrive(call, 0)
    assert hosts.leave(calls[0], 10, hangs=True) == []
    assert hosts.look_up_ended() == [calls[MAX_LOOKUPS]]


def test_those_that_wait_for_a_stranger_fail_with_it() -> None:
    """They are told, for each of them would take a look-up of its own. Where a host exists nobody need fail."""
    hosts: Hosts[Call] = Hosts()
    lead, waiter = Call(STRANGER), Call(STRANGER)
    hosts.arrive(lead, 0)
    hosts.arrive(waiter, 0)
    assert hosts.waiting_for(lead) == [waiter]
    assert hosts.waiting_for(waiter) == []
    lead, waiter = Call("fal.run"), Call("fal.run")
    hosts.arrive(lead, 0)
    hosts.arrive(waiter, 0)
    assert hosts.waiting_for(lead) == []
    assert hosts.leave(lead, 0, hangs=False) == [waiter]


def test_when_the_lead_leaves_the_next_one_leads() -> None:
    """A caller that goes away before its look-up has ended leaves it to the next; the last one leaves nothing."""
    hosts: Hosts[Call] = Hosts()
    first, second, third = Call(STRANGER), Call(STRANGER), Call(STRANGER)
    for call in (first, second, third):
        hosts.arrive(call, 0)
    assert hosts.leave(first, 0, hangs=False) == [second]
    assert second.leads
    assert hosts.waiting_for(second) == [third]
    assert hosts.leave(third, 0, hangs=False) == []
    assert hosts.leave(second, 0, hangs=False) == []
    assert not hosts._hosts


def test_a_host_once_reached_is_no_stranger() -> None:
    """Its calls go whatever strangers do."""
    hosts: Hosts[Call] = Hosts()
    lead = Call(STRANGER)
    hosts.arrive(lead, 0)
    hosts.reached(lead)
    for call in strangers(MAX_LOOKUPS + 1):
        hosts.arrive(call, 0)
    assert hosts.arrive(Call(STRANGER), 0)


def test_suspicion_and_the_protocol_pass_with_time() -> None:
    """A broken connection makes its host suspect for a while; one not called for long may have become another."""
    hosts: Hosts[Call] = Hosts()
    lead = Call("fal.run")
    hosts.arrive(lead, 0)
    hosts.learn("fal.run", True)
    hosts.reached(lead)
    hosts.suspect("fal.run", 5)
    assert hosts.is_suspect("fal.run", 5)
    assert not hosts.is_suspect("fal.run", 5 + SUSPICION_S)
    assert not hosts.is_suspect("unknown.fal.run", 5)
    assert hosts.speaks_http2("fal.run") is None
    hosts.learn("fal.run", True)
    again = Call("fal.run")
    assert hosts.arrive(again, IDLE_CONNECTION_S + 1)
    assert again.leads


def test_no_more_hosts_are_remembered_than_there_may_be() -> None:
    """Neither hosts that exist nor those that do not make it grow, and fal's own are never forgotten."""
    hosts: Hosts[Call] = Hosts()
    for host in [*WELL_KNOWN_HOSTS, *(f"real-{number}.fal.run" for number in range(MAX_HOSTS + 100))]:
        call = Call(host)
        assert hosts.arrive(call, 0)
        hosts.learn(host, True)
        hosts.reached(call)
    assert len(hosts._hosts) <= MAX_HOSTS
    assert all(hosts.speaks_http2(host) for host in WELL_KNOWN_HOSTS)
    for call in strangers(3 * MAX_HOSTS):
        hosts.arrive(call, 0)
        hosts.leave(call, 0, hangs=False)
    assert len(hosts._hosts) <= MAX_HOSTS
