"""Where the rooms are, and a Python process to look at them from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "lm_envs", "algos", "benchmarks")  # each imports only itself and those before it


def modules(root: Path) -> list[Path]:
    """Every module of the four rooms."""
    return sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Output of a Python process; `path` goes first on its search path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    run = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
