"""Find the key and turn it into the header line that authorizes a call.

Strategy: the key is a string that only these functions touch. They read it from the environment or from a file, check
its characters, and never put it into an exception, a repr or a log line.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Mapping

from tornado_fal_proxy.errors import ConfigError, KeyMissing

__all__ = [
    "KEY_CHARACTERS",
    "KEY_VARIABLES",
    "authorization_line",
    "configured_key",
    "key_from_env",
    "key_from_file",
    "looks_like_key",
]

# The variables that have the key, or half of it, or the name of its file.
KEY_VARIABLES = ("FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET", "FAL_KEY_FILE")
# A key of fal's, and all that may stand in a header line without a second meaning: printable ASCII without spaces.
KEY_CHARACTERS = re.compile(r"[!-~]+")
# A key of fal's has an id of 36 characters and a secret of 32, and no slash. Few names of files look like that.
_LIKE_KEY = re.compile(r"[^/\s]+:[^/\s]{16,}")
# Limits how much of a key file is read: far more than any key has, and little when the path names the wrong file.
_MAX_KEY_FILE_BYTES = 10_000
# Limits how long a pipe may take to bring the key: a command that asks a vault takes a few seconds.
_KEY_FILE_TIMEOUT_S = 10.0
# Time between two tries to read a pipe: a start that is so much later is not noticed.
_KEY_FILE_RETRY_S = 0.01


def key_from_env(environ: Mapping[str, str]) -> str | None:
    """Return ``FAL_KEY``, or ``FAL_KEY_ID`` and ``FAL_KEY_SECRET`` joined by a colon, as fal's own tools read them.

    Return None where neither is set. Source: fal's page "Authentication".
    """
    if key := environ.get("FAL_KEY", "").strip():
        return key
    key_id, secret = environ.get("FAL_KEY_ID", "").strip(), environ.get("FAL_KEY_SECRET", "").strip()
    return f"{key_id}:{secret}" if key_id and secret else None


def key_from_file(environ: Mapping[str, str]) -> str | None:
    """Return the key in the file that ``FAL_KEY_FILE`` names, as systemd and containers hand over secrets.

    Return None where the variable is not set. Raise ConfigError. A pipe may be named too, and has some seconds to bring
    the key. The file's mode is not checked, because it means nothing where secrets are mounted.
    """
    path = environ.get("FAL_KEY_FILE", "")
    if not path:
        return None
    try:
        content = _read(path)
        key = content.decode("ascii").strip()
    except OSError as exc:
        if looks_like_key(path):
            raise ConfigError(["FAL_KEY_FILE: must name the file that has the key, and not be the key"]) from None
        raise ConfigError([f"FAL_KEY_FILE: cannot read {path!r}: {exc.strerror}"]) from exc
    except ValueError:  # a path with a NUL, or bytes that are not text: from None, because the exception may quote them
        raise ConfigError([f"FAL_KEY_FILE: {path!r} holds no key"]) from None
    if len(content) > _MAX_KEY_FILE_BYTES or not KEY_CHARACTERS.fullmatch(key):
        raise ConfigError([f"FAL_KEY_FILE: {path!r} holds no key"])
    return key


def looks_like_key(text: str) -> bool:
    """Return whether a text may be a key, and must not be shown: an id, a colon, and a secret like those of fal."""
    return _LIKE_KEY.fullmatch(text.strip()) is not None


def _read(path: str) -> bytes:
    """Return the content of a file or a pipe; of one that is too long, only so much as shows that. Raise OSError.

    Nothing blocks, because a pipe that nobody writes to would hold up the start for ever. A pipe reads as empty before
    its writer comes, so it is at its end only when something has come.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        deadline = time.monotonic() + _KEY_FILE_TIMEOUT_S
        content = b""
        while len(content) <= _MAX_KEY_FILE_BYTES:
            try:
                piece = os.read(fd, _MAX_KEY_FILE_BYTES)
                if not piece and (content or not is_pipe):
                    break
                content += piece
            except BlockingIOError:
                piece = b""
            if not piece and time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"its end did not come within {_KEY_FILE_TIMEOUT_S:g} s")
            if not piece:
                time.sleep(_KEY_FILE_RETRY_S)
        return content
    finally:
        os.close(fd)


def configured_key(environ: Mapping[str, str]) -> str | None:
    """Return the key that the environment or the file FAL_KEY_FILE has, None where neither has one.

    Raise ConfigError where two of them are set, or half of one: an operator who changes one would otherwise not notice
    that the other is used.
    """
    key, key_id, secret = (environ.get(name, "").strip() for name in ("FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET"))
    problems = []
    if bool(key_id) != bool(secret):
        given, missing = ("FAL_KEY_ID", "FAL_KEY_SECRET") if key_id else ("FAL_KEY_SECRET", "FAL_KEY_ID")
        problems.append(f"no key: {given} is set without {missing}")
    elif key and key_id and key != f"{key_id}:{secret}":
        problems.append("FAL_KEY and FAL_KEY_ID with FAL_KEY_SECRET are set, to different keys: unset one of them")
    if environ.get("FAL_KEY_FILE") and (key or key_id or secret):
        other = "FAL_KEY" if key else "FAL_KEY_ID" if key_id else "FAL_KEY_SECRET"
        problems.append(f"{other} and FAL_KEY_FILE are both set: unset one of them")
    if problems:
        raise ConfigError(problems)
    return key_from_env(environ) or key_from_file(environ)


def authorization_line(key: str, source: str) -> bytes:
    """Return the header line that authorizes a call with ``key``. Raise KeyMissing, which names ``source``."""
    if not KEY_CHARACTERS.fullmatch(key):
        raise KeyMissing(f"{source} has characters that no key of fal's has")
    return b"authorization: Key " + key.encode("ascii")
