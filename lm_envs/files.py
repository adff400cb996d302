"""Files that are replaced atomically, and a cache of folders that are built once.

A reader sees the old content of a file or the new one, also during a write and after a crash. A cached folder,
``<root>/<kind>/<key>/``, is named after a hash of everything that determines its content; the root is
``$LM_ENVS_CACHE`` or ``lm-envs`` in the user's cache folder. It is built under a lock in a temporary folder and
renamed; its ``manifest.json`` holds the size and SHA-256 of each file, which are checked when it is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

TEMPORARY = ".tmp-"  # files and folders of this prefix are unfinished and never read


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def system_error(error: SafetensorError, path: Path) -> OSError:
    """Return the system's error, such as a full disk, behind one of safetensors' writers, with the path."""
    code = re.search(r"os error (\d+)", str(error))
    number = int(code.group(1)) if code else errno.EIO
    return OSError(number, os.strerror(number), str(path))


def _beside(path: Path) -> Path:
    """Return a temporary name that no other writer of the same file has."""
    return path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}"[:255]


def remove_unfinished(folder: Path) -> None:
    """Delete what processes that were killed meanwhile were writing in a folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        pid = path.name.removeprefix(TEMPORARY).partition("-")[0]
        if pid.isdecimal() and not _is_running(int(pid)):
            remove(path)


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere signal 0 ends a process
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces ``path`` when the block ends, or is dropped if it fails; an OSError names ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make an empty folder that replaces ``path`` when the block ends, or is dropped if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        for written in temporary.rglob("*"):
            sync(written)
        sync(temporary)
        remove(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """Return a file's UTF-8 text without a byte order mark; ValueError for other bytes, and for a pipe or a device."""
    refuse_streams(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's content; ValueError for anything else."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for very long numbers and deep nesting
        raise ValueError(f"{path}: not TOML: {error}") from error


def refuse_streams(path: Path) -> None:
    """Raise ValueError for a pipe, a socket or a device."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe, a socket or a device: copy what it gives to a file")


def jsonable(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace a file by bytes, or by text in UTF-8."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


# ---- folders that are built once ----

MANIFEST = "manifest.json"
# Errors during a build that are the cache folder's fault; others are the build's own.
_OF_THE_PLACE = (
    "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG ENOTDIR EEXIST EISDIR EIO ELOOP ENAMETOOLONG ENOLCK ENOSYS ENOTSUP "
    "EOPNOTSUPP ESTALE EMFILE ENFILE ENODEV ENXIO"
).split()
_REMEDY = "free some space there, or set LM_ENVS_CACHE to a folder that can be written"
_log = logging.getLogger(__name__)


class CacheError(OSError, ValueError):
    """A cache folder cannot be used; the message says which, why and what to do."""


@contextmanager
def blaming(
    folder: Path, remedy: str = _REMEDY, only: Callable[[OSError], bool] = lambda error: True
) -> Iterator[None]:
    """Turn the block's OSErrors for which ``only`` holds into a CacheError about the folder."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        if not only(error):
            raise
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "raise the limit on open files (ulimit -n)"
        why = (error.strerror or str(error) or type(error).__name__).split("\n")[0]
        raise CacheError(f"cannot use the cache folder {folder}: {why}; {remedy}") from error


def cache_root() -> Path:
    """Return ``$LM_ENVS_CACHE``, or ``lm-envs`` in the platform's folder for caches; CacheError without a home."""
    chosen = os.environ.get("LM_ENVS_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        if sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise CacheError(f"no cache folder: {error}; set LM_ENVS_CACHE to a folder that can be written") from None
    return base / "lm-envs"


def key_of(parts: Mapping[str, Any]) -> str:
    """Hash named parts (JSON values) to 20 hex digits, whatever their order."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def code_hash(files: Iterable[str | Path]) -> str:
    """Hash source files, so that what they built is built again when they change."""
    digest = hashlib.sha256()
    for file in files:
        content = Path(file).read_bytes()
        digest.update(f"{Path(file).name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:20]


def cached(kind: str, parts: Mapping[str, Any], build: Callable[[Path], None], *, needs_bytes: int = 64 << 20) -> Path:
    """Return the folder of an entry, built first if it is missing or damaged; CacheError if it cannot be written.

    One process builds while others wait. An interrupted build leaves no entry.

    Args:
        kind: a folder of the cache, such as a task's name.
        parts: everything that determines the content; JSON values.
        build: fills the empty folder that it receives.
        needs_bytes: free space to require before the build.
    """
    root = cache_root()
    entry = root / kind / key_of(parts)
    if damaged(entry) is None:
        return entry  # without a lock, so a read-only cache works
    own: list[OSError] = []  # errors that are the build's own

    def watched(folder: Path) -> None:
        try:
            build(folder)
        except SafetensorError as error:  # a full disk raises it when weights are saved
            raise OSError(errno.EIO, str(error)) from error
        except OSError as error:
            elsewhere = error.filename is not None and root not in Path(os.fsdecode(error.filename)).parents
            if elsewhere or errno.errorcode.get(error.errno or 0) not in _OF_THE_PLACE:
                own.append(error)
            raise

    with blaming(root, only=lambda error: error not in own):
        entry.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(entry.parent).free < needs_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _locked(entry):
            if damaged(entry) is None:
                return entry
            # Killed builds left these folders, and under the lock no other process uses them.
            for stale in entry.parent.glob(f"{TEMPORARY}*-{entry.name}"):
                shutil.rmtree(stale, ignore_errors=True)
            if entry.exists():
                _log.warning("the cached %s is damaged: making it again", entry)
            with replacing_folder(entry) as folder:
                watched(folder)
                write_manifest(folder, parts)
    return entry


def _locked(entry: Path) -> AbstractContextManager[Any]:
    lock = FileLock(entry.with_name(entry.name + ".lock"))
    try:
        return lock.acquire(timeout=0.1)
    except Timeout:
        _log.warning("waiting for another process that is making %s", entry)
        return lock.acquire()


def write_manifest(folder: Path, parts: Mapping[str, Any], of: Iterable[Path] | None = None) -> None:
    """Record the size and SHA-256 of every file in a folder, or of some, and their origin."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*") if of is None else of)
        if path.is_file()
    }
    write_atomic(folder / MANIFEST, json.dumps({"made_from": dict(parts), "files": files}, indent=1))


def damaged(folder: Path, parts: Mapping[str, Any] | None = None, names: Collection[str] | None = None) -> str | None:
    """Return the first file that is missing or differs from the folder's manifest, None if the folder is intact.

    Args:
        parts: the required origin of the folder; None for any.
        names: the files to check; None for all.
    """
    name = MANIFEST
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if parts is not None and manifest["made_from"] != parts:
            return name
        for name, facts in manifest["files"].items():
            if names is not None and name not in names:
                continue
            if (folder / name).stat().st_size != facts["bytes"] or sha256(folder / name) != facts["sha256"]:
                return name
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return name
    return None


def sha256(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
