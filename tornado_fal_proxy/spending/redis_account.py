"""Add up the account that is in Redis, which may have more rows than the memory of a process should.

Strategy. The rows come a few at a time. They go to a temporary SQLite database, which has most of them in a file if
there can be one, and which then adds up as the store in a file does. Between two pieces the loop does what else there
is to do, and the sums are made in a thread.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection

from tornado_fal_proxy.spending import sqlite_statements as statements
from tornado_fal_proxy.spending.sqlite_reader import SqliteReader, has_temporary_files
from tornado_fal_proxy.spending.store import Account

__all__ = ["RedisAccount"]

# Rows are kept as they come, because to keep them sorted would take twice the time. Redis may return a row twice while
# a day grows, and the second counts: SQLite takes the other columns from the row that has the maximum.
_SCHEMA = """
CREATE TABLE rows (day TEXT, user TEXT, endpoint TEXT, jobs INTEGER, refused INTEGER, units INTEGER, cost INTEGER);
CREATE VIEW account AS
    SELECT day, user, endpoint, jobs, refused, units, cost, max(rowid) FROM rows GROUP BY day, user, endpoint;
"""


class RedisAccount:
    """Rows of the account, as they come. Each method raises sqlite3.Error, such as where a disk is full."""

    def __init__(self) -> None:
        # The loop's thread uses the connection, and then the reader's.
        self._is_read = False
        path = "" if has_temporary_files() else ":memory:"
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = OFF").fetchone()
        self._db.executescript(_SCHEMA)
        self._db.execute("BEGIN")

    def add(self, day: str, rows: str) -> None:
        """Add rows of a day, as redis_scripts.ROWS returns them. One may come again."""
        lines = rows.split("\n")
        keys = json.loads(f"[{','.join(lines[::2])}]")
        self._db.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?)",
            ((day, *key, *map(int, numbers.split())) for key, numbers in zip(keys, lines[1::2], strict=True)),
        )

    async def sums(self, reader: SqliteReader, by: Collection[str], most: int | None) -> Account:
        """Return what Store.usage does. This is the end of these rows."""
        self._is_read = True
        return await reader.read(lambda: self._db, statements.usage, "", "9", by, most)

    def close(self) -> None:
        """Forget the rows, unless the reader does it."""
        if not self._is_read:
            self._db.close()
