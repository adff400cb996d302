"""Rows of data from where users keep them: JSONL, CSV and Parquet files, and data sets of the hub or of a folder.

Every source is read in a stream, a few rows in memory at a time. A row that cannot be read comes as what is wrong with
it, so that whoever reads decides whether to stop. Nothing here unpickles or executes anything.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lm_envs.data.jsonl import open_bytes, scan_jsonl

FILES = {".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSONL", ".csv": "CSV", ".parquet": "Parquet"}
_CELL = 2**24  # characters; more in one cell of a CSV file means a quote that is never closed
_ROWS = 256  # of a Parquet file, decoded at a time
_BUFFER = 2**20  # bytes


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        where: ``"line 3"`` of JSONL and CSV (the line it begins on), ``"row 3"`` of Parquet and of data sets; from 1.
        values: its columns, None where it could not be read.
        problem: why not.
    """

    where: str
    values: dict[str, Any] | None
    problem: str = ""


def format_of(source: str | Path) -> str:
    """``"JSONL"``, ``"CSV"``, ``"Parquet"``, or ``"data set"`` for a folder or a name on the hub.

    Files go by the end of their name (``.gz`` behind it is unpacked); any other end is taken for JSONL.

    Raises:
        FileNotFoundError: it looks like a path, and there is nothing.
    """
    path = Path(os.path.expanduser(source))
    ends = path.suffixes[-2:-1] if path.suffix == ".gz" else path.suffixes[-1:]
    known = FILES.get(ends[0]) if ends else None
    if path.is_file():
        return known or "JSONL"
    name = str(source).partition(":")[0]
    looks_like_a_path = isinstance(source, Path) or known or name.startswith((".", "~", os.sep)) or name.count("/") > 2
    if not path.is_dir() and not Path(os.path.expanduser(name)).is_dir() and looks_like_a_path:
        raise FileNotFoundError(2, "no such file", str(source))
    return "data set"


def read_rows(source: str | Path) -> Iterator[Row]:
    """The rows of a source, in a stream.

    Args:
        source: a file; or a folder or hub name that the library ``datasets`` reads, with ``/CONFIG`` and ``:SPLIT``
            behind it where there are several. Without ``:SPLIT`` all splits are read, and rows get a column ``split``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: Parquet or a data set, without the extra "data".
        ValueError: the whole file cannot be read: damaged Parquet or gzip, a CSV file without a header, no such data
            set.
    """
    kind = format_of(source)
    if kind == "data set":
        yield from _dataset(str(source))
        return
    path = Path(os.path.expanduser(source))
    if kind == "JSONL":
        for number, row in scan_jsonl(path):
            yield Row(f"line {number}", None, row) if isinstance(row, str) else Row(f"line {number}", row)
    elif kind == "CSV":
        yield from _csv(path)
    else:
        yield from _parquet(path)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_CELL)
    with open_bytes(path) as raw:
        # Bytes that are not UTF-8 come as lone surrogates: they spoil their row alone.
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line 1: not CSV: {error}") from None
        if not header or not all(header) or len(set(header)) < len(header):
            raise ValueError(
                f"{path}, line 1: a CSV file begins with the names of its columns, each once; here: {header}"
            )
        while True:
            where = f"line {reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(where, None, f"not CSV: {error}")
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                yield Row(where, None, f"{len(cells)} cells under {len(header)} columns ({', '.join(header)})")
            elif any("\udc80" <= letter <= "\udcff" for cell in cells if not cell.isascii() for letter in cell):
                yield Row(where, None, "not UTF-8 text")
            else:
                yield Row(where, dict(zip(header, cells, strict=True)))


def _parquet(path: Path) -> Iterator[Row]:
    _need("pyarrow", "Parquet files")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # Buffered, so that a file that is one large row group is not decompressed at once.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        where = f", after row {number}" if number else ""
        raise ValueError(f"{path}{where}: not a Parquet file that can be read: {_first_line(error)}") from None


def _dataset(source: str) -> Iterator[Row]:
    _need("datasets", "data sets of the hub and of folders")
    import datasets

    from lm_envs.model.hub import check_data_set

    datasets.disable_progress_bars()
    name, config, split = _parts(source)
    if not Path(name).is_dir():
        try:
            check_data_set(name)
        except ConnectionError as error:
            raise ValueError(
                f"{source!r}: there is no such file or folder here, and {error}; give a file (.jsonl, .csv, .parquet) "
                "or a folder of them, or try again with a network"
            ) from error
    number, reading = 0, ""
    try:
        found: Any = datasets.load_dataset(name, config, split=split, streaming=True)
        for reading, rows in found.items() if split is None else ((split, found),):
            for number, values in enumerate(rows, 1):
                mine = values if split is not None or "split" in values else {**values, "split": reading}
                yield Row(f"row {number}" + (f" of {reading}" if split is None else ""), dict(mine))
    # A server far away fails in the types of whichever client the hub's library is made of.
    except Exception as error:  # noqa: BLE001
        where = f", after row {number} of {reading}" if number else ""
        raise ValueError(
            f"{source!r}{where}: not a data set that can be read ({type(error).__name__}: {_first_line(error)}); give "
            "a file (.jsonl, .csv, .parquet), a folder of them, or OWNER/NAME[/CONFIG][:SPLIT] of the hub"
        ) from None


def _parts(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and split."""
    name, _, split = source.partition(":")
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return str(folder), None, split or None
    owner, *rest = name.split("/")
    if len(rest) == 2:
        return f"{owner}/{rest[0]}", rest[1], split or None
    return name, None, split or None


def _need(module: str, what: str) -> None:
    if find_spec(module) is None:
        raise ImportError(f"{what} need {module}: pip install 'lm-envs[data]'")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
