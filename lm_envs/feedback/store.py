"""The SQLite file of a study: items, annotators, who was shown what, and every answer that was ever given.

Answers are appended, never changed: the last version of an annotator's answer to an item counts, and taking one back
is a version without content. An answer is on the disk before it is acknowledged (``synchronous = FULL``), so that
neither a killed server nor a power cut loses one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_envs import rng
from lm_envs.feedback.study import MOST, Answer, Item, Response, StudySettings, read_settings

FILE = "study.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, known TEXT NOT NULL, columns TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS responses (
    item INTEGER NOT NULL REFERENCES items, place INTEGER NOT NULL, text TEXT NOT NULL, source TEXT NOT NULL,
    PRIMARY KEY (item, place)) STRICT;
CREATE TABLE IF NOT EXISTS annotators (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, since REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS shown (
    annotator INTEGER NOT NULL REFERENCES annotators ON DELETE CASCADE, item INTEGER NOT NULL REFERENCES items,
    at REAL NOT NULL, PRIMARY KEY (annotator, item)) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    annotator INTEGER NOT NULL REFERENCES annotators ON DELETE CASCADE, item INTEGER NOT NULL REFERENCES items,
    version INTEGER NOT NULL, body TEXT, at REAL NOT NULL, PRIMARY KEY (annotator, item, version)) STRICT;
CREATE VIEW IF NOT EXISTS current AS
    SELECT annotator, item, version, body, max(at) AS at FROM answers AS a
    WHERE version = (SELECT max(version) FROM answers AS b WHERE b.annotator = a.annotator AND b.item = a.item)
    GROUP BY annotator, item;
"""


class StaleAnswer(ValueError):
    """The item was answered meanwhile, in another window of the same annotator."""


@dataclass(frozen=True)
class Task:
    """An item as one annotator sees it.

    Attributes:
        item: its number.
        content: prompt and responses.
        order: ``content.responses[order[k]]`` is shown in place k.
        version: of the annotator's answer, 0 while there is none; an answer is taken only on the version it was
            given on.
        answer: the last answer, None while there is none or after it was taken back.
    """

    item: int
    content: Item
    order: tuple[int, ...]
    version: int
    answer: Answer | None


@dataclass(frozen=True)
class Judgment:
    """An answer with who gave it, on what, when (seconds since 1970)."""

    annotator: str
    item: int
    content: Item
    order: tuple[int, ...]
    answer: Answer
    at: float


class Store:
    """A study's database. Every method opens its own connection, so threads and processes may share a study.

    Args:
        folder: of the study.
        settings: of the study.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, settings: StudySettings, clock: Callable[[], float] = time.time) -> None:
        self.path = folder / FILE
        self.settings = settings
        self.clock = clock
        with self._open() as database:
            database.executescript(_SCHEMA)
            database.execute("INSERT OR IGNORE INTO facts VALUES ('secret', ?)", (secrets.token_hex(32),))
            self._secret = bytes.fromhex(
                database.execute("SELECT value FROM facts WHERE name = 'secret'").fetchone()[0]
            )
        self.path.chmod(0o600)  # it holds the secret of the annotators' links, and what people wrote

    @contextmanager
    def _open(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            database = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
            database.execute("PRAGMA journal_mode = WAL")
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        try:
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA foreign_keys = ON")
            if write:
                database.execute("BEGIN IMMEDIATE")
            yield database
            if write:
                database.execute("COMMIT")
        except BaseException as error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            if type(error) in (sqlite3.DatabaseError, sqlite3.OperationalError):
                raise self._damaged(error) from error
            raise
        finally:
            database.close()

    def _damaged(self, error: BaseException) -> ValueError:
        return ValueError(f"{self.path} cannot be used: {error}; restore it from a copy")

    # ---- items ----

    def add_items(self, items: Iterable[Item]) -> int:
        """Append items that the study does not have yet; the number of items that it has now."""
        with self._open(write=True) as database:
            have = {
                (prompt, _texts(database, item)) for item, prompt in database.execute("SELECT id, prompt FROM items")
            }
            for item in items:
                count = len(item.responses)
                most = 2 if self.settings.mode == "pair" else MOST
                if not 2 <= count <= most:
                    wanted = "2" if most == 2 else f"2 to {most}"
                    raise ValueError(f"an item of mode {self.settings.mode!r} has {wanted} responses, not {count}")
                prompt = json.dumps(item.prompt)
                texts = tuple(response.text for response in item.responses)
                if (prompt, texts) in have:
                    continue
                have.add((prompt, texts))
                row = (prompt, json.dumps(item.known), json.dumps(dict(item.columns)))
                number = database.execute("INSERT INTO items (prompt, known, columns) VALUES (?, ?, ?)", row).lastrowid
                database.executemany(
                    "INSERT INTO responses VALUES (?, ?, ?, ?)",
                    [(number, place, each.text, each.source) for place, each in enumerate(item.responses)],
                )
            return int(database.execute("SELECT count(*) FROM items").fetchone()[0])

    def item(self, number: int) -> Item:
        """An item by its number.

        Raises:
            KeyError: there is no such item.
        """
        with self._open() as database:
            return _item(database, number)

    # ---- annotators ----

    def annotator(self, name: str) -> int:
        """The number of the annotator of this name, who is added if new."""
        with self._open(write=True) as database:
            database.execute("INSERT OR IGNORE INTO annotators (name, since) VALUES (?, ?)", (name, self.clock()))
            return int(database.execute("SELECT id FROM annotators WHERE name = ?", (name,)).fetchone()[0])

    def forget(self, name: str) -> int:
        """Delete an annotator with everything that person was shown and answered; the number of answers that went."""
        with self._open(write=True) as database:
            count = database.execute(
                "SELECT count(*) FROM current JOIN annotators ON annotators.id = annotator WHERE name = ?", (name,)
            ).fetchone()[0]
            if not database.execute("DELETE FROM annotators WHERE name = ?", (name,)).rowcount:
                raise KeyError(f"this study has no annotator {name!r}")
        with self._open() as database:
            database.execute("VACUUM")  # deleted rows stay in the file until then
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return int(count)

    def names(self) -> list[str]:
        """The annotators, in the order in which they were added."""
        with self._open() as database:
            return [name for (name,) in database.execute("SELECT name FROM annotators ORDER BY id")]

    def key(self, annotator: int) -> str:
        """The secret part of an annotator's link: an HMAC under the study's secret, 43 characters."""
        mac = hmac.new(self._secret, f"annotator {annotator}".encode(), hashlib.sha256)
        return f"{annotator}-{mac.hexdigest()[:40]}"

    def holder(self, key: str) -> int | None:
        """The annotator whose key this is; None for any other text."""
        number = key.partition("-")[0]
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            return None
        if not hmac.compare_digest(self.key(int(number)).encode(), key.encode("utf-8", "replace")):
            return None
        with self._open() as database:
            known = database.execute("SELECT 1 FROM annotators WHERE id = ?", (int(number),)).fetchone()
        return int(number) if known else None

    # ---- what is shown, and what is answered ----

    def next(self, annotator: int) -> Task | None:
        """The next item for an annotator, None when none is left.

        First the one that was shown and not answered; then gold items; then the item that fewest have answered or
        hold, of those that still need an answer. The same window asking twice gets the same item.
        """
        now = self.clock()
        fresh = now - 60.0 * self.settings.hold_minutes
        with self._open(write=True) as database:
            found = database.execute(
                "SELECT s.item FROM shown AS s LEFT JOIN current AS c ON c.annotator = s.annotator AND c.item = s.item "
                "WHERE s.annotator = ? AND (c.body IS NULL) ORDER BY c.version IS NULL, s.at LIMIT 1",
                (annotator,),
            ).fetchone()
            if found is None:
                found = database.execute(
                    "SELECT i.id FROM items AS i LEFT JOIN ("
                    "  SELECT s.item AS item, count(*) AS n FROM shown AS s LEFT JOIN current AS c "
                    "  ON c.annotator = s.annotator AND c.item = s.item "
                    "  WHERE c.body IS NOT NULL OR s.at > ?2 GROUP BY s.item) AS taken ON taken.item = i.id "
                    "WHERE i.id NOT IN (SELECT item FROM shown WHERE annotator = ?1) "
                    "AND (i.known != '[]' OR coalesce(taken.n, 0) < ?3) "
                    "ORDER BY i.known = '[]', CASE WHEN i.known = '[]' THEN coalesce(taken.n, 0) ELSE 0 END, i.id "
                    "LIMIT 1",
                    (annotator, fresh, self.settings.overlap),
                ).fetchone()
            if found is None:
                return None
            database.execute(
                "INSERT INTO shown VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET at = excluded.at",
                (annotator, found[0], now),
            )
            return self._task(database, annotator, found[0])

    def task(self, annotator: int, item: int) -> Task:
        """An item that was shown to an annotator, with that annotator's answer.

        Raises:
            PermissionError: it was never shown to that annotator.
        """
        with self._open() as database:
            return self._task(database, annotator, item)

    def _task(self, database: sqlite3.Connection, annotator: int, item: int) -> Task:
        if not database.execute("SELECT 1 FROM shown WHERE annotator = ? AND item = ?", (annotator, item)).fetchone():
            raise PermissionError("this item was not given to you")
        content = _item(database, item)
        row = database.execute(
            "SELECT version, body FROM current WHERE annotator = ? AND item = ?", (annotator, item)
        ).fetchone()
        version, body = row or (0, None)
        return Task(item, content, self.order(annotator, item, len(content.responses)), version, _answer(body))

    def order(self, annotator: int, item: int, count: int) -> tuple[int, ...]:
        """The order in which an annotator sees an item's responses: a function of (seed, annotator, item)."""
        draws = rng.uniform(self.settings.seed, rng.ORDER, np.full(count, item), annotator * 1000 + np.arange(count))
        return tuple(int(place) for place in np.argsort(draws, kind="stable"))

    def answer(self, annotator: int, item: int, answer: Answer | None, version: int) -> int:
        """Append an answer, None to take the last one back; its version.

        Args:
            version: of the answer that this one replaces, 0 if there was none.

        Raises:
            PermissionError: the item was never shown to that annotator.
            StaleAnswer: there is another version by now.
        """
        body = None if answer is None else json.dumps(asdict(answer))
        with self._open(write=True) as database:
            now = self._task(database, annotator, item).version
            if now != version:
                # A window that sends again what was written before the network broke is answered as the first time.
                last = database.execute(
                    "SELECT body FROM answers WHERE annotator = ? AND item = ? AND version = ?", (annotator, item, now)
                ).fetchone()
                if now == version + 1 and last[0] == body:
                    return now
                raise StaleAnswer("this item was answered in another window: reload to see that answer")
            row = (annotator, item, version + 1, body, self.clock())
            database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", row)
            return version + 1

    def take(self, item: Item, name: str, answer: Answer) -> None:
        """Record an answer that was given elsewhere to an item that this study has; the last one counts."""
        annotator = self.annotator(name)
        with self._open(write=True) as database:
            texts = tuple(response.text for response in item.responses)
            rows = database.execute("SELECT id FROM items WHERE prompt = ?", (json.dumps(item.prompt),)).fetchall()
            number = next(number for (number,) in rows if _texts(database, number) == texts)
            database.execute("INSERT OR IGNORE INTO shown VALUES (?, ?, ?)", (annotator, number, self.clock()))
            version = self._task(database, annotator, number).version + 1
            row = (annotator, number, version, json.dumps(asdict(answer)), self.clock())
            database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", row)

    def last(self, annotator: int, before: int | None = None) -> Task | None:
        """The item that an annotator answered last, or last before ``before``: where "back" leads."""
        with self._open() as database:
            row = database.execute(
                "SELECT item FROM current WHERE annotator = ?1 AND body IS NOT NULL AND item IS NOT ?2 "
                "AND at <= coalesce((SELECT at FROM current WHERE annotator = ?1 AND item = ?2), 1e300) "
                "ORDER BY at DESC LIMIT 1",
                (annotator, before),
            ).fetchone()
            return None if row is None else self._task(database, annotator, row[0])

    def progress(self, annotator: int) -> tuple[int, int]:
        """How many items an annotator has answered, and how many of the others could still be that annotator's."""
        with self._open() as database:
            done = database.execute(
                "SELECT count(*) FROM current WHERE annotator = ? AND body IS NOT NULL", (annotator,)
            ).fetchone()[0]
            left = database.execute(
                "SELECT count(*) FROM items AS i LEFT JOIN ("
                "  SELECT item, count(*) AS n FROM current WHERE body IS NOT NULL AND annotator != ?1 GROUP BY item"
                ") AS c ON c.item = i.id WHERE (i.known != '[]' OR coalesce(c.n, 0) < ?2) "
                "AND i.id NOT IN (SELECT item FROM current WHERE annotator = ?1 AND body IS NOT NULL)",
                (annotator, self.settings.overlap),
            ).fetchone()[0]
        return int(done), int(left)

    def judgments(self) -> list[Judgment]:
        """All answers that count, by item and annotator; skipped ones too."""
        try:
            return self._judgments()
        except (json.JSONDecodeError, TypeError) as error:
            raise self._damaged(error) from error

    def _judgments(self) -> list[Judgment]:
        with self._open() as database:
            contents = {number: _item(database, number) for (number,) in database.execute("SELECT id FROM items")}
            rows = database.execute(
                "SELECT name, annotator, item, body, at FROM current JOIN annotators ON annotators.id = annotator "
                "WHERE body IS NOT NULL ORDER BY item, annotator"
            ).fetchall()
        found = []
        for name, annotator, item, body, at in rows:
            answer = _answer(body)
            assert answer is not None
            count = len(contents[item].responses)
            if len(answer.ranks) not in (0, count) or not all(type(rank) is int for rank in answer.ranks):
                raise TypeError(f"the answer of {name} to item {item} does not rank its {count} responses")
            order = self.order(annotator, item, count)
            found.append(Judgment(name, item, contents[item], order, answer, at))
        return found


def open_study(folder: Path) -> Store:
    """The study in a folder; ValueError, in one line, if it lacks settings or a database."""
    settings, path = read_settings(folder), folder / FILE
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{path} is missing or empty: restore it from a copy, or make the study again")
    return Store(folder, settings)


def _texts(database: sqlite3.Connection, item: int) -> tuple[str, ...]:
    rows = database.execute("SELECT text FROM responses WHERE item = ? ORDER BY place", (item,))
    return tuple(text for (text,) in rows)


def _item(database: sqlite3.Connection, number: int) -> Item:
    row = database.execute("SELECT prompt, known, columns FROM items WHERE id = ?", (number,)).fetchone()
    if row is None:
        raise KeyError(f"this study has no item {number}")
    responses = database.execute("SELECT text, source FROM responses WHERE item = ? ORDER BY place", (number,))
    prompt, known, columns = map(json.loads, row)
    return Item(prompt, tuple(Response(*each) for each in responses), tuple(known), columns)


def _answer(body: str | None) -> Answer | None:
    if body is None:
        return None
    fields: dict[str, Any] = json.loads(body)
    return Answer(**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
