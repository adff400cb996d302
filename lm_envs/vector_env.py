"""Text generation as native Gymnasium vector environments: a token per step, or a response per step."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from lm_envs.decoding import Decoder
from lm_envs.kernels.logprob_kl import logprob_kl
from lm_envs.observations import NO_TOKEN, EosIds, is_eos
from lm_envs.rendering import render_text
from lm_envs.tasks.task import TextTask
from lm_envs.text_mdp import TextMDP, check_kl_coef

_UNREPORTED = (
    "kl_coef > 0, but the agent did not report its log-probabilities: only the reference's half of the KL penalty, "
    "kl_coef * ref_logprob, is charged, which rewards likely text and not staying close to the reference. "
    "Call lm_envs.report(env, logprobs) before each step for the exact penalty, or set kl_coef=0."
)


class _TextRows(VectorEnv):
    """What both faces share: rows with a prompt and a response, counted episodes, reports, autoreset."""

    metadata = {"render_modes": ["ansi"], "autoreset_mode": AutoresetMode.SAME_STEP}
    face: str

    def __init__(
        self,
        task: TextTask | str = "reviews",
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'ansi', got {render_mode!r}")
        self.mdp = TextMDP(task, **options)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        places, self._prompt_places = self.mdp.prompt_length + self.mdp.max_new_tokens, self.mdp.prompt_length
        self.single_observation_space = spaces.Box(-1, self.mdp.vocab_size - 1, (places,), np.int64)
        self.single_action_space = self._action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.kl_coef = self.mdp.kl_coef
        self._obs = np.full((num_envs, places), NO_TOKEN, dtype=np.int64)
        self._lengths = np.zeros(num_envs, dtype=np.int64)
        self._done = np.ones(num_envs, dtype=bool)  # nothing was started yet
        self._score = np.zeros(num_envs)
        self._logprob = np.full((num_envs, self.mdp.max_new_tokens), np.nan)
        self._ref_logprob = np.full((num_envs, self.mdp.max_new_tokens), np.nan)
        self._mask: NDArray[np.int8] | None = None
        self._seed: int | None = None
        self._next_episode = 0
        self._reported: NDArray[np.float64] | None = None
        self._warned = False

    def _action_space(self) -> spaces.Space:
        raise NotImplementedError  # pragma: no cover - each face defines its own

    @property
    def task(self) -> TextTask:
        """The task that is played."""
        return self.mdp.task

    # Between the agent and the environment

    def report(self, logprobs: ArrayLike) -> None:
        """Tell the log-probabilities of the actions of the coming step; see :func:`lm_envs.report`."""
        values = np.asarray(logprobs, dtype=np.float64)
        if values.shape != (self.num_envs,):
            raise ValueError(
                f"report expects one log-probability per row, shape ({self.num_envs},), got shape {values.shape}"
            )
        wrong = ~np.isfinite(values) | (values > 1e-3)
        if wrong.any():
            row = int(wrong.nonzero()[0][0])
            raise ValueError(f"report expects finite log-probabilities <= 0; row {row} has {values[row]}")
        self._reported = values

    def set_kl_coef(self, kl_coef: float) -> None:
        """Set beta from the next step on; see :func:`lm_envs.set_kl_coef`."""
        check_kl_coef(kl_coef)
        self.kl_coef = float(kl_coef)

    def _take_report(self) -> NDArray[np.float64]:
        reported, self._reported = self._reported, None
        if reported is not None:
            return reported
        if self.kl_coef > 0 and not self._warned:
            warnings.warn(_UNREPORTED, stacklevel=4)
            self._warned = True
        return np.full(self.num_envs, np.nan)

    def action_masks(self) -> NDArray[np.bool_]:
        """``(num_envs, V)`` bool, the tokens allowed now: ``info["action_mask"]`` under sb3-contrib's name."""
        shape = (self.num_envs, self.mdp.vocab_size)
        return np.ones(shape, dtype=bool) if self._mask is None else self._mask.astype(bool)

    # Episodes

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: of the counted randomness; given, episodes count from 0 again. None goes on with the next episodes.
            options: ``first_episode``, the number of the first of the new episodes (rows take consecutive numbers);
                ``reset_mask``, ``(num_envs,)`` bool, to start only these rows (autoreset mode "disabled").

        Returns:
            observations ``(num_envs, P + T)`` int64, and info with ``action_mask`` where tokens are masked.
        """
        super().reset(seed=seed)
        options = options or {}
        if seed is not None or self._seed is None:
            drawn = self.np_random_seed
            assert drawn is not None  # reset drew one
            self._seed = drawn % 2**64  # a seed that Gymnasium draws itself has 128 bits
            self._next_episode = 0
        if "first_episode" in options:
            self._next_episode = int(options["first_episode"])
        self._reported = None
        rows = np.ones(self.num_envs, dtype=bool)
        if "reset_mask" in options:
            rows = np.asarray(options["reset_mask"])
            if rows.shape != (self.num_envs,) or rows.dtype != bool or not rows.any():
                raise ValueError(
                    f"options['reset_mask'] must be a bool array of shape ({self.num_envs},) with at least one "
                    f"True, got {rows!r}"
                )
        self._start(rows)
        return self._obs.copy(), self._mask_info({})

    def _start(self, rows: NDArray[np.bool_]) -> None:
        """Put the next episodes into these rows, the lowest row first."""
        count = int(rows.sum())
        episodes = np.arange(self._next_episode, self._next_episode + count)
        self._next_episode += count
        assert self._seed is not None
        self._obs[rows] = NO_TOKEN
        self._obs[rows, : self._prompt_places] = self.mdp.start(self._seed, episodes)
        self._lengths[rows] = 0
        self._logprob[rows] = self._ref_logprob[rows] = np.nan
        self._done[rows] = False

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Take one action per row.

        Returns:
            observations, rewards ``(num_envs,)`` float64, terminated, truncated (never: the length limit is part of the
            task), and info: ``info["lm"]`` of the rows that finished, ``action_mask`` where tokens are masked.

        Raises:
            ValueError: actions of the wrong shape or out of range, or a masked token.
            RuntimeError: a finished row was stepped in autoreset mode "disabled".
        """
        actions = np.asarray(actions)
        reported = self._take_report()
        if self._seed is None:
            raise RuntimeError("call reset() before step()")
        restarted = np.zeros(self.num_envs, dtype=bool)
        if self._done.any():
            if self.autoreset_mode is not AutoresetMode.NEXT_STEP:
                raise RuntimeError(
                    f"rows {self._done.nonzero()[0].tolist()} have finished: reset them with "
                    "reset(options={'reset_mask': ...}) before the next step"
                )
            restarted = self._done.copy()
            self._start(restarted)
        moving = ~restarted
        rewards = np.zeros(self.num_envs)
        self._move(actions, moving, reported, rewards)
        finished = moving & self._done
        infos: dict[str, Any] = {}
        if finished.any():
            final = self._final_infos(finished)
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                for row, info in final.items():
                    infos = self._add_info(infos, {"final_obs": self._obs[row].copy(), "final_info": {"lm": info}}, row)
                self._start(finished)
            else:
                for row, info in final.items():
                    infos = self._add_info(infos, {"lm": info}, row)
        return self._obs.copy(), rewards, finished, np.zeros(self.num_envs, dtype=bool), self._mask_info(infos)

    def _move(
        self,
        actions: NDArray[np.int64],
        moving: NDArray[np.bool_],
        reported: NDArray[np.float64],
        rewards: NDArray[np.float64],
    ) -> None:
        raise NotImplementedError  # pragma: no cover - each face defines its own

    def _final_infos(self, finished: NDArray[np.bool_]) -> dict[int, dict[str, Any]]:
        """``info["lm"]`` by row. What is not known has no key: ``ref_logprob`` ``(T,)`` and ``kl`` need ``kl_coef >
        0`` all through the episode, and ``kl`` a report at every step.
        """
        rows = finished.nonzero()[0]
        texts = self.mdp.describe(self._obs[rows, : self._prompt_places], self._obs[rows, self._prompt_places :])
        infos: dict[int, dict[str, Any]] = {}
        for row, text in zip(rows.tolist(), texts, strict=True):
            infos[row] = {**text, "score": float(self._score[row])}
            reference = self._ref_logprob[row, : self._lengths[row]]
            if np.isfinite(reference).all():
                infos[row]["ref_logprob"] = np.pad(reference, (0, self.mdp.max_new_tokens - len(reference)))
            if np.isfinite(kl := self._kl(row)):
                infos[row]["kl"] = kl
        return infos

    def _kl(self, row: int) -> float:
        raise NotImplementedError  # pragma: no cover - each face defines its own

    def _mask_info(self, infos: dict[str, Any]) -> dict[str, Any]:
        self._mask = self._allowed()
        if self._mask is not None:
            infos["action_mask"], infos["_action_mask"] = self._mask.copy(), np.ones(self.num_envs, dtype=bool)
        return infos

    def _allowed(self) -> NDArray[np.int8] | None:
        return self.mdp.action_mask(self._lengths)

    def render(self) -> tuple[str, ...] | None:
        """The text so far of every row; tokens are coloured by their share of the KL where it is known."""
        if self.render_mode is None:
            return None
        return tuple(
            render_text(self.mdp, self._obs[row], self._logprob[row] - self._ref_logprob[row])
            for row in range(self.num_envs)
        )


class TextVectorEnv(_TextRows):
    """A token per step, ``num_envs`` texts at once, one batched forward of the reference per step.

    Observation ``Box(-1, V-1, (P+T,), int64)``, action ``Discrete(V)``. A row terminates on EOS and on the length
    limit. The reward is ``score`` at the last token plus, per token, ``kl_coef * (ref_logprob - logprob)``.

    Args:
        task: a task, or the name of a registered one.
        num_envs: rows.
        autoreset_mode: "SameStep" (default), "NextStep" or "Disabled", as Gymnasium defines them.
        render_mode: None or "ansi".
        options: of :class:`~lm_envs.text_mdp.TextMDP`: ``split``, ``kl_coef``, ``temperature``, ``max_new_tokens``,
            ``min_new_tokens``, ``missing_eos``, ``group_size``, ``reference_top_k``.
    """

    face = "mdp"

    def __init__(self, task: TextTask | str = "reviews", num_envs: int = 1, **arguments: Any) -> None:
        super().__init__(task, num_envs, **arguments)
        self._decoder = Decoder(self.mdp.reference, self.mdp.max_new_tokens)

    def _action_space(self) -> spaces.Space:
        return spaces.Discrete(self.mdp.vocab_size)

    def _kl(self, row: int) -> float:
        length = self._lengths[row]
        return float((self._logprob[row, :length] - self._ref_logprob[row, :length]).sum())

    def _start(self, rows: NDArray[np.bool_]) -> None:
        super()._start(rows)
        self._score[rows] = 0.0

    def _reference(self, actions: NDArray[np.int64], moving: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The reference's log-probability of each action in the present state; rows that do not move count for
        nothing."""
        logits = self._decoder(self.mdp.tensor(self._obs))
        lengths = self.mdp.tensor(self._lengths)
        # In place, though the decoder keeps them: a row that stands still stays at its position, and under its mask.
        logits = self.mdp.restrict(logits, lengths)
        ids = self.mdp.tensor(np.where(moving, actions, 0))
        return logprob_kl(logits, None, ids, temperature=self.mdp.temperature).logprob.double().cpu().numpy()

    def _allowed(self) -> NDArray[np.int8] | None:
        if self.mdp.reference_top_k is None:
            return super()._allowed()
        # The decoder keeps these logits, so the penalty of the coming step costs no forward of its own.
        return self.mdp.action_mask(self._lengths, self._decoder(self.mdp.tensor(self._obs)))

    def _move(
        self,
        actions: NDArray[np.int64],
        moving: NDArray[np.bool_],
        reported: NDArray[np.float64],
        rewards: NDArray[np.float64],
    ) -> None:
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions must have shape ({self.num_envs},), got {actions.shape}")
        outside = moving & ((actions < 0) | (actions >= self.mdp.vocab_size))
        if outside.any():
            row = int(outside.nonzero()[0][0])
            raise ValueError(
                f"action {actions[row]} of row {row} is no token: the vocabulary has {self.mdp.vocab_size}"
            )
        early = moving & is_eos(actions, self.mdp.eos_token_ids) & (self._lengths < self.mdp.min_new_tokens)
        if early.any():
            row = int(early.nonzero()[0][0])
            raise ValueError(
                f"row {row} ended after {self._lengths[row]} tokens, but "
                f"min_new_tokens={self.mdp.min_new_tokens}: EOS is masked "
                "there; sample within info['action_mask']"
            )
        rows = moving.nonzero()[0]
        if self.mdp.reference_top_k is not None:
            assert self._mask is not None  # reset made it
            barred = rows[self._mask[rows, actions[rows]] == 0]
            if len(barred):
                raise ValueError(
                    f"token {actions[barred[0]]} of row {barred[0]} is not among the {self.mdp.reference_top_k} that "
                    "reference_top_k allows there: sample within info['action_mask']"
                )
        place = self._lengths[rows]
        self._logprob[rows, place] = reported[rows]
        if self.kl_coef > 0:
            reference = self._reference(actions, moving)[rows]
            self._ref_logprob[rows, place] = reference
            rewards[rows] += self.kl_coef * (reference - np.nan_to_num(reported[rows], nan=0.0))
        self._obs[rows, self._prompt_places + place] = actions[rows]
        self._lengths[rows] += 1
        ended = is_eos(actions[rows], self.mdp.eos_token_ids)
        self._done[rows] = ended | (self._lengths[rows] == self.mdp.max_new_tokens)
        scored = moving if self.mdp.dense else moving & self._done
        if scored.any():
            index = scored.nonzero()[0]
            prompt, response = np.split(self._obs[index], [self._prompt_places], axis=1)
            per_token = self.mdp.score(prompt, response, self._done[index])
            now = per_token[np.arange(len(index)), self._lengths[index] - 1]
            self._score[index] += now
            rewards[index] += now


class TextBanditVectorEnv(_TextRows):
    """A response per step: the action is ``MultiDiscrete([V] * T)``, read up to and including its first EOS.

    One step, always terminated. The return of the same tokens is that of :class:`TextVectorEnv`. Reported is the
    log-probability of the whole response.
    """

    face = "bandit"

    def __init__(self, task: TextTask | str = "reviews", num_envs: int = 1, **arguments: Any) -> None:
        super().__init__(task, num_envs, **arguments)
        self._whole = np.full(num_envs, np.nan)
        if self.mdp.reference_top_k is not None:
            raise ValueError("reference_top_k needs the MDP face: along one bandit action there is no mask to give")

    def _action_space(self) -> spaces.Space:
        return spaces.MultiDiscrete([self.mdp.vocab_size] * self.mdp.max_new_tokens)

    def _mask_info(self, infos: dict[str, Any]) -> dict[str, Any]:
        return infos  # which tokens are allowed differs along one action: there is no one mask to give

    def _kl(self, row: int) -> float:
        return float(self._whole[row] - self._ref_logprob[row, : self._lengths[row]].sum())

    def _move(
        self,
        actions: NDArray[np.int64],
        moving: NDArray[np.bool_],
        reported: NDArray[np.float64],
        rewards: NDArray[np.float64],
    ) -> None:
        shape = (self.num_envs, self.mdp.max_new_tokens)
        if actions.shape != shape:
            raise ValueError(f"actions must have shape {shape}, a whole response a row, got {actions.shape}")
        rows = moving.nonzero()[0]
        response = cut_after_eos(actions[rows], self.mdp.eos_token_ids)
        if ((response >= self.mdp.vocab_size) | (actions[rows] < 0)).any():
            raise ValueError(f"actions hold something that is no token: the vocabulary has {self.mdp.vocab_size}")
        lengths = (response >= 0).sum(axis=1)
        short = is_eos(response, self.mdp.eos_token_ids).any(axis=1) & (lengths <= self.mdp.min_new_tokens)
        if short.any():
            raise ValueError(
                f"row {rows[short][0]} ended after {lengths[short][0] - 1} tokens, but "
                f"min_new_tokens={self.mdp.min_new_tokens}"
            )
        prompt = self._obs[rows, : self._prompt_places]
        self._obs[rows, self._prompt_places :] = response
        self._lengths[rows] = lengths
        self._done[rows] = True
        self._whole[rows] = reported[rows]
        # The parts of a reward per token have nowhere else to go in one step: the bandit's reward is their sum.
        self._score[rows] = self.mdp.score(prompt, response).sum(axis=1)
        rewards[rows] = self._score[rows]
        if self.kl_coef > 0:
            scored = self.mdp.reference_logprob(self.mdp.tensor(prompt), self.mdp.tensor(response))
            reference = scored.double().cpu().numpy()
            self._ref_logprob[rows] = reference
            rewards[rows] += self.kl_coef * (reference.sum(axis=1) - np.nan_to_num(reported[rows], nan=0.0))


def cut_after_eos(actions: NDArray[np.int64], eos_token_id: EosIds) -> NDArray[np.int64]:
    """``(N, T)`` responses with -1 behind the first EOS."""
    ends = is_eos(actions, eos_token_id)
    behind = np.cumsum(ends, axis=1) - ends > 0
    return np.where(behind, NO_TOKEN, actions)
