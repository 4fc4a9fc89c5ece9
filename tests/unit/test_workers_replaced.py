"""When a worker that died is replaced, and when the service stops trying."""

import time

import pytest

from tornado_fal_proxy.service.scoreboard import Scoreboard
from tornado_fal_proxy.service.supervisor import (
    EARLY_DEATH_S,
    MAX_DELAY_S,
    MAX_FAILED_STARTS,
    MIN_DELAY_S,
    Supervisor,
)

NOW = 1000.0


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """Return a supervisor without processes, at a time that stands still."""
    monkeypatch.setattr(time, "monotonic", lambda: NOW)
    supervisor = Supervisor(
        2,
        lambda worker: 0,
        on_ready=lambda: None,
        on_stop=lambda: None,
        end_timeout_s=1,
        worker_timeout_s=0,
        check_s=None,
        on_alive=lambda: None,
    )
    supervisor.scoreboard = Scoreboard(2, None)
    return supervisor


def delay(supervisor: Supervisor, ready_at: float | None) -> float:
    """Return the delay before a worker is replaced that was ready at that time and has just died."""
    supervisor._schedule_replacement(0, ready_at)
    return supervisor._due[0] - NOW


def test_a_worker_that_has_lived_is_replaced_at_once(supervisor: Supervisor) -> None:
    """A worker that served for a while is replaced without delay, however many died early before it."""
    assert delay(supervisor, NOW - EARLY_DEATH_S) == 0
    assert delay(supervisor, NOW) > 0
    assert delay(supervisor, NOW - EARLY_DEATH_S) == 0


def test_workers_that_die_early_are_replaced_later_and_later(supervisor: Supervisor) -> None:
    """The delay doubles up to its limit."""
    delays = [delay(supervisor, NOW - EARLY_DEATH_S / 2) for _ in range(8)]
    assert delays[:3] == pytest.approx([MIN_DELAY_S, 2 * MIN_DELAY_S, 4 * MIN_DELAY_S])
    assert delays == sorted(delays)
    assert delays[-1] == MAX_DELAY_S


def test_the_service_stops_when_no_worker_becomes_ready(supervisor: Supervisor) -> None:
    """After MAX_FAILED_STARTS in a row no more workers are started."""
    for _ in range(MAX_FAILED_STARTS):
        assert not supervisor._stopping
        supervisor._schedule_replacement(0, None)
    assert supervisor._stopping
    assert not supervisor._due
