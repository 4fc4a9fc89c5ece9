"""Notices that a peer has closed its side of a socket on which nobody reads.

Strategy: the kernel is asked for EPOLLRDHUP and nothing else, so bytes that wait unread neither hide the peer's leaving
nor wake anybody. It reads, writes and closes nothing. Where there is no epoll (outside Linux) it notices nothing, and
its users fare as they would without it: a little worse, never wrong.
"""

from __future__ import annotations

import contextlib
import select

__all__ = ["HangupWatch"]


class HangupWatch:
    """A set of file descriptors, and which of them the peer has left. Each is told once."""

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._fds: set[int] = set()

    def fileno(self) -> int | None:
        """A descriptor that becomes readable when :meth:`hung_up` has something to tell. None without epoll."""
        return None if self._epoll is None else self._epoll.fileno()

    def add(self, fd: int) -> None:
        """Watch ``fd`` until it is discarded or closed."""
        if self._epoll is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLET)
                self._fds.add(fd)

    def discard(self, fd: int) -> None:
        """Watch ``fd`` no longer."""
        if self._epoll is not None and fd in self._fds:
            self._fds.discard(fd)
            with contextlib.suppress(OSError):  # it was closed; the number may be that of another by now
                self._epoll.unregister(fd)

    def hung_up(self) -> list[int]:
        """The descriptors whose peer has left since the last time."""
        return [fd for fd, _ in self._epoll.poll(0)] if self._epoll is not None and self._fds else []

    def prune(self) -> None:
        """Forget descriptors that were closed, which the kernel has forgotten already."""
        for fd in list(self._fds):
            try:
                assert self._epoll is not None
                self._epoll.modify(fd, select.EPOLLRDHUP | select.EPOLLET)
            except OSError:
                self._fds.discard(fd)

    def close(self) -> None:
        """Watch nothing any more."""
        self._fds.clear()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
