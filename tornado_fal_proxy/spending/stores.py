"""Make the store that an operator names, such as ``sqlite:/var/lib/proxy/spending.sqlite`` or ``redis://HOST``.

Strategy. A name is checked when it is parsed, and nothing is opened or made: a store does that when it is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tornado_fal_proxy._extras import install
from tornado_fal_proxy.spending.sqlite_store import SqliteStore
from tornado_fal_proxy.spending.store import Store

__all__ = ["ALLOWED", "default_path", "parse_store", "path_of"]

ALLOWED = "sqlite:PATH, redis://HOST:PORT/NUMBER, rediss://HOST:PORT/NUMBER or memory"
_FILE = "spending.sqlite"


def parse_store(text: str | None = None) -> Store:
    """Return the store of that name, not open yet; without a name, the file at :func:`default_path`.

    Raise ValueError, which tells what is allowed, or that the file has no place. It never has the name itself, in which
    a password may be.
    """
    if text is None:
        return SqliteStore(default_path(), make_folder=True)
    scheme, _, rest = text.partition(":")
    if text == "memory":
        return SqliteStore(None)
    if scheme == "sqlite" and rest and not rest.startswith((":", "//")):
        return SqliteStore(rest)
    if scheme in ("redis", "rediss"):
        return _redis(text)
    raise ValueError(f"must be {ALLOWED}")


def path_of(text: str | None) -> Path | None:
    """Return the file of a store of that name; None for a store without a file."""
    if text is None:
        return default_path()
    scheme, _, rest = text.partition(":")
    return Path(rest) if scheme == "sqlite" else None


def default_path(environment: Mapping[str, str] | None = None) -> Path:
    """Return a file in the folder for state: systemd's for the service, else that of the user.

    Raise ValueError where there is none: some containers have a user without a home.
    """
    environment = os.environ if environment is None else environment  # no default, which a signature would show
    if folder := environment.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(folder, _FILE)
    folder = environment.get("XDG_STATE_HOME", "")
    if not Path(folder).is_absolute():  # the standard has it so
        try:
            folder = str(Path.home() / ".local" / "state")
        except RuntimeError:
            raise ValueError("must be set, because this user has no home directory; or set STATE_DIRECTORY") from None
    return Path(folder, "tornado-fal-proxy", _FILE)


def _redis(url: str) -> Store:
    try:
        from tornado_fal_proxy.spending.redis_store import RedisStore  # costs memory, and is not installed everywhere
    except ImportError:
        raise ValueError(f"needs more packages for Redis: {install('redis')}") from None
    try:
        return RedisStore(url)
    except ValueError:
        raise ValueError(f"must be {ALLOWED}, and that URL cannot be") from None
