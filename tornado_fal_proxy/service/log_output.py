"""Write to stderr and stdout without waiting for their reader.

Strategy. A pipe, a terminal or a socket that nobody reads fills up, and from then on each write waits. In a loop all
calls wait with it, health checks too. So an :class:`Output` never waits: a line for which there is no room is lost, and
a line of which only a part found room is finished before the next. The :class:`LogHandler` counts the lost lines, and
writes how many they were as soon as there is room again.

The flag for that belongs to the open file and not to the descriptor, so a shell or another program that writes to the
same terminal would get it too. Pipes and terminals are therefore opened once more, through /proc, and sockets have a
flag for each write. Where neither is possible, the kernel is asked for room before each write; on a terminal of another
user, which has no fixed size of room, a long line may wait all the same. A regular file always has room, or an error.

This module knows no loop. A process that has one is told when there is no room, and calls :meth:`LogHandler.flush`
later.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

__all__ = ["LogHandler", "Output", "log_crashes"]

logger = logging.getLogger("tornado_fal_proxy")


class Output:
    """A standard stream of this process, or none. ``is_blocked`` tells whether the last write found too little room."""

    def __init__(self, stream: TextIO | None) -> None:
        self._rest = b""
        self._socket: socket.socket | None = None
        self._must_poll = self._is_own = False
        self.is_blocked = False
        self.fd = -1
        with contextlib.suppress(OSError, ValueError):  # a stream that is closed, or no file
            self._open(-1 if stream is None else stream.fileno())

    def _open(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self.fd = fd
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            try:
                self.fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
                self._is_own = True
            except OSError:  # no /proc, or another user's terminal
                self._must_poll = True

    def write(self, line: bytes) -> bool:
        """Write a line. Return False if it is lost."""
        if not self.finish():
            return False
        try:
            sent = self._send(line)
        except OSError as exc:
            self.is_blocked = isinstance(exc, BlockingIOError)
            return False
        self._rest = line[sent:]
        self.finish()
        return True

    def finish(self) -> bool:
        """Write the rest of a line that was begun. Return whether nothing is left of it."""
        self.is_blocked = False
        while self._rest:
            try:
                self._rest = self._rest[self._send(self._rest) :]
            except BlockingIOError:
                self.is_blocked = True
                return False
            except OSError:  # the disk is full, or the reader has gone: the part ends here
                self._rest = b"\n"
                return False
        return True

    def forget(self) -> None:
        """Leave the rest of a line to the parent of this process."""
        self._rest = b""

    def close(self) -> None:
        """Close what was opened here, and not the stream."""
        if self._socket is not None:
            self._socket.close()
        if self._is_own:
            os.close(self.fd)

    def _send(self, data: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        if self._must_poll:
            poll = select.poll()
            poll.register(self.fd, select.POLLOUT)
            if not poll.poll(0):
                raise BlockingIOError
            data = data[: select.PIPE_BUF]  # so much has room in a pipe that has any
        return os.write(self.fd, data)


class LogHandler(logging.Handler):
    """Writes records to an :class:`Output`.

    ``on_lost`` is called with the number of lines that were lost just now. ``on_blocked`` is called when a line was
    lost or is unfinished because there is no room. Both may be called in any thread.
    """

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output
        self.on_lost: Callable[[int], object] = lambda count: None
        self.on_blocked: Callable[[], object] = lambda: None
        self._lost = 0
        os.register_at_fork(after_in_child=self._forget)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or lose it."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001  (whatever an argument's __str__ raises)
            self.handleError(record)
            return
        if not (self._lost and not self._report()) and self.output.write(_line(text)):
            if not self.output.is_blocked:
                return
        else:
            count = text.count("\n") + 1
            self._lost += count
            self.on_lost(count)
        if self.output.is_blocked:
            self.on_blocked()

    def flush(self) -> None:
        """Finish the last line, and write how many were lost, if there is room now."""
        with self.lock or contextlib.nullcontext():
            if self.output.finish() and self._lost:
                self._report()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Log the error of a record that could not be formatted, in place of it."""
        where = (record.pathname, record.lineno)
        message = "log: the message of %s, line %d, could not be formatted"
        self.emit(logger.makeRecord(logger.name, logging.ERROR, *where, message, where, sys.exc_info()))

    def _report(self) -> bool:
        """Write how many lines were lost. Return whether that found room."""
        message = "log: %d lines lost, because nobody read the log"
        record = logger.makeRecord(logger.name, logging.WARNING, "", 0, message, (self._lost,), None)
        if not self.output.write(_line(self.format(record))):
            return False
        self._lost = 0
        return True

    def _forget(self) -> None:
        self._lost = 0
        self.output.forget()


def _line(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace") + b"\n"


def log_crashes() -> None:
    """Log warnings of Python's, and exceptions that nothing has caught, instead of writing them to stderr."""
    logging.captureWarnings(True)

    def log(kind: type[BaseException], value: BaseException | None, traceback: TracebackType | None) -> None:
        exc_info: Any = (kind, value, traceback)
        logger.critical("crash: %s was not caught", kind.__name__, exc_info=exc_info)

    def log_in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            log(args.exc_type, args.exc_value, args.exc_traceback)

    def log_unraisable(args: sys.UnraisableHookArgs) -> None:
        exc_info: Any = (args.exc_type, args.exc_value, args.exc_traceback)
        logger.error("exception ignored: %s %r", args.err_msg or "in", args.object, exc_info=exc_info)

    sys.excepthook = log
    threading.excepthook = log_in_thread
    sys.unraisablehook = log_unraisable
