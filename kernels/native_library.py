"""A C file as a shared library, compiled once per machine and kept in a private folder.

A library is loaded only if the user alone can write its folder and file, and if its SHA-256 is the one written beside
it when it was compiled; otherwise it is compiled again. Without such a folder each process compiles it for itself.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

_log = logging.getLogger(__name__)
_COMPILE_S = 120  # seconds that a compiler may take
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Unavailable(Exception):
    """The library cannot be made here; the message says why."""


def load(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Compile and load a C file for this processor, by ``$CC`` or the first of cc, gcc, clang, with these flags.

    Raises:
        Unavailable: there is no compiler, it fails, or the library cannot be loaded.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise Unavailable("no C compiler: none of cc, gcc and clang is there, and CC is not set")
    made_for = "\n".join([source.read_text(), compiler, *flags, platform.machine(), _processor()])
    name = f"{source.stem}-{hashlib.sha256(made_for.encode()).hexdigest()[:20]}.so"
    try:
        path = _private_folder() / name
        if not _trusted(path):
            with FileLock(path.with_suffix(".lock")):  # of several processes, one compiles
                if not _trusted(path):
                    if path.exists():
                        _log.warning("%s is damaged or not ours: compiling it again", path)
                    _compile(compiler, flags, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, Unavailable) as error:  # no private folder, a full disk, no locks, no home, ...
        failure = error
    try:
        with tempfile.TemporaryDirectory(prefix="lm-envs-native-") as folder:
            path = Path(folder) / name
            _compile(compiler, flags, source, path)
            library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(str(error)) from None
    _log.warning(
        "the cache folder %s cannot be used (%s), so C kernels are compiled in each process; "
        "set LM_ENVS_CACHE to a folder that can be written",
        _folder(),
        failure,
    )
    return library


def _folder() -> Path:
    """``native`` in ``$LM_ENVS_CACHE``, else in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    root = os.environ.get("LM_ENVS_CACHE") or os.path.join(cache, "lm-envs")
    return Path(os.path.abspath(os.path.expanduser(root))) / "native"


def _private_folder() -> Path:
    """Make the cache folder; raises OSError if this user cannot write it or others can."""
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or not _ours(folder.stat()) or not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is not a folder that this user alone can write")
    return folder


def _ours(status: os.stat_result) -> bool:
    """Whether this user owns it and nobody else can write it."""
    return status.st_uid == os.getuid() and not status.st_mode & _OTHERS_WRITE


def _trusted(path: Path) -> bool:
    """Whether the library exists, is ours, and is what was compiled."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or not _ours(status):
            return False
        return path.with_suffix(".sha256").read_text().strip() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _compile(compiler: str, flags: Sequence[str], source: Path, path: Path) -> None:
    errors = ""
    for tuning in (["-march=native"], ["-mcpu=native"], []):  # not every compiler knows the first
        handle, made = tempfile.mkstemp(suffix=".so", prefix=".tmp-", dir=path.parent)  # mode 0600
        os.close(handle)
        try:
            command = [*compiler.split(), *flags, *tuning, "-o", made, str(source), "-lm"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S)
            if run.returncode == 0:
                os.chmod(made, 0o700)
                path.with_suffix(".sha256").write_text(hashlib.sha256(Path(made).read_bytes()).hexdigest())
                os.replace(made, path)  # whole or not at all
                return
        except (subprocess.TimeoutExpired, FileNotFoundError) as error:  # FileNotFoundError: the compiler itself
            raise Unavailable(f"{compiler}: {error}") from None
        finally:
            Path(made).unlink(missing_ok=True)
        errors = run.stderr.strip().split("\n")[0] if run.stderr.strip() else f"exit status {run.returncode}"
    raise Unavailable(f"{compiler}: {errors}")


def _processor() -> str:
    """A text that differs between processors with different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
