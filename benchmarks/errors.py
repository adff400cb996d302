"""Errors that the user can put right, which the command line reports in one line. Bugs keep their traceback."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from lm_envs.plugins import USER, told
from lm_envs.processes.heartbeats import Lost

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of the quota",
    errno.EMFILE: "raise the limit on open files",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
}


class UserError(Exception):
    """An error that the user can put right; its message has the fault, the place and the remedy."""


class RunsFailed(UserError):
    """Some runs of a comparison failed; ``finished`` is the number of those that did not."""

    def __init__(self, message: str, finished: int) -> None:
        super().__init__(message)
        self.finished = finished


class Interrupted(Exception):
    """The user asked to stop, and everything that ``--resume`` needs is on disk."""


def explain(error: BaseException) -> str | None:
    """Return one line for an error that the user can put right, None for a bug, which gets a traceback.

    A ``ValueError``, ``FloatingPointError`` or ``ImportError`` is expected if this package raised it; from inside a
    library it is a bug. What passed through a plugged-in file is the user's, and is told with the file's line. An
    ``OSError`` is expected if the system reports it, a ``SystemExit`` from the user's own code.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, Lost):
        return f"{error}; --resume goes on"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).startswith(USER) and isinstance(error, Exception):
            return told(error, frame.f_code.co_filename)
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no such file or folder: {str(error.filename)!r}"
    if isinstance(error, OSError) and (error.errno in _REMEDIES or (error.errno and error.filename)):
        what = f"cannot use {str(error.filename)!r}" if error.filename else "cannot use a file"
        remedy = f"; {_REMEDIES[error.errno]}, then continue with --resume" if error.errno in _REMEDIES else ""
        return f"{what}: {error.strerror}{remedy}"
    if isinstance(error, SystemExit) and not error.code and not _raised_by_us(error):  # rich ends a closed pipe with 1
        places = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
        where = f"{places[-1].filename}, line {places[-1].lineno}: " if places else ""
        return f"{where}it ends the program (sys.exit), which is no result: raise an error there"
    if isinstance(error, ValueError) and "null byte" in str(error):  # from Python, for the name of a file
        return "a name of a file or folder holds a NUL character, which no system takes"
    if isinstance(error, (ValueError, FloatingPointError, ImportError)) and _raised_by_us(error):
        return " ".join(str(error).split())
    return None


def _raised_by_us(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__", "")).split(".")[0] == "lm_envs"


def one_line(path: Path | str, line: int | None, what: str) -> str:
    """Return ``file, line n: what``, the form of errors in the user's files."""
    return f"{path}, line {line}: {what}" if line is not None else f"{path}: {what}"
