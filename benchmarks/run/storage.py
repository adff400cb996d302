"""Files that survive a kill: JSON and CSV replaced whole, append-only records that a resumed run cuts back, and
checkpoints without pickle."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from lm_envs.benchmarks.errors import UserError
from lm_envs.files import (
    MANIFEST,
    TEMPORARY,
    damaged,
    jsonable,
    read_text,
    refuse_streams,
    remove,
    replacing_folder,
    sha256,
    sync,
    system_error,
    write_atomic,
    write_manifest,
)

SEAL = "sha256"
KEEP = 2  # checkpoints of a run that goes on


def held_files(folder: Path, ignored: Collection[str] = ()) -> list[str]:
    """Return the names in a folder, sorted, without .gitignore and what a killed write left behind."""
    names = (path.name for path in folder.iterdir())
    return sorted(n for n in names if n not in {".gitignore", *ignored} and not n.startswith(TEMPORARY))


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically."""
    write_atomic(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON object with a hash of itself; return it as :func:`read_sealed` does."""
    content = jsonable(value)
    write_json(path, content | {SEAL: _hash_of(content)})
    return read_sealed(path)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a CSV with these columns atomically; a line that lacks one has an empty cell there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(path, text.getvalue())


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; raise UserError if it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or delete its folder and run again") from error


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote, the hash under :data:`SEAL`; raise UserError if it was changed."""
    found = read_json(path)
    content = {name: value for name, value in found.items() if name != SEAL} if isinstance(found, dict) else {}
    if not content or found.get(SEAL) != _hash_of(content):
        raise UserError(f"{path} was changed after it was written; restore it, or delete its folder and run again")
    return found


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def finished(folder: Path, names: Collection[str] | None = None) -> dict[str, Any] | None:
    """Return the result of a finished run, None of another, or, with a warning, if a file was damaged since.

    Args:
        names: check these files only, and accept a result without a manifest.
    """
    if not (folder / MANIFEST).exists():
        return _result(folder) if names and (folder / "result.json").exists() else None
    if (name := damaged(folder, names=names)) is not None:
        warnings.warn(f"{folder / name} was damaged after the run was finished: --resume makes it again", stacklevel=1)
        return None
    return read_json(folder / "result.json")


def _result(folder: Path) -> dict[str, Any]:
    """A ``result.json`` that no manifest vouches for."""
    found, kinds = read_json(folder / "result.json"), {"task": str, "algorithm": str, "seed": int}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{folder / 'result.json'} is damaged: it is no result of a run; delete its folder, run again")
    return found


@dataclass
class Records:
    """An append-only JSON-lines file; checkpoints record how it begins, so that a resumed run continues from there."""

    path: Path

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records and pass them to the operating system; a full disk is an error here, not later."""
        lines = "".join(json.dumps(jsonable(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def seal(self) -> tuple[int, str]:
        """Sync the file, because no checkpoint may be newer than its records; return its size and hash."""
        if not self.path.exists():
            return 0, hashlib.sha256().hexdigest()
        sync(self.path)
        return self.path.stat().st_size, sha256(self.path)

    def begins(self, size: int, sha: str) -> bool:
        """Return whether the file still begins as it was when :meth:`seal` returned these."""
        try:
            with open(self.path, "rb") as file:
                return hashlib.sha256(file.read(size)).hexdigest() == sha
        except OSError:
            return size == 0

    def cut(self, size: int) -> None:
        if size:
            os.truncate(self.path, size)
        else:
            remove(self.path)

    def read(self) -> list[dict[str, Any]]:
        """Return all whole records, without a last line that a kill cut short; raise UserError if another line is not
        JSON, or the file cannot be read."""
        found: list[dict[str, Any]] = []
        if not self.path.exists():
            return found
        refuse_streams(self.path)
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        for number, line in enumerate(lines, start=1):
            try:
                found.append(json.loads(line))
                if not isinstance(found[-1], dict):
                    raise ValueError("not a record")
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    why = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
                    raise UserError(f"{self.path}, line {number}: {why}; restore or delete the run's folder") from error
        return found


class Checkpoint(NamedTuple):
    """A checkpoint that was read: tensors by name and a JSON-able state."""

    iteration: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


@dataclass
class Checkpoints:
    """The last few checkpoints of a run, each a folder ``checkpoint-000012`` with ``tensors.safetensors``,
    ``state.json`` and the hashes of both in ``manifest.json``, which appears whole or not at all.

    ``runs`` are hashes of what decides the run, the last one its own, before it those of runs that it extends: a
    checkpoint of another one is not used. Without any, all are taken. ``keep`` of them stay while the run goes on.
    """

    folder: Path
    runs: tuple[str, ...] = ()
    keep: int = KEEP

    def paths(self) -> list[Path]:
        """Return the finished checkpoints, the oldest first."""
        return sorted(path for path in self.folder.glob("checkpoint-*") if path.is_dir())

    @property
    def last(self) -> int:
        """The iteration of the newest checkpoint, 0 without one."""
        return max((int(path.name.rpartition("-")[2]) for path in self.paths()), default=0)

    def save(self, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and drop those beyond :attr:`keep`; on an OSError the earlier ones are untouched."""
        final = self.folder / f"checkpoint-{iteration:06d}"
        try:
            with replacing_folder(final) as folder:
                file = folder / "tensors.safetensors"
                try:  # from where the tensors are: to serialize them first would take twice their memory
                    safetensors.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
                except SafetensorError as error:
                    raise system_error(error, file) from error
                write_json(folder / "state.json", state)
                write_manifest(folder, {"run": "".join(self.runs[-1:]), "iteration": iteration})
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(final)) from error
        self.prune(self.keep)
        return final

    def prune(self, keep: int) -> None:
        paths = self.paths()
        for old in paths[: max(0, len(paths) - keep)]:
            shutil.rmtree(old)

    def newest(self, records: Sequence[Records] = ()) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and whose records are unchanged, or None; raise UserError if there
        are whole ones, but records were changed before the first of them."""
        spoiled: list[Path] = []
        for path in reversed(self.paths()):
            try:
                found = self._read(path)
            except UserError as error:
                warnings.warn(f"{error}; falling back to the one before it", RuntimeWarning, stacklevel=2)
                continue
            known = found.state.get("records", {})
            spoiled = [r.path for r in records if r.path.name in known and not r.begins(*known[r.path.name])]
            if not spoiled:
                return found
            warnings.warn(f"{spoiled[0]} was changed before {path.name}", RuntimeWarning, stacklevel=2)
        if spoiled:
            raise UserError(
                f"{spoiled[0]} was changed where no checkpoint can replace it: restore it, or delete "
                f"{self.folder.parent} and run again"
            )
        return None

    def _read(self, path: Path) -> Checkpoint:
        """Read a checkpoint; raise UserError if it is damaged or of another run."""
        number = path.name.removeprefix("checkpoint-")
        count = int(number) if number.isdigit() else None
        origins: list[Any] = [{"run": run, "iteration": count} for run in self.runs] or [None]
        if all(damaged(path, origin) is not None for origin in origins):
            name = damaged(path)
            what = "is of another run" if name is None else f"is damaged: {name}"
            raise UserError(f"checkpoint {path} {what}")
        try:
            tensors = safetensors.load_file(path / "tensors.safetensors")
            return Checkpoint(int(number), tensors, read_json(path / "state.json"))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
