"""Rows of generated text, the base of the MDP env and the bandit env, and their rendering."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from lm_envs.env.mdp import TextMDP
from lm_envs.env.report import Reachable
from lm_envs.model.tokens import NO_TOKEN
from lm_envs.printable import printable
from lm_envs.tasks.base import TextTask

_UNREPORTED = (
    "kl_coef > 0, but the agent did not report its log-probabilities: only the reference's half of the KL penalty, "
    "kl_coef * ref_logprob, is charged, which rewards likely text and not staying close to the reference. "
    "Call lm_envs.report(env, logprobs) before each step for the exact penalty, or set kl_coef=0."
)
_FULL_SCALE = 3.0  # nats: a token this much likelier (or less likely) than under the reference has the strongest color
_LIKELIER = (224, 218, 212, 206)  # 256-color palette, pale to strong: the policy says it more than the reference
_RARER = (195, 153, 117, 75)
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class TextRows(Reachable, VectorEnv):
    """Rows with a prompt and a response, counted episodes, reports and autoreset.

    Subclasses define ``_action_space()``; ``_move(rows, actions, reported, rewards)``, which takes the actions of these
    rows and adds to their rewards; and ``_kl(row)`` of a finished episode.
    """

    _action_space: Callable[[], spaces.Space]
    _move: Callable[[Ints, Ints, Floats, Floats], None]
    _kl: Callable[[int], float]
    metadata = {"render_modes": ["ansi"], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        task: TextTask | str = "reviews",
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
            raise ValueError(f"num_envs must be a whole number of at least 1, got {num_envs!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'ansi', got {render_mode!r}")
        self.mdp = TextMDP(task, **options)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        places, self._prompt_places = self.mdp.prompt_length + self.mdp.max_new_tokens, self.mdp.prompt_length
        self.single_observation_space = spaces.Box(-1, self.mdp.vocab_size - 1, (places,), np.int64)
        self.single_action_space = self._action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._obs = np.full((num_envs, places), NO_TOKEN, dtype=np.int64)
        self._prompt_index, self._lengths = np.zeros((2, num_envs), dtype=np.int64)
        self._done = np.ones(num_envs, dtype=bool)  # no episode has started
        self._score = np.zeros(num_envs)
        self._logprob, self._ref_logprob = np.full((2, num_envs, self.mdp.max_new_tokens), np.nan)
        self._mask: NDArray[np.int8] | None = None
        self._seed: int | None = None
        self._next_episode = 0
        self._reported: Floats | None = None
        self._warned = False

    def report(self, logprobs: ArrayLike) -> None:
        """Report the log-probabilities of the next step's actions; see :func:`lm_envs.report`."""
        values = np.asarray(logprobs, dtype=np.float64)
        if values.shape != (self.num_envs,):
            shapes = f"shape ({self.num_envs},), got shape {values.shape}"
            raise ValueError(f"report expects one log-probability per row, {shapes}")
        wrong = ~np.isfinite(values) | (values > 1e-3)
        if wrong.any():
            row = int(wrong.nonzero()[0][0])
            raise ValueError(f"report expects finite log-probabilities <= 0; row {row} has {values[row]}")
        self._reported = values

    def _take_report(self) -> Floats:
        reported, self._reported = self._reported, None
        if reported is not None:
            return reported
        if self.mdp.charged_kl_coef > 0 and not self._warned:
            warnings.warn(_UNREPORTED, stacklevel=4)
            self._warned = True
        return np.full(self.num_envs, np.nan)

    def action_masks(self) -> NDArray[np.bool_]:
        """Return the allowed tokens, ``(num_envs, V)`` bool: ``info["action_mask"]`` under sb3-contrib's name."""
        shape = (self.num_envs, self.mdp.vocab_size)
        return np.ones(shape, dtype=bool) if self._mask is None else self._mask.astype(bool)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Ints, dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: of the counted randomness; episodes then count from 0 again. None continues with the next episodes.
            options: ``first_episode``, the number of the first new episode (rows take consecutive numbers);
                ``reset_mask``, ``(num_envs,)`` bool, to start only these rows (autoreset mode "disabled").

        Returns:
            observations ``(num_envs, P + T)`` int64, and info with ``action_mask`` if tokens are masked.
        """
        super().reset(seed=seed)
        options = options or {}
        if seed is not None or self._seed is None:
            drawn = self.np_random_seed
            assert drawn is not None  # reset drew one
            self._seed = drawn % 2**64  # a seed that Gymnasium draws itself has 128 bits
            self._next_episode = 0
        if "first_episode" in options:
            first = options["first_episode"]
            if not isinstance(first, (int, np.integer)) or first < 0:
                raise ValueError(f"options['first_episode'] must be a whole number of at least 0, got {first!r}")
            self._next_episode = int(first)
        self._reported = None
        rows = np.ones(self.num_envs, dtype=bool)
        if "reset_mask" in options:
            rows = np.asarray(options["reset_mask"])
            if rows.shape != (self.num_envs,) or rows.dtype != bool or not rows.any():
                shape = f"shape ({self.num_envs},)"
                raise ValueError(f"options['reset_mask'] must be a bool array of {shape} with a True, got {rows!r}")
        self._start(rows)
        return self._obs.copy(), self._mask_info({})

    def _start(self, rows: NDArray[np.bool_]) -> None:
        """Start the next episodes in these rows, the lowest row first."""
        count = int(rows.sum())
        episodes = np.arange(self._next_episode, self._next_episode + count)
        self._next_episode += count
        assert self._seed is not None
        self._obs[rows] = NO_TOKEN
        self._prompt_index[rows] = self.mdp.prompt_index(self._seed, episodes)
        self._obs[rows, : self._prompt_places] = self.mdp.prompt(self._prompt_index[rows])
        self._lengths[rows] = self._score[rows] = 0
        self._logprob[rows] = self._ref_logprob[rows] = np.nan
        self._done[rows] = False

    def step(self, actions: Ints) -> tuple[Ints, Floats, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Take one action per row.

        Returns:
            observations, rewards ``(num_envs,)`` float64, terminated, truncated (never: the length limit is part of the
            task), and info: ``info["lm"]`` of the rows that finished, ``action_mask`` if tokens are masked.

        Raises:
            ValueError: actions that are not integers, of the wrong shape or out of range, or a masked token.
            RuntimeError: a finished row was stepped in autoreset mode "disabled".
        """
        actions = np.asarray(actions)
        if actions.dtype.kind not in "iu":  # a cast would make a token of NaN and of 1.7
            raise ValueError(f"actions must be token ids, which are integers; got {actions.dtype}")
        reported = self._take_report()
        if self._seed is None:
            raise RuntimeError("call reset() before step()")
        restarted = np.zeros(self.num_envs, dtype=bool)
        if self._done.any():
            if self.autoreset_mode is not AutoresetMode.NEXT_STEP:
                rows = self._done.nonzero()[0].tolist()
                raise RuntimeError(f"rows {rows} have finished: reset(options={{'reset_mask': ...}}) before step()")
            restarted = self._done.copy()
            self._start(restarted)
        moving = ~restarted
        rewards = np.zeros(self.num_envs)
        self._move(moving.nonzero()[0], actions, reported, rewards)
        finished = moving & self._done
        infos: dict[str, Any] = {}
        if finished.any():
            same = self.autoreset_mode is AutoresetMode.SAME_STEP
            for row, lm in self._final_infos(finished).items():
                info = {"final_obs": self._obs[row].copy(), "final_info": {"lm": lm}} if same else {"lm": lm}
                infos = self._add_info(infos, info, row)
            if same:
                self._start(finished)
        return self._obs.copy(), rewards, finished, np.zeros(self.num_envs, dtype=bool), self._mask_info(infos)

    def _final_infos(self, finished: NDArray[np.bool_]) -> dict[int, dict[str, Any]]:
        """Return ``info["lm"]`` by row. ``ref_logprob`` ``(T,)`` and ``kl`` are there only with ``kl_coef > 0``
        throughout the episode, and ``kl`` only with a report at every step."""
        rows = finished.nonzero()[0]
        found = self.mdp.samples(self._prompt_index[rows], self._obs[rows, self._prompt_places :])
        infos: dict[int, dict[str, Any]] = {}
        for i, row in enumerate(rows.tolist()):
            infos[row] = {"prompt": found.prompts[i], "response": found.completions[i]}
            infos[row] |= {"finish_reason": found.finish_reasons[i], "score": float(self._score[row])}
            infos[row]["prompt_index"] = int(self._prompt_index[row])
            reference = self._ref_logprob[row, : self._lengths[row]]
            if np.isfinite(reference).all():
                infos[row]["ref_logprob"] = np.pad(reference, (0, self.mdp.max_new_tokens - len(reference)))
            if np.isfinite(kl := self._kl(row)):
                infos[row]["kl"] = kl
        return infos

    def _mask_info(self, infos: dict[str, Any]) -> dict[str, Any]:
        self._mask = self._allowed()
        if self._mask is not None:
            infos["action_mask"], infos["_action_mask"] = self._mask.copy(), np.ones(self.num_envs, dtype=bool)
        return infos

    def _allowed(self) -> NDArray[np.int8] | None:
        return None  # along a bandit env's action, the allowed tokens differ

    def render(self) -> tuple[str, ...] | None:
        """Return the text of every row so far, with tokens colored by their known share of the KL."""
        if self.render_mode is None:
            return None
        return tuple(
            render_text(self.mdp, self._obs[row], self._logprob[row] - self._ref_logprob[row])
            for row in range(self.num_envs)
        )


def render_text(mdp: TextMDP, obs: Ints, kl: Floats) -> str:
    """Return the observation ``(P + T,)`` for a terminal: the prompt in bold, then the response's tokens, colored by
    ``kl (T,)``, ``log pi - log pi_ref`` in nats; NaN is unknown."""
    prompt, response = (row[row >= 0].tolist() for row in (obs[: mdp.prompt_length], obs[mdp.prompt_length :]))
    decode = mdp.task.tokenizer.decode
    before = decode(prompt)
    parts = [f"\x1b[1m{printable(decode(prompt, skip_special_tokens=True))}\x1b[0m"]
    for i in range(len(response)):
        # Decode the growing text and show what each token added: spaces and byte-level pieces come out right.
        text = decode(prompt + response[: i + 1])
        piece, before = text[len(before) :], text
        parts.append(_colored(printable(piece), kl[i]))
    return "".join(parts)


def _colored(piece: str, kl: float) -> str:
    if np.isnan(kl) or abs(kl) < 0.1:
        return piece
    palette = _LIKELIER if kl > 0 else _RARER
    level = min(int(abs(kl) / _FULL_SCALE * len(palette)), len(palette) - 1)
    return f"\x1b[30;48;5;{palette[level]}m{piece}\x1b[0m"
