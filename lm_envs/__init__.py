"""lm-envs: text generation as a Gymnasium environment.

Importing this package only registers the environment ids; torch and transformers are imported when an environment is
made. The sibling packages are ``lm_envs.algos``, ``lm_envs.kernels`` and ``lm_envs.benchmarks``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from lm_envs.env.report import report, set_kl_coef

__all__ = ["report", "set_kl_coef"]
__version__ = "0.1.0"

# In a checkout these three are siblings of this folder; installed, they are inside it.
_root = Path(__file__).resolve().parent.parent
if all((_root / room).is_dir() for room in ("algos", "kernels", "benchmarks")):
    __path__.append(str(_root))

_TEXT_ENVS = {"Reviews": "reviews", "Enumerable": "enumerable"}

for _name, _task in _TEXT_ENVS.items():
    gymnasium.register(
        id=f"lm_envs/{_name}-v0",
        entry_point="lm_envs.env.single:TextEnv",
        vector_entry_point="lm_envs.env.vector:TextVectorEnv",
        kwargs={"task": _task},
    )
    gymnasium.register(
        id=f"lm_envs/{_name}Bandit-v0",
        entry_point="lm_envs.env.single:TextBanditEnv",
        vector_entry_point="lm_envs.env.vector:TextBanditVectorEnv",
        kwargs={"task": _task},
    )
gymnasium.register(id="lm_envs/Cat-v0", entry_point="lm_envs.env.cat:CatEnv", max_episode_steps=100)


def __getattr__(name: str) -> Any:
    # Their module imports the environments, so it is loaded on first use.
    if name in __all__:
        return getattr(import_module("lm_envs.env.report"), name)
    raise AttributeError(f"module 'lm_envs' has no attribute {name!r}")
