"""Reading JSONL files of the user's own: errors say file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a UTF-8 file with a JSON object a line, each with its line number, from 1; empty lines are passed
    over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not UTF-8, not JSON, or no object.
    """
    with Path(path).open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line)"
                ) from None
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise ValueError(f'{where}: expected a JSON object, as in {{"text": ...}}, not {_short(row)}')
            yield number, row


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
