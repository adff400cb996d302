"""Rows of JSON, JSONL, CSV, TSV and Parquet files, and of data sets on the hub or in a folder.

Every source but a JSON list is streamed. In place of a row that cannot be read comes a message, so the caller decides
whether to stop. Nothing is unpickled or executed.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from lm_envs.data.splits import SPLIT_NAMES
from lm_envs.files import refuse_streams
from lm_envs.printable import first_line, one_line
from lm_envs.settings import short

FILES = {".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON", ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet"}
_CELL = 2**24  # characters; more in one cell of a CSV file means a quote that is never closed
_UTF = "text in {}: save it as UTF-8"
_BINARY = {
    b"\xff\xfe\x00\x00": _UTF.format("UTF-32"),
    b"\xff\xfe": _UTF.format("UTF-16"),
    b"\xfe\xff": _UTF.format("UTF-16"),
    b"\x00\x00\xfe\xff": _UTF.format("UTF-32"),
    b"PK\x03\x04": "a ZIP archive, as spreadsheets are too: unpack it, or save the table as CSV",
    b"PAR1": "Parquet: let its name end in .parquet",
}
_ROWS = 256  # of a Parquet file, decoded at a time
_BUFFER = 2**20  # bytes

Read = tuple[str, dict[str, Any] | str]
"""``"line 3"`` in JSONL and CSV (where the row begins) or ``"row 3"`` in others, from 1; and the columns of the row, or
a message about it."""


def format_of(source: str | Path) -> str:
    """Return ``"JSONL"``, ``"CSV"``, ``"Parquet"``, ..., or ``"data set"`` for a folder or a name on the hub.

    The end of a file's name decides (before ``.gz``); JSONL is the default. FileNotFoundError if a path does not exist,
    ValueError for a pipe or a device, or for no name.
    """
    path = Path(os.path.expanduser(source))
    ends = path.suffixes[-2:-1] if path.suffix == ".gz" else path.suffixes[-1:]
    known = FILES.get(ends[0]) if ends else None
    if path.is_file():
        return known or "JSONL"
    refuse_streams(path)
    name = str(source).partition(":")[0]
    if not name.strip():
        raise ValueError(f"data {str(source)!r}: it names no file, folder or data set")
    looks_like_a_path = isinstance(source, Path) or known or name.startswith((".", "~", os.sep)) or name.count("/") > 2
    if not Path(_parts(str(source))[0]).is_dir() and looks_like_a_path:
        raise FileNotFoundError(2, "no such file", str(source))
    return "data set"


def read_rows(source: str | Path) -> Iterator[Read]:
    """Stream the rows of a source.

    Args:
        source: a file; or a folder or hub name that the library ``datasets`` reads, with an optional ``/CONFIG`` and
            ``:SPLIT`` behind it. Without ``:SPLIT`` all splits are read, and rows get a column ``split``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: Parquet or a data set needs the extra "data".
        ValueError: the source cannot be read, such as damaged Parquet or gzip, or a CSV file without a header.
    """
    kind = format_of(source)
    path = Path(os.path.expanduser(source))
    if kind == "data set":
        return _dataset(str(source))
    if kind == "Parquet":
        return _parquet(path)
    return _unpacked(path, _json(path) if kind in ("JSON", "JSONL") else _csv(path, "\t" if kind == "TSV" else ","))


def fingerprint(source: str | Path) -> str:
    """Return a hash of a file or of a folder's files; for a data set on the hub, its name and its commit."""
    place, split = Path(os.path.expanduser(source)), None
    if not place.exists():
        name, _, split = _parts(str(source))
        place = Path(name)
    if not place.exists():
        from lm_envs.model.hub import check_data_set

        return f"{source}@{check_data_set(name)}"
    digest = hashlib.sha256(f"{split}".encode())
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_file():
            digest.update(str(file.relative_to(place)).encode("utf-8", "surrogateescape") + b"\0")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _open(path: Path) -> IO[bytes]:
    """Open a text file's bytes, unpacked from gzip; ValueError if it does not begin like UTF-8."""
    with path.open("rb") as file:
        head = file.read(4)
    kind = next((kind for start, kind in _BINARY.items() if head.startswith(start)), None)
    if kind is None and head.count(0) in (2, 3):
        kind = _UTF.format("UTF-16 or UTF-32")  # without a mark
    if kind is not None:
        raise ValueError(f"{path}, line 1: this is {kind}")
    opened: Any = gzip.open(path, "rb") if head.startswith(b"\x1f\x8b") else path.open("rb")
    return opened


def _unpacked(path: Path, rows: Iterator[Read]) -> Iterator[Read]:
    where = "line 0"
    try:
        for where, row in rows:
            yield where, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip data after {where}: {error}") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _json(path: Path) -> Iterator[Read]:
    """Read an object per line, or one list of objects."""
    with _open(path) as stream:
        if stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            stream.seek(0)
            first, rest = stream.readline(), stream.read()
            found, where = _value(first + rest)
            if isinstance(found, list):
                yield from ((f"row {place}", _object(value)) for place, value in enumerate(found, 1))
                return
            if not isinstance(_value(first)[0], list):
                yield where, found
                return
        stream.seek(0)
        for number, raw in enumerate(stream, 1):  # split on b"\n" alone: a text may hold U+2028
            if raw.strip():
                found, _ = _value(raw)
                if number == 1 and raw.strip().endswith(b"{"):
                    found += ": one object over many lines? A row is an object on one line, or in a list"
                elif isinstance(found, str) and b"\r" in raw.strip():
                    found += ": lines must end in a newline, not in a carriage return alone"
                yield f"line {number}", found if isinstance(found, str) else _object(found)


def _value(raw: bytes) -> tuple[Any, str]:
    """Parse JSON; return the value, or a message and its line."""
    try:
        found = json.loads(raw.removeprefix(b"\xef\xbb\xbf").decode().strip(), object_pairs_hook=_keys_once)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason} at byte {error.start})", f"line {raw[: error.start].count(10) + 1}"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}", f"line {error.lineno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        return f"not JSON that can be read: {error}", "line 1"
    return _object(found) if isinstance(found, str) else found, ""


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the name {name!r} occurs twice in one object")
    return found


def _object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f'expected a JSON object, as in {{"text": ...}}, not {short(value)}'


def _csv(path: Path, delimiter: str) -> Iterator[Read]:
    csv.field_size_limit(_CELL)
    with _open(path) as raw:
        # Bytes that are not UTF-8 come as lone surrogates: they spoil their row alone.
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True, delimiter=delimiter)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line 1: not CSV: {error}") from None
        header = [name.strip() for name in header or ()]
        if len(header) == 1 and (other := next((sign for sign in "\t;," if sign in header[0]), None)):
            kind = f"{'TSV' if delimiter != ',' else 'CSV'} file is {delimiter!r}, here perhaps {other!r}"
            raise ValueError(f"{path}, line 1: one column, {header[0]!r}: the separator in a {kind}")
        if not header or not all(header) or len(set(header)) < len(header):
            raise ValueError(
                f"{path}, line 1: a CSV file begins with the names of its columns, each once, not {header}"
            )
        while True:
            where = f"line {reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, f"not CSV: {error}"
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                yield where, f"{len(cells)} cells under {len(header)} columns ({one_line(', '.join(header))})"
            elif any("\udc80" <= letter <= "\udcff" for cell in cells if not cell.isascii() for letter in cell):
                yield where, "not UTF-8 text"
            else:
                yield where, dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[Read]:
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
                    yield f"row {number}", values
    except (pyarrow.ArrowException, OSError) as error:
        where = f", after row {number}" if number else ""
        raise ValueError(f"{path}{where}: not a Parquet file that can be read: {first_line(error)}") from None


def _dataset(source: str) -> Iterator[Read]:
    _need("datasets", "data sets of the hub and of folders")
    import datasets

    from lm_envs.model.hub import check_data_set

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised too
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
        with _no_pattern(name) as place:
            builder: Any = datasets.load_dataset_builder(place, config)
            if hasattr(builder.config, "keep_default_na"):  # CSV, whose cells are text: "NA" is a word, "000" no number
                builder.config.keep_default_na, builder.config.dtype = False, str
            found = builder.as_streaming_dataset(split)
            if split is None and not set(found) <= set(SPLIT_NAMES):
                raise ValueError(f"choose a split: {', '.join(f'{name}:{each}' for each in found)}")
            if Path(name).is_dir():
                _warn_of_others(Path(name), itertools.chain(*(builder.config.data_files or {}).values()))
            for reading, rows in found.items() if split is None else ((split, found),):
                for number, values in enumerate(rows, 1):
                    mine = values if split is not None or "split" in values else {**values, "split": reading}
                    yield f"row {number}" + (f" of {reading}" if split is None else ""), dict(mine)
    # A server far away fails in the types of whichever client the hub's library is made of.
    except Exception as error:  # noqa: BLE001
        where = f", after row {number} of {reading}" if number else ""
        raise ValueError(
            f"{source!r}{where}: not a data set that can be read ({type(error).__name__}: {first_line(error)}); give "
            "a file (.jsonl, .csv, .parquet), a folder of them, or OWNER/NAME[/CONFIG][:SPLIT] of the hub"
        ) from None


@contextmanager
def _no_pattern(name: str) -> Iterator[str]:
    """Yield a data set's name; for a folder that the library would take for a pattern, one with links to its files."""
    path = os.path.abspath(name)
    if not os.path.isdir(path) or ("::" not in path and not set("*?[") & set(path)):
        yield name
        return
    with tempfile.TemporaryDirectory(prefix="lm-envs-data-") as folder:
        for file in Path(path).rglob("*"):
            if file.is_file():
                link = Path(folder, file.relative_to(path))
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
        yield folder


def _warn_of_others(folder: Path, read: Iterable[str]) -> None:
    """Warn of files of rows that are not read: those of a folder have to be of one kind."""
    kinds = {kind_of for file in read if (kind_of := FILES.get(Path(file).suffix))}
    kinds |= {"JSON", "JSONL"} if kinds & {"JSON", "JSONL"} else {"JSON"}  # ".json" may hold facts about the others
    others = [file.name for file in sorted(folder.rglob("*")) if FILES.get(file.suffix, "JSON") not in kinds]
    if others:
        warnings.warn(
            f"{folder}: {', '.join(others[:3])} not read: the files of a folder are of one kind", stacklevel=2
        )


def _parts(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and split."""
    for name, split in ((source, ""), source.rpartition(":")[::2]):  # a folder's name may hold colons
        folder = Path(os.path.expanduser(name))
        if name and folder.is_dir():
            return str(folder), None, split or None
    name, _, split = source.partition(":")
    owner, *rest = name.split("/")
    if len(rest) == 2:
        return f"{owner}/{rest[0]}", rest[1], split or None
    return name, None, split or None


def _need(module: str, what: str) -> None:
    if find_spec(module) is None:
        raise ImportError(f"{what} need {module}: pip install 'lm-envs[data]'")
