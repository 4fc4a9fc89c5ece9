"""A transfer whose call has failed: every wait raises the failure, and none keeps the transfer alive."""

import gc
import weakref
from typing import Any

import pytest

from tornado_fal_proxy.errors import ConnectionLost
from tornado_fal_proxy.upstream.budget import BufferBudget
from tornado_fal_proxy.upstream.transfer import Transfer


class Delegate:
    """A client of libcurl's that does nothing."""

    budget = BufferBudget(1000)

    def now(self) -> float:
        return 0.0


class Handle:
    """A stand-in for an easy handle, which lives as long as its transfer."""


def failure_of(transfer: Transfer) -> ConnectionLost:
    """Return what a wait for the response raises."""
    with pytest.raises(ConnectionLost) as raised:
        transfer.read_head().send(None)
    return raised.value


def test_each_wait_raises_a_copy_of_the_failure() -> None:
    """The copies have all that the failure has, except the traceback, which is each one's own."""
    delegate: Any = Delegate()
    transfer = Transfer(delegate, Handle(), None, host="fal.run", repeatable=False)  # type: ignore[arg-type]
    failure = ConnectionLost("reset by peer", may_have_run=True)
    transfer.end(failure)
    first, second = failure_of(transfer), failure_of(transfer)
    assert len({id(error) for error in (failure, first, second)}) == 3
    for error in (first, second):
        assert vars(error) == vars(failure)
        assert (error.args, error.status, error.message) == (failure.args, failure.status, failure.message)
    assert failure.__traceback__ is None


def test_a_failed_transfer_is_freed_at_once() -> None:
    """A failure that was raised has frames that refer to the transfer. It is not the one that the transfer keeps."""
    delegate: Any = Delegate()
    handle: Any = Handle()
    alive = weakref.ref(handle)
    gc.disable()
    try:
        transfer = Transfer(delegate, handle, None, host="fal.run", repeatable=False)
        del handle
        transfer.end(ConnectionLost("reset by peer"))
        with pytest.raises(ConnectionLost):
            transfer.read_head().send(None)
        assert alive() is not None
        del transfer
        assert alive() is None
    finally:
        gc.enable()
