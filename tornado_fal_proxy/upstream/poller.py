"""The sockets on which libcurl waits, in an epoll of their own that the loop waits for as one.

Strategy: libcurl says that it no longer waits on a connection whenever its last call ends, and says the opposite when
the next begins. Here such a socket stays where it is: nothing is done when it becomes idle, and next to nothing when
it is needed again. What happens on an idle one is news of another kind: its peer has closed it. The kernel forgets a
socket that libcurl closes by itself. One turn of the loop serves all sockets that are ready.

It reads, writes and closes nothing. Where there is no epoll (outside Linux) the loop watches each socket, as Tornado's
client does, and what happens on idle ones goes unnoticed.
"""

from __future__ import annotations

import os
import select
import stat

import pycurl

__all__ = ["UpstreamSockets"]

if hasattr(select, "epoll"):
    _LEFT = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
    _EVENTS = {
        pycurl.POLL_NONE: 0,
        pycurl.POLL_IN: select.EPOLLIN | select.EPOLLRDHUP,
        pycurl.POLL_OUT: select.EPOLLOUT,
        pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP,
    }
    # Of an idle socket on which bytes lie that libcurl will read with the next call: only that its peer leaves.
    _ONLY_LEAVING = select.EPOLLRDHUP | select.EPOLLET


class UpstreamSockets:
    """Which sockets are ready, and which idle ones their peer has closed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._events: dict[int, int] = {}  # what each is registered for, unless the kernel has forgotten it
        self._active: set[int] = set()

    def fileno(self) -> int:
        """A descriptor that becomes readable when :meth:`ready` has something to tell."""
        return self._epoll.fileno()

    def wait_for(self, what: int, fd: int) -> None:
        """libcurl waits on ``fd``: a POLL constant of libcurl's, of which POLL_REMOVE ends the waiting."""
        if what == pycurl.POLL_REMOVE:
            self._active.discard(fd)
            return
        events = _EVENTS[what]
        self._active.add(fd)
        try:
            self._epoll.register(fd, events)
        except FileExistsError:
            if self._events.get(fd) == events:
                return
            self._epoll.modify(fd, events)
        self._events[fd] = events

    def ready(self) -> tuple[list[tuple[int, int]], list[int]]:
        """The sockets on which libcurl has to act, each with its CSELECT bits, and the idle ones that were closed."""
        active, closed = [], []
        for fd, events in self._epoll.poll(0):
            if fd in self._active:
                action = 0
                if events & ~select.EPOLLOUT:
                    action = pycurl.CSELECT_IN
                if events & select.EPOLLOUT:
                    action |= pycurl.CSELECT_OUT
                active.append((fd, action))
            elif events & _LEFT:
                self._epoll.unregister(fd)
                closed.append(fd)
            else:
                self._epoll.modify(fd, _ONLY_LEAVING)
                self._events[fd] = _ONLY_LEAVING
        return active, closed

    def count(self) -> int:
        """How many are open. It asks the kernel about each, and forgets those that were closed."""
        count = 0
        for fd, events in list(self._events.items()):
            try:
                self._epoll.modify(fd, events)
                count += stat.S_ISSOCK(os.fstat(fd).st_mode)  # libcurl also waits on an eventfd of its own
            except OSError:
                del self._events[fd]
        return count

    def close(self) -> None:
        """Watch nothing any more."""
        self._epoll.close()
