"""The SQLite file of a study: its tables, connections that threads share, and transactions that are on the disk at
their end."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# AUTOINCREMENT: the number of a person who was deleted, and with it the link, is never given to another one.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, known TEXT NOT NULL, columns TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS responses (
    item INTEGER NOT NULL REFERENCES items, place INTEGER NOT NULL, text TEXT NOT NULL, source TEXT NOT NULL,
    PRIMARY KEY (item, place)) STRICT;
CREATE TABLE IF NOT EXISTS annotators (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, since REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS shown (
    annotator INTEGER NOT NULL REFERENCES annotators ON DELETE CASCADE, item INTEGER NOT NULL REFERENCES items,
    at REAL NOT NULL, version INTEGER NOT NULL DEFAULT 0, body TEXT, answered REAL,
    PRIMARY KEY (annotator, item)) STRICT;
CREATE INDEX IF NOT EXISTS by_item ON shown (item, answered, at);
CREATE TABLE IF NOT EXISTS answers (
    annotator INTEGER NOT NULL REFERENCES annotators ON DELETE CASCADE, item INTEGER NOT NULL REFERENCES items,
    version INTEGER NOT NULL, body TEXT, at REAL NOT NULL, PRIMARY KEY (annotator, item, version)) STRICT;
"""
_WAIT_S = 30.0
_REMEDIES = {
    "database is locked": "another program writes to it: end that one, or try again",
    "database or disk is full": "free some space",
    "attempt to write a readonly database": "give yourself the right to write to it and its folder",
    "unable to open database file": "give yourself the right to write to it and its folder",
}


class Unusable(ValueError):
    """The database cannot be read or written at the moment, or is damaged: one line with its path and a remedy."""


def unusable(path: Path, error: BaseException) -> Unusable:
    """The one line about an error of a database."""
    return Unusable(f"{path} cannot be used: {error}; {_REMEDIES.get(str(error), 'restore it from a copy')}")


class Database:
    """A study's database, which threads and processes may share.

    Args:
        path: of the file; it is made if there is none, for its owner alone, because it holds the secret of the
            annotators' links and what people wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch(mode=0o600)
        path.chmod(0o600)  # before SQLite, whose log takes the file's permissions
        # Kept open: closing the last connection to a database copies its log. One writes while the other reads; locks,
        # because SQLite lets threads that wait starve.
        self._locks = threading.RLock(), threading.RLock()
        self._connections: list[sqlite3.Connection] = []
        for _ in self._locks:
            with self._naming():
                made = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
                weakref.finalize(self, made.close)
                for setting in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
                    made.execute(f"PRAGMA {setting}")
            self._connections.append(made)
        with self.open() as database:
            database.executescript(_SCHEMA)

    @contextmanager
    def open(self, write: bool = False, lasting: bool = True) -> Iterator[sqlite3.Connection]:
        """A connection; with ``write`` in a transaction, which is on the disk when it ends if it is ``lasting``.

        Raises:
            Unusable: the database is locked, full or damaged.
        """
        with self._naming():
            with self._locks[write]:
                database = self._connections[write]
                if write:
                    database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                    if write:
                        database.execute("COMMIT")
                except BaseException:
                    if database.in_transaction:
                        database.execute("ROLLBACK")
                    raise
            if write and lasting:  # without the lock: the disk takes several writers' at once
                log = os.open(f"{self.path}-wal", os.O_RDWR)
                try:
                    os.fsync(log)
                finally:
                    os.close(log)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) in (sqlite3.DatabaseError, sqlite3.OperationalError):
                raise unusable(self.path, error) from error
            raise
