"""Files that survive a kill: JSON and CSV replaced whole, append-only records that a resumed run cuts back, and
checkpoints without pickle.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from lm_envs.benchmarks.errors import UserError
from lm_envs.files import TEMPORARY, sync_folder, write_atomic, write_synced


def jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become None, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def held_files(folder: Path, ignored: Collection[str] = ()) -> list[str]:
    """The names in a folder that are somebody's, sorted: not .gitignore, nor what a killed write left behind."""
    names = (path.name for path in folder.iterdir())
    return sorted(n for n in names if n not in {".gitignore", *ignored} and not n.startswith(TEMPORARY))


def write_json(path: Path, value: Any) -> None:
    """An indented JSON file, written atomically."""
    write_atomic(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A CSV of these columns of some lines, written atomically; a line that lacks one has an empty cell there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(path, text.getvalue())


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); delete its folder and run again") from error


class Records:
    """An append-only JSON-lines file whose records belong to iterations, so that a resumed run repeats none.

    Args:
        path: the file; made with its first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records and hand them to the operating system; a full disk is an error here, not later."""
        lines = "".join(json.dumps(jsonable(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> None:
        """Wait until the disk has what was appended: a checkpoint must not be newer than the records it vouches for."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a last line that a kill cut short is left out."""
        return [record for _, record in self._lines()]

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        if not self.path.exists():
            return []
        found = []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                found.append((line, json.loads(line)))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise UserError(
                        f"{self.path}, line {number}: not JSON ({error.msg}); restore or delete the run's folder"
                    ) from error
        return found

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Forget the records that are not wanted, and a last line that a kill cut short."""
        if self.path.exists():
            write_atomic(self.path, "".join(line + "\n" for line, record in self._lines() if wanted(record)))


@dataclass(frozen=True)
class Checkpoint:
    """What :class:`Checkpoints` gives back: tensors by name and a JSON-able state."""

    iteration: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The last few checkpoints of a run, each a folder ``checkpoint-000012`` with ``tensors.safetensors`` and
    ``state.json``.

    A folder is written under a temporary name, synced and renamed, so that one with a final name is whole unless the
    disk damages it; that is noticed by a hash, and the one before it is used.

    Args:
        folder: where they lie.
        keep: how many.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """Finished checkpoints, the oldest first."""
        return sorted(path for path in self.folder.glob("checkpoint-*") if path.is_dir())

    def save(self, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and drop those beyond ``keep``; on an error the earlier ones are untouched.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_unfinished()
        final = self.folder / f"checkpoint-{iteration:06d}"
        temporary = self.folder / f"{TEMPORARY}{final.name}"
        # safetensors' own writer reports a full disk as an error of its own kind: serialise, and let Python write.
        data = safetensors.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        content = {"iteration": iteration, "sha256": hashlib.sha256(data).hexdigest(), "state": dict(state)}
        try:
            temporary.mkdir()
            write_synced(temporary / "tensors.safetensors", data)
            write_synced(temporary / "state.json", json.dumps(content, indent=1, allow_nan=False).encode())
            sync_folder(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(error.errno, error.strerror, str(final)) from error
        sync_folder(self.folder)
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def _drop_unfinished(self) -> None:
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, or None; a damaged one is passed over with a warning."""
        for path in reversed(self.paths()):
            try:
                return read_checkpoint(path)
            except UserError as error:
                warnings.warn(f"{error}; falling back to the one before it", RuntimeWarning, stacklevel=2)
        return None


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint folder.

    Raises:
        UserError: it is incomplete or damaged.
    """
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        data = (path / "tensors.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != content["sha256"]:
            raise UserError(f"checkpoint {path} is damaged: tensors.safetensors does not match its hash")
        return Checkpoint(content["iteration"], safetensors.load(data), content["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
