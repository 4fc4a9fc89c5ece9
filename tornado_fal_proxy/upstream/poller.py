"""Wait for libcurl's sockets in an epoll of their own, which the loop waits for as one descriptor.

Strategy: libcurl ends its interest in a connection whenever the last call there ends, and renews it when the next
begins. Here such a socket stays registered: nothing is done when it becomes idle, and next to nothing when it is needed
again. An event on an idle socket means that its peer has closed it. The kernel forgets a socket that libcurl closes by
itself. One turn of the loop serves all sockets that are ready.

It reads, writes and closes no socket. Where there is no epoll (outside Linux) the loop watches each socket, as
Tornado's client does, and the closing of idle connections goes unnoticed.
"""

from __future__ import annotations

import os
import select
import stat

import pycurl

__all__ = ["Poller"]

if hasattr(select, "epoll"):
    _CLOSED = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
    _EVENTS = {
        pycurl.POLL_NONE: 0,
        pycurl.POLL_IN: select.EPOLLIN | select.EPOLLRDHUP,
        pycurl.POLL_OUT: select.EPOLLOUT,
        pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP,
    }
    # For an idle socket with unread bytes, which libcurl will read with the next call: only the closing counts.
    _CLOSING_ONLY = select.EPOLLRDHUP | select.EPOLLET


class Poller:
    """Tell which sockets are ready, and which idle ones their peer has closed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._events: dict[int, int] = {}  # by descriptor, unless the kernel has forgotten it
        self._active: set[int] = set()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when :meth:`ready` has something to return."""
        return self._epoll.fileno()

    def register(self, what: int, fd: int) -> bool:
        """Wait for ``what`` on ``fd``: a POLL constant of libcurl's, of which POLL_REMOVE ends the waiting.

        Return whether bytes came while the socket was idle, which libcurl has to read before anything else.
        """
        if what == pycurl.POLL_REMOVE:
            self._active.discard(fd)
            return False
        events = _EVENTS[what]
        self._active.add(fd)
        try:
            self._epoll.register(fd, events)
        except FileExistsError:
            if self._events.get(fd) == events:
                return False
            self._epoll.modify(fd, events)
            if self._events.get(fd) == _CLOSING_ONLY:
                self._events[fd] = events
                return True
        self._events[fd] = events
        return False

    def ready(self) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        """Return the sockets on which libcurl must act, with their CSELECT bits, and the idle ones with an event.

        Of these the second list has those that were closed, and the third those with unread bytes, once for each time
        that the socket became idle.
        """
        active, closed, unread = [], [], []
        for fd, events in self._epoll.poll(0):
            if fd in self._active:
                action = 0
                if events & ~select.EPOLLOUT:
                    action = pycurl.CSELECT_IN
                if events & select.EPOLLOUT:
                    action |= pycurl.CSELECT_OUT
                active.append((fd, action))
            elif events & _CLOSED:
                self._epoll.unregister(fd)
                closed.append(fd)
            else:
                self._epoll.modify(fd, _CLOSING_ONLY)
                self._events[fd] = _CLOSING_ONLY
                unread.append(fd)
        return active, closed, unread

    def count(self) -> int:
        """Return how many are open. It asks the kernel about each, and forgets those that were closed."""
        count = 0
        for fd, events in list(self._events.items()):
            try:
                self._epoll.modify(fd, events)
                count += stat.S_ISSOCK(os.fstat(fd).st_mode)  # libcurl also waits on an eventfd of its own
            except OSError:
                del self._events[fd]
        return count

    def close(self) -> None:
        """Stop waiting."""
        self._epoll.close()
