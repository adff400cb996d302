"""Reading JSONL files of the user's own: errors say file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a UTF-8 file with a JSON object a line, each with its line number, from 1; empty lines are passed
    over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not UTF-8, not JSON, or no object.
    """
    for number, row in scan_jsonl(path):
        if isinstance(row, str):
            raise ValueError(f"{path}, line {number}: {row}")
        yield number, row


def scan_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """As :func:`read_jsonl`, but a line that is no row gives what is wrong with it, and reading goes on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is compressed (``.gz``) and damaged.
    """
    number = 0
    try:
        with open_bytes(path) as stream:
            for number, raw in enumerate(stream, 1):
                row = _row(raw, "utf-8-sig" if number == 1 else "utf-8")
                if row is not None:
                    yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip data after line {number}: {error}") from None


def open_bytes(path: str | Path) -> IO[bytes]:
    """A file's bytes, unpacked where its name ends in ``.gz``."""
    opened: Any = gzip.open(path, "rb") if Path(path).suffix == ".gz" else Path(path).open("rb")
    return opened


def _row(raw: bytes, encoding: str) -> dict[str, Any] | str | None:
    """The object on a line, what is wrong with it, or None where the line is empty."""
    try:
        line = raw.decode(encoding).strip()
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
    if not line:
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        return f"not JSON that can be read: {error}"
    return row if isinstance(row, dict) else f'expected a JSON object, as in {{"text": ...}}, not {short(row)}'


def short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
