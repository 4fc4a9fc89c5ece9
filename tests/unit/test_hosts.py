"""Which call waits for which: the decisions of ``hosts``, without libcurl and without a clock."""

from dataclasses import dataclass

import pytest

from tornado_fal_proxy.rules.endpoints import WELL_KNOWN_HOSTS
from tornado_fal_proxy.upstream.hosts import IDLE_CONNECTION_S, MAX_HOSTS, MAX_LOOKUPS, SUSPICION_S, Hosts

UNPROVEN = "a.fal.run"


@dataclass(eq=False)
class FakeTransfer:
    host: str
    client: str = ""
    leads: bool = False
    resolving: bool = False


def unproven(count: int) -> list[FakeTransfer]:
    return [FakeTransfer(f"unproven-{number}.fal.run") for number in range(count)]


@pytest.mark.parametrize("host", [*sorted(WELL_KNOWN_HOSTS), UNPROVEN])
def test_one_leads_and_the_others_follow_when_it_has_its_connection(host: str) -> None:
    """One of the first calls to a host goes. When it is connected the others go, and later ones do not wait."""
    hosts: Hosts[FakeTransfer] = Hosts()
    first, second, third = FakeTransfer(host), FakeTransfer(host), FakeTransfer(host)
    assert hosts.enter(first, 0)
    assert first.leads
    assert not hosts.enter(second, 0)
    assert not hosts.enter(third, 0)
    hosts.set_protocol(host, True)
    assert hosts.connected(first) == [second, third]
    assert hosts.waiting == 0
    late = FakeTransfer(host)
    assert hosts.enter(late, 1)
    assert (late.leads, late.resolving) == (False, False)
    assert hosts.speaks_http2(host)


def test_a_slow_leader_delays_calls_to_unproven_hosts_only() -> None:
    """Calls to a proven host go by themselves when the leader takes long, and calls to an unproven one wait on."""
    for host, freed in (("fal.run", True), (UNPROVEN, False)):
        hosts: Hosts[FakeTransfer] = Hosts()
        leader, waiter = FakeTransfer(host), FakeTransfer(host)
        hosts.enter(leader, 0)
        hosts.enter(waiter, 0)
        assert hosts.lead_timed_out(leader) == ([waiter] if freed else [])
        assert hosts.waiting == (0 if freed else 1)


def test_unproven_hosts_wait_for_each_other_only() -> None:
    """At most MAX_LOOKUPS calls to unproven hosts go at once, other calls go, and each that ends lets the next go."""
    hosts: Hosts[FakeTransfer] = Hosts()
    calls = unproven(MAX_LOOKUPS + 3)
    assert [hosts.enter(call, 0) for call in calls] == [True] * MAX_LOOKUPS + [False] * 3
    assert all(hosts.enter(FakeTransfer(host), 0) for host in WELL_KNOWN_HOSTS)
    assert hosts.connected(calls[0]) == [calls[MAX_LOOKUPS + 2]]
    assert hosts.leave(calls[1], 0, hangs=False) == [calls[MAX_LOOKUPS + 1]]
    assert hosts.leave(calls[MAX_LOOKUPS], 0, hangs=False) == []  # its client left while it waited
    assert hosts.waiting == 0
    for call in calls:
        hosts.leave(call, 0, hangs=False)
    assert hosts._lookups == 0


def test_clients_take_turns() -> None:
    """A client that names many hosts delays its own calls: each other client's newest call goes in its turn."""
    hosts: Hosts[FakeTransfer] = Hosts()
    greedy = [FakeTransfer(f"hangs-{number}.fal.run", "greedy") for number in range(MAX_LOOKUPS + 20)]
    for call in greedy:
        hosts.enter(call, 0)
    first, second, third = (FakeTransfer(f"{name}.fal.run", name) for name in ("one", "two", "two"))
    third.host = "three.fal.run"
    for call in (first, second, third):
        assert not hosts.enter(call, 0)
    freed = [hosts.leave(call, 0, hangs=False) for call in greedy[:5]]
    assert freed == [[greedy[-1]], [first], [third], [greedy[-2]], [second]]
    assert hosts.waiting == 18
    for call in greedy[5:-2]:
        hosts.leave(call, 0, hangs=False)
    assert hosts.waiting == 0


def test_a_lookup_that_may_hang_still_counts() -> None:
    """A call that is aborted lets no other lookup begin before its own has had its time."""
    hosts: Hosts[FakeTransfer] = Hosts()
    calls = unproven(MAX_LOOKUPS + 1)
    for call in calls:
        hosts.enter(call, 0)
    assert hosts.leave(calls[0], 10, hangs=True) == []
    assert hosts.lookup_ended() == [calls[MAX_LOOKUPS]]


def test_calls_that_wait_for_an_unproven_host_fail_with_its_leader() -> None:
    """Each of them would take a lookup of its own, so they all fail. Calls to a proven host need not fail."""
    hosts: Hosts[FakeTransfer] = Hosts()
    leader, waiter = FakeTransfer(UNPROVEN), FakeTransfer(UNPROVEN)
    hosts.enter(leader, 0)
    hosts.enter(waiter, 0)
    assert hosts.waiting_for(leader) == [waiter]
    assert hosts.waiting_for(waiter) == []
    leader, waiter = FakeTransfer("fal.run"), FakeTransfer("fal.run")
    hosts.enter(leader, 0)
    hosts.enter(waiter, 0)
    assert hosts.waiting_for(leader) == []
    assert hosts.leave(leader, 0, hangs=False) == [waiter]


def test_when_the_leader_leaves_the_next_call_leads() -> None:
    """A call that is cancelled before its lookup has ended leaves it to the next, and the last one leaves nothing."""
    hosts: Hosts[FakeTransfer] = Hosts()
    first, second, third = FakeTransfer(UNPROVEN), FakeTransfer(UNPROVEN), FakeTransfer(UNPROVEN)
    for call in (first, second, third):
        hosts.enter(call, 0)
    assert hosts.leave(first, 0, hangs=False) == [second]
    assert second.leads
    assert hosts.waiting_for(second) == [third]
    assert hosts.leave(third, 0, hangs=False) == []
    assert hosts.leave(second, 0, hangs=False) == []
    assert not hosts._hosts


def test_a_connection_proves_its_host() -> None:
    """Calls to a host that was reached once go, however many calls to unproven hosts there are."""
    hosts: Hosts[FakeTransfer] = Hosts()
    leader = FakeTransfer(UNPROVEN)
    hosts.enter(leader, 0)
    hosts.connected(leader)
    for call in unproven(MAX_LOOKUPS + 1):
        hosts.enter(call, 0)
    assert hosts.enter(FakeTransfer(UNPROVEN), 0)


def test_suspicion_and_the_protocol_pass_with_time() -> None:
    """A broken connection makes its host suspect for a while. A host that was not called for long may have changed."""
    hosts: Hosts[FakeTransfer] = Hosts()
    leader = FakeTransfer("fal.run")
    hosts.enter(leader, 0)
    hosts.set_protocol("fal.run", True)
    hosts.connected(leader)
    hosts.suspect("fal.run", 5)
    assert hosts.is_suspect("fal.run", 5)
    assert not hosts.is_suspect("fal.run", 5 + SUSPICION_S)
    assert not hosts.is_suspect("unknown.fal.run", 5)
    assert hosts.speaks_http2("fal.run") is None
    hosts.set_protocol("fal.run", True)
    again = FakeTransfer("fal.run")
    assert hosts.enter(again, IDLE_CONNECTION_S + 1)
    assert again.leads


def test_the_hosts_that_are_remembered_are_limited() -> None:
    """Neither hosts that exist nor those that do not exceed the limit, and fal's own are never forgotten."""
    hosts: Hosts[FakeTransfer] = Hosts()
    for host in [*WELL_KNOWN_HOSTS, *(f"real-{number}.fal.run" for number in range(MAX_HOSTS + 100))]:
        call = FakeTransfer(host)
        assert hosts.enter(call, 0)
        hosts.set_protocol(host, True)
        hosts.connected(call)
    assert len(hosts._hosts) <= MAX_HOSTS
    assert all(hosts.speaks_http2(host) for host in WELL_KNOWN_HOSTS)
    for call in unproven(3 * MAX_HOSTS):
        hosts.enter(call, 0)
        hosts.leave(call, 0, hangs=False)
    assert len(hosts._hosts) <= MAX_HOSTS
