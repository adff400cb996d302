"""The cat of reinforcement-learning lectures: a small gridworld whose optimum can be computed.

The cat wants the meat (+100, the episode ends) and avoids brooms (-1) and the bathtub (-10, the episode ends). On the
default map the shortest clean paths pass a bathtub. They are optimal while every move succeeds; on slippery ground the
optimal path leads over a broom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

START, EMPTY, BROOM, BATHTUB, MEAT = "S.BTM"
REWARD = {START: 0.0, EMPTY: 0.0, BROOM: -1.0, BATHTUB: -10.0, MEAT: 100.0}
TERMINAL = (BATHTUB, MEAT)

DEFAULT_MAP = ("S....", ".BB..", "..T..", ".BT.B", "....M")
GAMMA = 0.95
MAX_STEPS = 100
EnvOrMap = gymnasium.Env | Sequence[str]
Floats = NDArray[np.float64]

ACTIONS = ("up", "right", "down", "left")
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # clockwise, so the perpendicular ones of `a` are a-1 and a+1


def check_map(map: Sequence[str]) -> tuple[str, ...]:
    """Return the map as a tuple of rows; ValueError names a wrong row or cell."""
    if isinstance(map, str):
        raise ValueError(f"map must be a list of rows, got one string: use {map.split()!r}")
    rows = tuple(map)
    if not rows or not all(isinstance(row, str) and row for row in rows):
        raise ValueError(f"map must be a non-empty list of non-empty strings, got {map!r}")
    for y, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"map rows differ in length: row 0 has {len(rows[0])} cells, row {y} has {len(row)}")
        for x, cell in enumerate(row):
            if cell not in REWARD:
                cells = "cells are S (start), . (empty), B (broom), T (bathtub) and M (meat)"
                raise ValueError(f"map row {y}, column {x} holds {cell!r}; {cells}")
    if START not in "".join(rows):
        raise ValueError("map has no start: mark at least one cell with S")
    return rows


class CatEnv(gymnasium.Env):
    """Gridworld with the cat, registered as ``lm_envs/Cat-v0`` with a limit of 100 steps (truncation).

    Observation ``Discrete(rows * columns)``: the cell, row by row from the top left. Action ``Discrete(4)``: up, right,
    down, left; a move off the grid does nothing. The reward is that of the resulting cell: empty 0, broom -1, bathtub
    -10 and meat +100, and the last two terminate. Episodes start in a cell marked S, uniformly if there are several.

    Args:
        map: rows of equal length of the cells ``S`` start, ``.`` empty, ``B`` broom, ``T`` bathtub, ``M`` meat.
        slip: probability of a move in one of the two perpendicular directions, each equally likely.
        render_mode: None or "ansi", the map with the cat as C.

    Attributes:
        gamma: the recommended discount, 0.95; the env does not use it.

    Raises:
        ValueError: bad map (row and column are named), slip, render mode or action.
        RuntimeError: a step before a reset or after the end of an episode.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}
    gamma = GAMMA

    def __init__(self, map: Sequence[str] = DEFAULT_MAP, slip: float = 0.0, render_mode: str | None = None) -> None:
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode must be None or 'ansi', got {render_mode!r}")
        if not 0.0 <= slip <= 1.0:
            raise ValueError(f"slip is a probability, got {slip!r}")
        self.map, self.slip, self.render_mode = check_map(map), float(slip), render_mode
        self._cells = "".join(self.map)
        self._starts = np.flatnonzero(np.array(list(self._cells)) == START)
        self._cell: int | None = None  # None: no episode is running
        self._shown = int(self._starts[0])
        self.observation_space = spaces.Discrete(len(self._cells))
        self.action_space = spaces.Discrete(len(ACTIONS))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Put the cat on a start cell. There are no options."""
        super().reset(seed=seed)
        self._cell = self._shown = int(self.np_random.choice(self._starts))
        return self._cell, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Move the cat; `truncated` is always False here, the limit is Gymnasium's TimeLimit."""
        if self._cell is None:
            raise RuntimeError("no episode is running: call reset() first")
        if not self.action_space.contains(action):
            raise ValueError(f"action must be an int from 0 to 3 ({', '.join(ACTIONS)}), got {action!r}")
        direction = int(action)
        # Always one draw per step, so that envs that differ in slip alone start every episode alike.
        draw = self.np_random.random()
        if draw < self.slip:
            direction = (direction + (1 if draw < self.slip / 2 else -1)) % len(ACTIONS)
        cell = self._shown = self._destination(self._cell, direction)
        content = self._cells[cell]
        terminated = content in TERMINAL
        self._cell = None if terminated else cell
        return cell, REWARD[content], terminated, False, {}

    def _destination(self, cell: int, action: int) -> int:
        """Return the cell that a move ends in."""
        width = len(self.map[0])
        y, x = cell // width + _MOVES[action][0], cell % width + _MOVES[action][1]
        return y * width + x if 0 <= y < len(self.map) and 0 <= x < width else cell

    def render(self) -> str | None:
        """Return the map with the cat as C in "ansi" mode, else None."""
        if self.render_mode is None:
            return None
        cells = self._cells[: self._shown] + "C" + self._cells[self._shown + 1 :]
        width = len(self.map[0])
        return "\n".join(" ".join(cells[i : i + width]) for i in range(0, len(cells), width)) + "\n"


def _cat(env_or_map: EnvOrMap, slip: float | None) -> CatEnv:
    """Return the environment, or one of a map, with the given slip."""
    if not isinstance(env_or_map, gymnasium.Env):
        return CatEnv(env_or_map, slip or 0.0)
    env = env_or_map.unwrapped
    if not isinstance(env, CatEnv):
        raise ValueError(f"expected a map or a CatEnv, got {env!r}")
    return env if slip is None else CatEnv(env.map, slip)


def dynamics(env_or_map: EnvOrMap = DEFAULT_MAP, slip: float | None = None) -> tuple[Floats, Floats]:
    """Return transition probabilities and expected rewards.

    `continuing[s, a, s']` (cells, 4, cells) is the probability of arriving in s' **without the episode ending**, so
    rows may sum to less than 1; `reward[s, a]` (cells, 4) is the expected reward of the move, also at an end. Both are
    0 for bathtub and meat.
    """
    env = _cat(env_or_map, slip)
    cells = env._cells
    continuing, reward = np.zeros((len(cells), len(ACTIONS), len(cells))), np.zeros((len(cells), len(ACTIONS)))
    for cell, action in np.ndindex(reward.shape):
        if cells[cell] in TERMINAL:
            continue
        for turn, probability in ((0, 1.0 - env.slip), (1, env.slip / 2), (-1, env.slip / 2)):
            end = env._destination(cell, (action + turn) % len(ACTIONS))
            reward[cell, action] += probability * REWARD[cells[end]]
            if cells[end] not in TERMINAL:
                continuing[cell, action, end] += probability
    return continuing, reward


def value_iteration(
    env_or_map: EnvOrMap = DEFAULT_MAP, gamma: float = GAMMA, slip: float | None = None, tolerance: float = 1e-10
) -> tuple[Floats, NDArray[np.int64]]:
    """Return optimal values and actions without a step limit, float64 and int64 of shape (cells,).

    The fixed point of `V(s) = max_a r(s,a) + gamma sum_s' p V(s')` (Bellman 1957; Sutton and Barto 2018, section 4.4).
    V is 0 in bathtub and meat; ties go to the lower action.

    Args:
        env_or_map: a CatEnv, wrapped or not, or a map.
        gamma: discount, 0 <= gamma < 1.
        slip: None is the env's own (0 for a map).
        tolerance: the largest error of a value.
    """
    _check_gamma(gamma)
    continuing, reward = dynamics(env_or_map, slip)
    values, change = np.zeros(len(reward)), np.inf
    while change * gamma > tolerance * (1.0 - gamma):  # |V - V*| <= change * gamma / (1 - gamma)
        previous = values
        values = (reward + gamma * continuing @ previous).max(axis=1)
        change = np.abs(values - previous).max()
    return values, (reward + gamma * continuing @ values).argmax(axis=1)


def expected_return(
    policy: NDArray[Any] | Sequence[int],
    env_or_map: EnvOrMap = DEFAULT_MAP,
    gamma: float = GAMMA,
    slip: float | None = None,
    limit: int | None = MAX_STEPS,
) -> float:
    """Return the exact expected discounted return of a policy, the mean over start cells.

    Args:
        policy: actions (cells,), or probabilities (cells, 4); ValueError for others.
        env_or_map, slip: as for `value_iteration`.
        gamma: discount; below 1 without a limit.
        limit: number of steps that count, 100 as in ``lm_envs/Cat-v0``; None for no limit, as in `value_iteration`.
    """
    continuing, reward = dynamics(env_or_map, slip)
    probability = _probabilities(policy, len(reward))
    step = np.einsum("sa,san->sn", probability, continuing)
    gain = (probability * reward).sum(axis=1)
    if limit is None:
        _check_gamma(gamma)
        values = np.linalg.solve(np.eye(len(gain)) - gamma * step, gain)
    else:
        values = np.zeros(len(gain))
        for _ in range(limit):
            values = gain + gamma * step @ values
    return float(values[_cat(env_or_map, slip)._starts].mean())


def _check_gamma(gamma: float) -> None:
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma must be in [0, 1) without a step limit, got {gamma!r}")


def _probabilities(policy: NDArray[Any] | Sequence[int], cells: int) -> Floats:
    array = np.asarray(policy)
    if array.shape == (cells,):
        if not np.isin(array, range(len(ACTIONS))).all():
            raise ValueError(f"policy must hold actions 0 to 3, got {np.unique(array).tolist()}")
        return np.eye(len(ACTIONS))[array.astype(np.int64)]
    if array.shape != (cells, len(ACTIONS)):
        raise ValueError(f"policy must be actions ({cells},) or probabilities ({cells}, 4), got {array.shape}")
    if (array < 0).any() or not np.allclose(array.sum(axis=1), 1.0, atol=1e-6):
        raise ValueError("policy rows must be probabilities that sum to 1")
    return array.astype(np.float64)
