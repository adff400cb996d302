"""Text generation as single Gymnasium environments, one row of the vector environments."""

from __future__ import annotations

from copy import copy
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import ArrayLike, NDArray

from lm_envs.env.report import Reachable
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from lm_envs.tasks.base import TextTask


class _SingleRow(Reachable, gymnasium.Env):
    """A vector environment of one row, without the row's axis."""

    metadata = {"render_modes": ["ansi"]}
    _vector_class: type[TextVectorEnv] | type[TextBanditVectorEnv]

    def __init__(self, task: TextTask | str = "reviews", *, render_mode: str | None = None, **options: Any) -> None:
        options |= {"autoreset_mode": AutoresetMode.DISABLED, "render_mode": render_mode}
        self._vector = self._vector_class(task, 1, **options)
        self.mdp, self.is_bandit, self.render_mode = self._vector.mdp, self._vector.is_bandit, render_mode
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def report(self, logprobs: ArrayLike) -> None:
        """Report the log-probability of the next action; see :func:`lm_envs.report`."""
        values = np.asarray(logprobs, dtype=np.float64)
        if values.shape not in ((), (1,)):
            raise ValueError(f"report expects the log-probability of one action, a number, got shape {values.shape}")
        self._vector.report(values.reshape(1))

    def action_masks(self) -> NDArray[np.bool_]:
        """Return the tokens allowed now, ``(V,)`` bool (the name is sb3-contrib's)."""
        return self._vector.action_masks()[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Start the next episode; ``options["first_episode"]`` names its number."""
        super().reset(seed=seed)
        obs, infos = self._vector.reset(seed=seed, options=options)
        return obs[0], _first(infos)

    def step(self, action: Any) -> tuple[NDArray[np.int64], float, bool, bool, dict[str, Any]]:
        """Take one action; see :class:`~lm_envs.env.vector.TextVectorEnv`."""
        obs, reward, terminated, truncated, infos = self._vector.step(np.asarray(action)[None])
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first(infos)

    def render(self) -> str | None:
        """Return the text so far, with tokens colored by their share of the KL."""
        rows = self._vector.render()
        return None if rows is None else rows[0]


def _first(infos: dict[str, Any]) -> dict[str, Any]:
    """Return the info of row 0 without the vector form's presence masks."""
    return {key: _row0(value) for key, value in infos.items() if not key.startswith("_")}


def _row0(value: Any) -> Any:
    if isinstance(value, dict):
        return _first(value)
    first = copy(value[0])
    return first.item() if isinstance(first, np.generic) else first


class TextEnv(_SingleRow):
    """A token per step; see :class:`~lm_envs.env.vector.TextVectorEnv` for the spaces, the reward and the options."""

    _vector_class = TextVectorEnv


class TextBanditEnv(_SingleRow):
    """A response per step; see :class:`~lm_envs.env.vector.TextBanditVectorEnv`."""

    _vector_class = TextBanditVectorEnv
