"""The numbers that workers show each other."""

from tornado_fal_proxy.service.scoreboard import Scoreboard, WorkerStats


def test_a_silent_worker_takes_no_calls() -> None:
    """A worker whose heartbeat is too old is in no number, and the others do not leave connections to it."""
    scoreboard = Scoreboard(3, silent_after_s=0)
    for slot in range(3):
        scoreboard.set_connections(slot, slot)
        scoreboard.update(slot, in_flight=5, upstream_connections=1)
    assert scoreboard.workers() == [WorkerStats(slot, 5, 1) for slot in range(3)]  # they have just started
    assert scoreboard.fewest_connections(1) == 0
    scoreboard.heartbeat(0)
    assert scoreboard.workers() == [WorkerStats(None, 0, 0), WorkerStats(1, 5, 1), WorkerStats(2, 5, 1)]
    assert scoreboard.fewest_connections(1) == 2


def test_a_worker_with_heartbeats_takes_calls() -> None:
    """A recent heartbeat is no silence."""
    scoreboard = Scoreboard(1, silent_after_s=3600)
    scoreboard.set_connections(0, 3)
    scoreboard.heartbeat(0)
    assert scoreboard.workers() == [WorkerStats(3, 0, 0)]


def test_without_heartbeats_nobody_is_silent() -> None:
    """A single process sends none."""
    scoreboard = Scoreboard(1)
    scoreboard.set_connections(0, 3)
    assert scoreboard.workers() == [WorkerStats(3, 0, 0)]


def test_counts_outlive_a_worker() -> None:
    """A worker that has ended has no numbers of its own any more, but its end stays counted."""
    scoreboard = Scoreboard(2)
    scoreboard.count_start(0)
    scoreboard.count_hang(0)
    scoreboard.clear(0)
    scoreboard.count_start(0)
    assert (scoreboard.restarts(), scoreboard.hangs()) == (1, 1)
