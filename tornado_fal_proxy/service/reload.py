"""Read the files of the options again on SIGHUP, without losing a call.

Strategy. No process is replaced and no connection closed, so a stream of any length goes on: calls that come after the
signal have the new options, and calls in flight keep theirs. The parent of several processes reads first. Only if
everything is right it passes the signal on, and each worker reads for itself; a worker that starts later has what the
parent has read. A file that is wrong changes nothing, and one line of the log says why.

Options of the process itself, such as the port, stay as they were at the start. So does the operator's code.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tornado_fal_proxy.errors import ConfigError
from tornado_fal_proxy.service.describe import describe
from tornado_fal_proxy.service.limits import raise_open_files
from tornado_fal_proxy.service.options import parse_settings
from tornado_fal_proxy.service.settings import Settings, service_options

__all__ = ["Reloader"]

logger = logging.getLogger("tornado_fal_proxy")

# The command's own options that a running process can change. All others are of the process.
CHANGEABLE = ("trusted_proxies", "user_header", "config", "env_file")


class Reloader:
    """Hold the settings of a process, and read them again from where they came.

    ``addresses`` are those that the service listens on. ``settings`` are the latest that were right.
    """

    def __init__(
        self, argv: Sequence[str], environ: Mapping[str, str], settings: Settings, addresses: Sequence[str]
    ) -> None:
        self.settings = settings
        self._argv, self._environ, self._addresses = argv, environ, addresses

    @property
    def has_files(self) -> bool:
        """Return whether there is something to read again. Where there is not, SIGHUP ends the service."""
        return bool(self.settings.files) and not self.settings.sandbox

    def read(self) -> bool:
        """Take the settings that the files have now, and log what they open. Return False if they are wrong."""
        before = self.settings.relay
        later = self._take("nothing has changed")
        if later is None:
            return False
        lines = [f"{label}: {line}" for label, line in describe(self.settings, self._addresses).items()]
        if later:
            lines.append(f"at the next start only: {', '.join(later)}")
        logger.info("reload: %s read again; %s", ", ".join(self.settings.files), "; ".join(lines))
        relay = self.settings.relay
        if before is not None and relay is not None and relay.max_in_flight != before.max_in_flight:
            raise_open_files(relay.max_in_flight)
        return True

    def follow(self) -> bool:
        """Take the settings as the parent of this process has just done. Log, and return False, if it fails here."""
        return self._take(f"process {os.getpid()} keeps its options, send SIGHUP again") is not None

    def _take(self, consequence: str) -> list[str] | None:
        """Take the settings, and return which options have changed that a running process keeps.

        Log why not and return None where something is wrong. Whatever the operator's modules raise, calls go on.
        """
        try:
            old, new = self.settings, self._parsed()
        except ConfigError as exc:
            logger.error("reload failed: %s: %s", consequence, " ".join(str(exc).split()))
            return None
        except (Exception, SystemExit) as exc:  # noqa: BLE001  (its text may have a key)
            logger.error("reload failed: %s: %s while the options were read", consequence, type(exc).__name__)
            return None
        kept = {entry.name: getattr(old, entry.name) for entry in service_options() if entry.name not in CHANGEABLE}
        self.settings = replace(new, **kept)
        return [name for name, value in kept.items() if getattr(new, name) != value]

    def _parsed(self) -> Settings:
        """Return the settings that the files have now. Raise ConfigError."""
        old = self.settings
        for path in old.files:
            if _is_pipe(path):
                raise ConfigError([f"{path!r} is a pipe, which cannot be read again"])
        new = parse_settings(self._argv, self._environ)
        if new.sandbox:
            raise ConfigError(["sandbox: needs another start"])
        if _counts_in_memory(old) and old.relay != new.relay:
            raise ConfigError(["store: memory would forget what users have spent; start again, or use another store"])
        return new


def _is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False  # parse_settings names it


def _counts_in_memory(settings: Settings) -> bool:
    rules = None if settings.relay is None else settings.relay.spending
    return rules is not None and rules.needs_store and settings.texts["store"] == "memory"
