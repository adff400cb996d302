"""The SQLite file of a study: items, annotators, who was shown what, and every answer that was ever given.

Answers are appended, never changed. The last version of an annotator's answer to an item counts, and taking one back is
a version without content; the table of what was shown repeats that version, so that no query goes through all of them.
An answer is on the disk before it is acknowledged (the log is synced), so that neither a killed server nor a power
cut loses one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_envs import rng
from lm_envs.feedback.database import Database, unusable
from lm_envs.feedback.study import MOST, SETTINGS, Answer, Item, Response, StudySettings, read_settings

FILE = "study.sqlite"


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
    """A study's database, which threads and processes may share.

    Args:
        folder: of the study.
        settings: of the study.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, settings: StudySettings, clock: Callable[[], float] = time.time) -> None:
        self.path = folder / FILE
        self.settings = settings
        self.clock = clock
        self._open = Database(self.path).open
        with self._open(write=True) as database:
            database.execute("INSERT OR IGNORE INTO facts VALUES ('secret', ?)", (secrets.token_hex(32),))
            (secret,) = database.execute("SELECT value FROM facts WHERE name = 'secret'").fetchone()
        self._secret = bytes.fromhex(secret)

    # ---- items ----

    def add_items(self, items: Iterable[Item]) -> int:
        """Append items that the study does not have yet; the number of items that it has now."""
        with self._open(write=True) as database:
            rows = database.execute("SELECT id, prompt FROM items")
            have = {(prompt, _responses(database, item)) for item, prompt in rows}
            for item in items:
                count = len(item.responses)
                most = 2 if self.settings.mode == "pair" else MOST
                if not 2 <= count <= most:
                    wanted = "2" if most == 2 else f"2 to {most}"
                    raise ValueError(f"an item of mode {self.settings.mode!r} has {wanted} responses, not {count}")
                prompt = json.dumps(item.prompt)
                if (prompt, item.responses) in have:
                    continue
                have.add((prompt, item.responses))
                row = (prompt, json.dumps(item.known), json.dumps(dict(item.columns)))
                number = database.execute("INSERT INTO items (prompt, known, columns) VALUES (?, ?, ?)", row).lastrowid
                database.executemany(
                    "INSERT INTO responses VALUES (?, ?, ?, ?)",
                    [(number, place, each.text, each.source) for place, each in enumerate(item.responses)],
                )
            return int(database.execute("SELECT count(*) FROM items").fetchone()[0])

    def items(self) -> dict[int, Item]:
        """The items by their numbers, in the order in which they were added."""
        with self._open() as database:
            return {number: _item(database, number) for (number,) in database.execute("SELECT id FROM items")}

    def not_pairs(self) -> list[int]:
        """The numbers of the items that have another number of responses than two."""
        with self._open() as database:
            rows = database.execute("SELECT item FROM responses GROUP BY item HAVING count(*) != 2")
            return [number for (number,) in rows]

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
                "SELECT count(answered) FROM shown JOIN annotators ON annotators.id = annotator WHERE name = ?", (name,)
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
        """The secret part of an annotator's link: the number, and 160 bits of an HMAC under the study's secret."""
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
        fresh = self.clock() - 60.0 * self.settings.hold_minutes
        with self._open(write=True, lasting=False) as database:  # who holds what may be forgotten
            found = database.execute(
                "SELECT item FROM shown WHERE annotator = ? AND answered IS NULL ORDER BY version = 0, at LIMIT 1",
                (annotator,),
            ).fetchone()
            if found is None:
                found = database.execute(
                    "WITH open AS MATERIALIZED (SELECT id, known != '[]' AS gold, (SELECT count(*) FROM shown "
                    "  WHERE item = id AND (answered IS NOT NULL OR at > ?2)) AS taken "
                    "  FROM items WHERE id NOT IN (SELECT item FROM shown WHERE annotator = ?1)) "
                    "SELECT id FROM open WHERE gold OR taken < ?3 ORDER BY NOT gold, taken * NOT gold, id LIMIT 1",
                    (annotator, fresh, self.settings.overlap),
                ).fetchone()
            if found is None:
                return None
            self._hold(database, annotator, found[0])
            return self._task(database, annotator, found[0])

    def _hold(self, database: sqlite3.Connection, annotator: int, item: int) -> None:
        database.execute(
            "INSERT INTO shown (annotator, item, at) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET at = excluded.at",
            (annotator, item, self.clock()),
        )

    def task(self, annotator: int, item: int) -> Task:
        """An item that was shown to an annotator, with that annotator's answer.

        Raises:
            PermissionError: it was never shown to that annotator.
        """
        with self._open() as database:
            return self._task(database, annotator, item)

    def _task(self, database: sqlite3.Connection, annotator: int, item: int) -> Task:
        row = database.execute(
            "SELECT version, body FROM shown WHERE annotator = ? AND item = ?", (annotator, item)
        ).fetchone()
        if row is None:
            raise PermissionError("this item was not given to you")
        content = _item(database, item)
        return Task(item, content, self.order(annotator, item, len(content.responses)), row[0], _answer(row[1]))

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
        with self._open(write=True) as database:
            task = self._task(database, annotator, item)
            if task.version != version:
                # A window that sends again what was written before the network broke is answered as the first time.
                if task.version == version + 1 and task.answer == answer:
                    return task.version
                raise StaleAnswer("this item was answered in another window: reload to see that answer")
            return self._append(database, annotator, item, answer)

    def _append(self, database: sqlite3.Connection, annotator: int, item: int, answer: Answer | None) -> int:
        body, now = None if answer is None else json.dumps(asdict(answer)), self.clock()
        (version,) = database.execute(
            "UPDATE shown SET version = version + 1, body = ?, answered = ? WHERE annotator = ? AND item = ? "
            "RETURNING version",
            (body, now if body else None, annotator, item),
        ).fetchone()
        database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", (annotator, item, version, body, now))
        return int(version)

    def take(self, item: Item, name: str, answer: Answer) -> None:
        """Record an answer that was given elsewhere to an item that this study has; the last one counts."""
        annotator = self.annotator(name)
        with self._open(write=True) as database:
            rows = database.execute("SELECT id FROM items WHERE prompt = ?", (json.dumps(item.prompt),)).fetchall()
            number = next(number for (number,) in rows if _responses(database, number) == item.responses)
            self._hold(database, annotator, number)
            self._append(database, annotator, number, answer)

    def last(self, annotator: int, before: int | None = None) -> Task | None:
        """The item that an annotator answered last, or last before ``before``: where "back" leads."""
        with self._open() as database:
            # Rows of answers count up, whatever the clock does.
            row = database.execute(
                "WITH mine AS (SELECT item, answers.rowid AS place "
                "  FROM shown JOIN answers USING (annotator, item, version) WHERE annotator = ?1 "
                "  AND answered IS NOT NULL) SELECT item FROM mine WHERE item IS NOT ?2 "
                "AND place <= coalesce((SELECT place FROM mine WHERE item = ?2), place) ORDER BY place DESC LIMIT 1",
                (annotator, before),
            ).fetchone()
            return None if row is None else self._task(database, annotator, row[0])

    def progress(self, annotator: int) -> tuple[int, int]:
        """How many items an annotator has answered, and how many of the others could still be that annotator's."""
        with self._open() as database:
            done = database.execute("SELECT count(answered) FROM shown WHERE annotator = ?", (annotator,)).fetchone()[0]
            left = database.execute(
                "SELECT count(*) FROM items WHERE id NOT IN (SELECT item FROM shown WHERE annotator = ?1 AND answered "
                "IS NOT NULL) AND (known != '[]' OR (SELECT count(answered) FROM shown WHERE item = id) < ?2)",
                (annotator, self.settings.overlap),
            ).fetchone()[0]
        return int(done), int(left)

    def judgments(self) -> list[Judgment]:
        """All answers that count, by item and annotator; skipped ones too."""
        try:
            return self._judgments()
        except (json.JSONDecodeError, TypeError) as error:
            raise unusable(self.path, error) from error

    def _judgments(self) -> list[Judgment]:
        with self._open() as database:
            contents = self.items()
            rows = database.execute(
                "SELECT name, annotator, item, body, answered FROM shown JOIN annotators ON annotators.id = annotator "
                "WHERE answered IS NOT NULL ORDER BY item, annotator"
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
    """The study in a folder; ValueError, in one line, if it lacks settings or a database or they do not fit."""
    settings, path = read_settings(folder), folder / FILE
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{path} is missing or empty: restore it from a copy, or make the study again")
    store = Store(folder, settings)
    if settings.mode == "pair" and (wrong := store.not_pairs()):
        raise ValueError(
            f"{folder / SETTINGS}: mode 'pair' shows two responses, and item {wrong[0]} has another number of "
            "them; set mode to 'rank' or 'rate'"
        )
    return store


def _responses(database: sqlite3.Connection, item: int) -> tuple[Response, ...]:
    rows = database.execute("SELECT text, source FROM responses WHERE item = ? ORDER BY place", (item,))
    return tuple(Response(*row) for row in rows)


def _item(database: sqlite3.Connection, number: int) -> Item:
    row = database.execute("SELECT prompt, known, columns FROM items WHERE id = ?", (number,)).fetchone()
    if row is None:
        raise KeyError(f"this study has no item {number}")
    prompt, known, columns = map(json.loads, row)
    return Item(prompt, _responses(database, number), tuple(known), columns)


def _answer(body: str | None) -> Answer | None:
    if body is None:
        return None
    fields: dict[str, Any] = json.loads(body)
    return Answer(**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
