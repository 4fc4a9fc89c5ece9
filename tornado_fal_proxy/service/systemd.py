"""The protocols between systemd and a service: sockets that are open already, readiness, the watchdog.

Strategy: the protocols of sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3) are a few environment variables and
a datagram for each message. The variables are removed from the environment, because a child process would take them to
be its own. Without them this module does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

__all__ = ["NotListening", "Notifier", "activated_sockets"]

# The first descriptor that is passed: SD_LISTEN_FDS_START of sd_listen_fds(3).
FIRST_FD = 3


class NotListening(Exception):
    """There is no listening socket where there should be one."""


def activated_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the listening sockets that systemd opened for this process; none if it was started without.

    Raise NotListening.
    """
    count, pid, names = (environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
    environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    named = dict(enumerate(names.split(":"), FIRST_FD))
    return [_listener(fd, named.get(fd) or "unknown") for fd in range(FIRST_FD, FIRST_FD + int(count))]


def _listener(fd: int, name: str) -> socket.socket:
    """Return the descriptor as a socket. Raise NotListening."""
    listening = 0
    with contextlib.suppress(OSError):
        os.set_inheritable(fd, False)
        listener = socket.socket(fileno=fd)
        listener.setblocking(False)
        if listener.type == socket.SOCK_STREAM:
            listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listening:
        raise NotListening(
            f"descriptor {fd} ({name}) from LISTEN_FDS is no listening stream socket; "
            "use ListenStream= and Accept=no in the socket unit"
        )
    return listener


class Notifier:
    """Sends the service's state to the service manager. Does nothing if there is none."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._address = environ.pop("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # in Linux's abstract name space
            self._address = "\0" + self._address[1:]
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        #: Seconds within which :meth:`alive` must be called again and again; None without a watchdog.
        self.watchdog_s = int(usec) / 1e6 if ours and self._address else None

    def ready(self) -> None:
        """Report that the service accepts calls."""
        self._send("READY=1")

    def stopping(self) -> None:
        """Report that the service accepts no more calls, and finishes those in flight."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Report that the service still works. Do nothing without a watchdog."""
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        # If nobody reads the datagrams, the service serves all the same.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            channel.sendto(state.encode(), self._address)
