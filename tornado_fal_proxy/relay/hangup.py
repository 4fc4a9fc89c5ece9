"""Notice that a peer has closed its side of a socket from which nothing is read.

Strategy: the kernel is asked for EPOLLRDHUP and nothing else, so unread bytes neither hide that the peer leaves nor
wake the loop. It reads, writes and closes nothing. Where there is no epoll (outside Linux) it notices nothing: a client
that leaves is then seen at the next write.
"""

from __future__ import annotations

import contextlib
import select

__all__ = ["HangupWatch"]


class HangupWatch:
    """Watch file descriptors, and report each one once when its peer has left."""

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(select, "epoll") else None

    def fileno(self) -> int | None:
        """Return a descriptor that becomes readable when :meth:`hung_up` has news, None without epoll."""
        return None if self._epoll is None else self._epoll.fileno()

    def add(self, fd: int) -> None:
        """Watch ``fd`` until it is closed."""
        if self._epoll is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLET)

    def hung_up(self) -> list[int]:
        """Return the descriptors whose peer has left since the last call."""
        return [] if self._epoll is None else [fd for fd, _ in self._epoll.poll(0)]

    def close(self) -> None:
        """Stop watching."""
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
