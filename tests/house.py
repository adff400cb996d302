"""Where the rooms are, and a Python process to look at them from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "lm_envs", "algos", "benchmarks")
# The rooms and the files beside them. Each imports only itself and what stands before it.
ORDER = (
    "lm_envs.kernels",
    "lm_envs",
    "lm_envs.settings",
    "lm_envs.rng",
    "lm_envs.files",
    "lm_envs.printable",
    "lm_envs.plugins",
    "lm_envs.processes",
    "lm_envs.model",
    "lm_envs.trajectories",
    "lm_envs.data",
    "lm_envs.feedback",
    "lm_envs.reward",
    "lm_envs.training",
    "lm_envs.tasks",
    "lm_envs.env",
    "lm_envs.exact",
    "lm_envs.algos.ops",
    "lm_envs.algos.policies",
    "lm_envs.algos.engine",
    "lm_envs.algos",
    "lm_envs.algos.other_libraries",
    "lm_envs.benchmarks.errors",
    "lm_envs.benchmarks.measure",
    "lm_envs.benchmarks.run",
    "lm_envs.benchmarks.report",
    "lm_envs.benchmarks.speed",
    "lm_envs.benchmarks.probes",
    "lm_envs.benchmarks.commands",
    "lm_envs.benchmarks",
    "lm_envs.__main__",
)


def modules(root: Path) -> list[Path]:
    """Every module of the four rooms."""
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Output of a Python process; `path` goes first on its search path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    run = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
