"""The cat of reinforcement-learning lectures: a small gridworld whose optimum can be computed.

The cat wants the meat (+100, the episode ends), would rather not step on a broom (-1) and must not fall into the
bathtub (-10, the episode ends). On the default map the shortest clean ways pass right by a bathtub. They are the
best ones while every move succeeds; on slippery ground the best one leads over a broom instead.
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
    """The map as a tuple of rows, or ValueError saying which row or cell is wrong."""
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
    down, left. A move off the grid stays where it is. The reward is that of the cell the move ends in, also when it
    stays there: empty 0, broom -1, bathtub -10 and meat +100, and the last two terminate. Every episode starts in a
    cell marked S, drawn uniformly if there are several.

    Args:
        map: rows of equal length of the cells ``S`` start, ``.`` empty, ``B`` broom, ``T`` bathtub, ``M`` meat.
        slip: probability that a move goes to one of the two perpendicular directions, each equally likely.
        render_mode: None or "ansi", the map with the cat as C.

    Attributes:
        gamma: the discount the task is meant for, 0.95; advice to the agent, the env does not use it.

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
        # One draw a step whatever the probability: envs that differ in slip alone start every episode alike.
        draw = self.np_random.random()
        if draw < self.slip:
            direction = (direction + (1 if draw < self.slip / 2 else -1)) % len(ACTIONS)
        cell = self._shown = self._destination(self._cell, direction)
        content = self._cells[cell]
        terminated = content in TERMINAL
        self._cell = None if terminated else cell
        return cell, REWARD[content], terminated, False, {}

    def _destination(self, cell: int, action: int) -> int:
        """The cell a move ends in; a move off the grid stays."""
        width = len(self.map[0])
        y, x = cell // width + _MOVES[action][0], cell % width + _MOVES[action][1]
        return y * width + x if 0 <= y < len(self.map) and 0 <= x < width else cell

    def render(self) -> str | None:
        """The map with the cat as C in "ansi" mode, else None."""
        if self.render_mode is None:
            return None
        cells = self._cells[: self._shown] + "C" + self._cells[self._shown + 1 :]
        width = len(self.map[0])
        return "\n".join(" ".join(cells[i : i + width]) for i in range(0, len(cells), width)) + "\n"


def _cat(env_or_map: EnvOrMap, slip: float | None) -> CatEnv:
    """The environment, or one of a map; a slip that is given wins."""
    if not isinstance(env_or_map, gymnasium.Env):
        return CatEnv(env_or_map, slip or 0.0)
    env = env_or_map.unwrapped
    if not isinstance(env, CatEnv):
        raise ValueError(f"expected a map or a CatEnv, got {env!r}")
    return env if slip is None else CatEnv(env.map, slip)


def dynamics(env_or_map: EnvOrMap = DEFAULT_MAP, slip: float | None = None) -> tuple[Floats, Floats]:
    """Transition probabilities and expected rewards.

    Returns:
        `(continuing, reward)`: `continuing[s, a, s']` (cells, 4, cells) is the probability of arriving in s' **with the
        episode going on**, so its rows sum to less than 1 where the episode may end; `reward[s, a]` (cells, 4) is the
        expected reward of the move, terminal ones included. Both are 0 for bathtub and meat, where nothing is played.
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
    """Optimal values and actions without a step limit: the fixed point of `V(s) = max_a r(s,a) + gamma sum_s' p V(s')`
    (Bellman 1957; Sutton and Barto 2018, section 4.4).

    Args:
        env_or_map: a CatEnv, wrapped or not, or a map.
        gamma: discount, 0 <= gamma < 1.
        slip: None is the env's own (0 for a map).
        tolerance: largest error of a value that is left.

    Returns:
        `(V, policy)`, float64 and int64 of shape (cells,). V is 0 in bathtub and meat; ties go to the lower action.
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
    """Exact expected discounted return of a policy, the mean over start cells.

    Args:
        policy: actions (cells,), or probabilities (cells, 4).
        env_or_map: a CatEnv, wrapped or not, or a map.
        gamma: discount; below 1 when there is no limit.
        slip: None is the env's own (0 for a map).
        limit: steps after which nothing more is counted, 100 as in ``lm_envs/Cat-v0``; None for no limit, which is what
            `value_iteration` solves.

    Raises:
        ValueError: for a policy of the wrong shape, with an unknown action, or whose rows are not probabilities.
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
        raise ValueError(f"gamma must lie in [0, 1) where there is no step limit, got {gamma!r}")


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
