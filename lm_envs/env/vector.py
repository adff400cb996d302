"""Text generation as native Gymnasium vector environments: a token per step, or a response per step."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from lm_envs.env.mdp import kl_penalty
from lm_envs.env.rows import Floats, Ints, TextRows
from lm_envs.kernels.logprob_kl import logprob_kl
from lm_envs.model.decoding import Decoder
from lm_envs.model.tokens import NO_TOKEN, EosIds, is_eos
from lm_envs.tasks.base import TextTask


class TextVectorEnv(TextRows):
    """A token per step, ``num_envs`` texts at once, one batched forward of the reference per step.

    Observation ``Box(-1, V-1, (P+T,), int64)``, action ``Discrete(V)``. A row terminates on EOS and on the length
    limit. The reward is ``score`` at the last token minus, per token, :func:`~lm_envs.env.mdp.kl_penalty`.

    Args:
        task: a task, or the name of a registered one.
        num_envs: rows.
        autoreset_mode: "SameStep" (default), "NextStep" or "Disabled", as Gymnasium defines them.
        render_mode: None or "ansi".
        options: of :class:`~lm_envs.env.mdp.TextMDP`, such as ``split`` and ``kl_coef``.
    """

    is_bandit = False

    def __init__(self, task: TextTask | str = "reviews", num_envs: int = 1, **arguments: Any) -> None:
        super().__init__(task, num_envs, **arguments)
        self._decoder = Decoder(self.mdp.reference, self.mdp.max_new_tokens)

    def _action_space(self) -> spaces.Space:
        return spaces.Discrete(self.mdp.vocab_size)

    def _kl(self, row: int) -> float:
        length = self._lengths[row]
        return float((self._logprob[row, :length] - self._ref_logprob[row, :length]).sum())

    def _reference(self, rows: Ints, actions: Ints) -> Floats:
        """Return the reference's log-probability of these rows' actions in the present state."""
        # In place, though the decoder keeps the logits: a row that stands still keeps its position and so its mask.
        logits = self.mdp.restrict(self._decoder(self.mdp.tensor(self._obs)), self.mdp.tensor(self._lengths))
        ids = np.zeros_like(self._lengths)
        ids[rows] = actions[rows]
        found = logprob_kl(logits, None, self.mdp.tensor(ids), temperature=self.mdp.temperature).logprob
        return found.double().cpu().numpy()[rows]

    def _allowed(self) -> NDArray[np.int8] | None:
        # The decoder keeps these logits, so the next step's penalty needs no forward.
        logits = None if self.mdp.reference_top_k is None else self._decoder(self.mdp.tensor(self._obs))
        return self.mdp.action_mask(self._lengths, logits)

    def _move(self, rows: Ints, actions: Ints, reported: Floats, rewards: Floats) -> None:
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions must have shape ({self.num_envs},), got {actions.shape}")
        size, ends, place = self.mdp.vocab_size, is_eos(actions[rows], self.mdp.eos_token_ids), self._lengths[rows]
        for row in rows[(actions[rows] < 0) | (actions[rows] >= size)]:
            raise ValueError(f"action {actions[row]} of row {row} is no token: the vocabulary has {size}")
        for row in rows[ends & (place < self.mdp.min_new_tokens)]:
            raise ValueError(
                f"row {row} ended after {self._lengths[row]} tokens, but min_new_tokens={self.mdp.min_new_tokens}: EOS "
                "is masked there; sample within info['action_mask']"
            )
        if self.mdp.reference_top_k is not None:
            assert self._mask is not None  # reset made it
            for row in rows[self._mask[rows, actions[rows]] == 0]:
                raise ValueError(
                    f"token {actions[row]} of row {row} is not among the {self.mdp.reference_top_k} that "
                    "reference_top_k allows there: sample within info['action_mask']"
                )
        self._logprob[rows, place] = reported[rows]
        if self.mdp.charged_kl_coef > 0:
            reference = self._reference(rows, actions)
            self._ref_logprob[rows, place] = reference
            rewards[rows] -= kl_penalty(self.mdp.charged_kl_coef, np.nan_to_num(reported[rows], nan=0.0), reference)
        self._obs[rows, self._prompt_places + place] = actions[rows]
        self._lengths[rows] += 1
        self._done[rows] = ends | (self._lengths[rows] == self.mdp.max_new_tokens)
        for finished in (True, False) if self.mdp.dense else (True,):
            index = rows[self._done[rows] == finished]
            if len(index):
                per_token = self.mdp.score(self._prompt_index[index], self._obs[index, self._prompt_places :], finished)
                now = per_token[np.arange(len(index)), self._lengths[index] - 1]
                self._score[index] += now
                rewards[index] += now


class TextBanditVectorEnv(TextRows):
    """A response per step: the action is ``MultiDiscrete([V] * T)``, read up to and including its first EOS.

    Every step terminates. The same tokens have the return of :class:`TextVectorEnv`. Agents report the log-probability
    of the whole response.
    """

    is_bandit = True

    def __init__(self, task: TextTask | str = "reviews", num_envs: int = 1, **arguments: Any) -> None:
        super().__init__(task, num_envs, **arguments)
        self._whole = np.full(num_envs, np.nan)
        if self.mdp.reference_top_k is not None:
            raise ValueError("reference_top_k needs the MDP env: along one bandit action there is no mask to give")

    def _action_space(self) -> spaces.Space:
        return spaces.MultiDiscrete([self.mdp.vocab_size] * self.mdp.max_new_tokens)

    def _kl(self, row: int) -> float:
        return float(self._whole[row] - self._ref_logprob[row, : self._lengths[row]].sum())

    def _move(self, rows: Ints, actions: Ints, reported: Floats, rewards: Floats) -> None:
        shape = (self.num_envs, self.mdp.max_new_tokens)
        if actions.shape != shape:
            raise ValueError(f"actions must have shape {shape}, a whole response a row, got {actions.shape}")
        response = cut_after_eos(actions[rows], self.mdp.eos_token_ids)
        if ((response >= self.mdp.vocab_size) | (actions[rows] < 0)).any():
            raise ValueError(f"actions hold something that is no token: the vocabulary has {self.mdp.vocab_size}")
        lengths = (response >= 0).sum(axis=1)
        short = is_eos(response, self.mdp.eos_token_ids).any(axis=1) & (lengths <= self.mdp.min_new_tokens)
        if short.any():
            ended = f"row {rows[short][0]} ended after {lengths[short][0] - 1} tokens"
            raise ValueError(f"{ended}, but min_new_tokens={self.mdp.min_new_tokens}")
        self._obs[rows, self._prompt_places :] = response
        self._lengths[rows], self._done[rows], self._whole[rows] = lengths, True, reported[rows]
        # In a single step, the reward is the sum of a dense reward's parts.
        self._score[rows] = self.mdp.score(self._prompt_index[rows], response).sum(axis=1)
        rewards[rows] = self._score[rows]
        if self.mdp.charged_kl_coef > 0:
            prompt = self._obs[rows, : self._prompt_places]
            scored = self.mdp.reference_logprob(self.mdp.tensor(prompt), self.mdp.tensor(response))
            self._ref_logprob[rows] = reference = scored.double().cpu().numpy()
            whole = np.nan_to_num(reported[rows], nan=0.0)
            rewards[rows] -= kl_penalty(self.mdp.charged_kl_coef, whole, reference.sum(axis=1))


def cut_after_eos(actions: Ints, eos_token_id: EosIds) -> Ints:
    """Return responses ``(N, T)`` with -1 behind the first EOS."""
    ends = is_eos(actions, eos_token_id)
    behind = np.cumsum(ends, axis=1) - ends > 0
    return np.where(behind, NO_TOKEN, actions)
