"""lm-envs: text generation as a Gymnasium environment.

Importing this package only registers the environment ids; torch and transformers are imported when an environment is
made. The sibling packages are ``lm_envs.algos``, ``lm_envs.kernels`` and ``lm_envs.benchmarks``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from lm_envs.env.report import report, set_kl_coef

__all__ = ["register_task", "report", "set_kl_coef"]
__version__ = "0.1.0"

# In a checkout these three are siblings of this folder; installed, they are inside it.
_root = Path(__file__).resolve().parent.parent
if all((_root / room).is_dir() for room in ("algos", "kernels", "benchmarks")):
    __path__.append(str(_root))


def register_task(name: str, loader: str | Callable[..., Any]) -> None:
    """Register a task of your own as ``lm_envs/NAME-v0`` and ``lm_envs/NAMEBandit-v0``, and by its name in lower case.

    Args:
        name: a Python identifier.
        loader: a function that returns a :class:`lm_envs.tasks.base.TextTask`, or a text that names one, as in
            ``"my_task.py:load"``.

    Raises:
        ValueError: another kind of name, or that of a task of this package.
    """
    from lm_envs.tasks import TASKS

    key = name.lower()
    if not name.isidentifier() or str(TASKS.get(key, "")).startswith("lm_envs.tasks."):
        raise ValueError(f"task {name!r}: choose another name: a Python identifier, and none of this package's tasks")
    TASKS[key] = loader
    _register(name, key)


def _register(name: str, task: str) -> None:
    for kind in ("", "Bandit"):
        gymnasium.register(
            id=f"lm_envs/{name}{kind}-v0",
            entry_point=f"lm_envs.env.single:Text{kind}Env",
            vector_entry_point=f"lm_envs.env.vector:Text{kind}VectorEnv",
            kwargs={"task": task},
        )


_register("Reviews", "reviews")
_register("Enumerable", "enumerable")
gymnasium.register(id="lm_envs/Cat-v0", entry_point="lm_envs.env.cat:CatEnv", max_episode_steps=100)


def __getattr__(name: str) -> Any:
    # Their module imports the environments, so it is loaded on first use.
    if name in ("report", "set_kl_coef"):
        return getattr(import_module("lm_envs.env.report"), name)
    raise AttributeError(f"module 'lm_envs' has no attribute {name!r}")
