"""The decision process of a task: prompts, masks, scores and the reference's half of the KL penalty.

The single, vector and bandit envs and the bulk path share this definition, so they cannot disagree.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_envs import rng
from lm_envs.model.decoding import forbid_early_eos, keep_top
from lm_envs.model.encoder_decoder import room_for
from lm_envs.model.forwards import response_logprob
from lm_envs.model.text import Codec
from lm_envs.model.tokens import is_eos, left_pad
from lm_envs.reward.base import call_reward, dense_part, is_dense, reward_name, scores_or_nan
from lm_envs.reward.units import Samples
from lm_envs.settings import Count, Finite, Positive, Settings, Whole
from lm_envs.tasks import load
from lm_envs.tasks.base import TextTask

# A forked child, as in AsyncVectorEnv, lacks its parent's OpenMP threads and would wait for them forever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def kl_penalty(kl_coef: float, logprob: Any, ref_logprob: Any) -> Any:
    """Return ``kl_coef * (logprob - ref_logprob)``, which is subtracted from the reward of each action.

    The k1 estimator of the KL to the reference: signed, never clamped. Arguments are numbers, arrays or tensors.
    """
    return kl_coef * (logprob - ref_logprob)


class TextMDP(Settings):
    """The Markov decision process of a task. Options that are None are the task's; ValueError if one is out of range.

    Args:
        task: a :class:`~lm_envs.tasks.base.TextTask`, or the name of a registered one.
        split: a key of ``task.prompts``.
        kl_coef: beta, the weight of the KL penalty, in score units per nat.
        temperature: of the policy and of the reference.
        max_new_tokens: the horizon.
        min_new_tokens: EOS is masked before that many tokens.
        missing_eos: ``("replace", x)`` makes x the score of a response without EOS, ``("subtract", x)`` subtracts x
            from it (before the KL penalty); None does neither.
        group_size: number of consecutive episodes that start from the same prompt.
        reference_top_k: allow in each state only the reference's k likeliest tokens; None allows all. NLPO's idea
            (Ramamurthy et al. 2023, section 4) with the mask of the frozen reference, so that it is a function of the
            state; policy and reference are renormalized over it.

    Attributes:
        kl_coef: the present weight of the penalty, held here alone.
        explicit_kl_coef: the weight that the caller asked for; None if it is the task's default or an agent's.
        kl_in_reward: whether the reward holds the penalty; False while an agent has it as a term of its loss.
    """

    temperature: Positive
    max_new_tokens: Count
    min_new_tokens: Whole
    missing_eos: tuple[Literal["replace", "subtract"], Finite] | None
    group_size: Count
    reference_top_k: Count | None

    def __init__(
        self,
        task: TextTask | str,
        *,
        split: str = "train",
        kl_coef: float | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        missing_eos: tuple[Literal["replace", "subtract"], float] | None = None,
        group_size: int = 1,
        reference_top_k: int | None = None,
    ) -> None:
        self.task = load(task) if isinstance(task, str) else task
        if split not in self.task.prompts:
            raise ValueError(f"task {self.task.name!r} has no split {split!r}; it has {', '.join(self.task.prompts)}")
        self.split = split
        self.prompts: Sequence[Sequence[int]] = self.task.prompts[split]
        self.temperature = self.task.temperature if temperature is None else temperature
        self.max_new_tokens = self.task.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.min_new_tokens = self.task.min_new_tokens if min_new_tokens is None else min_new_tokens
        self.explicit_kl_coef = kl_coef
        self.kl_coef = self.task.kl_coef if kl_coef is None else kl_coef
        self.kl_in_reward = True
        self.missing_eos, self.group_size, self.reference_top_k = missing_eos, group_size, reference_top_k
        self.reference = self.task.reference
        self.codec = Codec(self.task.tokenizer, self.reference)
        self.eos_token_id, self.eos_token_ids = self.task.eos_token_id, self.task.eos_token_ids
        self.prompt_length = self.task.prompt_length
        self.vocab_size = int(self.reference.get_output_embeddings().weight.shape[0])
        self.device = self.reference.device
        if not self.prompts:
            raise ValueError(f"task {self.task.name!r} has no prompts in split {self.split!r}")
        empty = next((i for i, prompt in enumerate(self.prompts) if len(prompt) == 0), None)
        if empty is not None:
            raise ValueError(f"prompt {empty} of split {self.split!r} is empty: give it a token, such as BOS")
        self.__post_init__()  # checks the types above
        check_kl_coef(self.kl_coef)
        if self.min_new_tokens > self.max_new_tokens:
            limit = f"max_new_tokens={self.max_new_tokens}"
            raise ValueError(f"min_new_tokens must lie between 0 and {limit}, got {self.min_new_tokens}")
        mode, _ = self.missing_eos or (None, 0.0)
        if mode == "replace" and self.dense:
            why = "a dense reward has been paid before the end is known; use ('subtract', x)"
            raise ValueError(f"missing_eos=('replace', x) needs a reward per response: {why}")
        needed, context = room_for(self.reference, self.prompt_length, self.max_new_tokens)
        if context is not None and needed > context:
            raise ValueError(
                f"the longest prompt has {self.prompt_length} tokens and responses up to {self.max_new_tokens}: "
                f"{needed} places are more than the model's context of {context}; shorten the prompts or max_new_tokens"
            )

    def set_kl_coef(self, kl_coef: float) -> None:
        """Set the weight of the penalty as the caller's choice, which an agent's setting may not contradict."""
        check_kl_coef(kl_coef)
        self.kl_coef = self.explicit_kl_coef = float(kl_coef)

    @property
    def charged_kl_coef(self) -> float:
        """The weight of the penalty in the reward: :attr:`kl_coef`, or 0 if the penalty is in a loss."""
        return self.kl_coef if self.kl_in_reward else 0.0

    @property
    def dense(self) -> bool:
        """Whether the reward is given per token."""
        return is_dense(self.task.reward)

    def prompt_index(self, seed: int, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of :attr:`prompts` for each episode, a function of the seed and the episode's group alone."""
        return rng.integers(seed, rng.PROMPT, episodes // self.group_size, len(self.prompts))

    def prompt(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of prompts number ``index (N,)``, ``(N, P)`` int64, left-padded with -1."""
        return left_pad([self.prompts[i] for i in index.tolist()], self.prompt_length)

    def columns(self, index: NDArray[np.int64]) -> dict[str, list[Any]]:
        """Return the columns of prompts number ``index (N,)`` for rewards, N entries by name."""
        columns = self.task.columns.get(self.split, {})
        return {name: [values[i] for i in index.tolist()] for name, values in columns.items()}

    def restrict(self, ref_logits: Tensor, lengths: Tensor) -> Tensor:
        """Set the reference's logits ``(N, V)`` after ``lengths (N,)`` response tokens to -inf where a token is not
        allowed, in place; a second call changes nothing."""
        logits = forbid_early_eos(ref_logits, lengths, self.eos_token_ids, self.min_new_tokens, in_place=True)
        return logits if self.reference_top_k is None else keep_top(logits, self.reference_top_k)

    def action_mask(self, lengths: NDArray[np.int64], ref_logits: Tensor | None = None) -> NDArray[np.int8] | None:
        """Return ``(N, V)`` int8, 1 where a token is allowed after ``lengths`` response tokens; None if no token is
        ever masked. ``ref_logits (N, V)``, which ``reference_top_k`` needs, are restricted in place."""
        if self.reference_top_k is not None:
            if ref_logits is None:
                raise ValueError("reference_top_k makes the action mask of the reference's logits, and there are none")
            return (self.restrict(ref_logits, self.tensor(lengths)) > -torch.inf).to(torch.int8).cpu().numpy()
        if self.min_new_tokens == 0:
            return None
        mask = np.ones((len(lengths), self.vocab_size), dtype=np.int8)
        mask[:, list(self.eos_token_ids)] = (lengths >= self.min_new_tokens)[:, None]
        return mask

    def texts(self, prompt: NDArray[np.int64], response: NDArray[np.int64]) -> tuple[list[str], list[str]]:
        """Return the texts of prompts ``(N, P)`` and of the responses to them ``(N, T)``, padded with -1."""
        return self.codec.decode(*([row[row >= 0].tolist() for row in rows] for rows in (prompt, response)))

    def samples(self, index: NDArray[np.int64], response: NDArray[np.int64]) -> Samples:
        """Return responses ``(N, T)``, padded with -1, to prompts number ``index (N,)``, as rewards take them."""
        ids = [row[row >= 0].tolist() for row in response]
        prompts, completions = self.codec.decode([list(self.prompts[i]) for i in index.tolist()], ids)
        return Samples(prompts, completions, ids, self.finish_reasons(response), self.columns(index))

    def finish_reasons(self, response: NDArray[np.int64]) -> list[str]:
        """Return ``"stop"`` for a response that ends in EOS, else ``"length"``."""
        return ["stop" if stopped else "length" for stopped in is_eos(response, self.eos_token_ids).any(axis=1)]

    def score(
        self, index: NDArray[np.int64], response: NDArray[np.int64], finished: bool = True
    ) -> NDArray[np.float64]:
        """Return the reward before the KL penalty, ``(N, T)`` float64: a score, with the missing-EOS option, at the
        last real action, or a dense reward.

        Args:
            index: ``(N,)`` int64, the rows of :attr:`prompts`.
            response: ``(N, T)`` int64, right-padded with -1, EOS included.
            finished: False for rows with a dense reward that will continue: rewards at the end are left out.
        """
        given = self.samples(index, response).given
        if finished:
            raw = call_reward(self.task.reward, **given)
        else:
            raw = np.nan_to_num(scores_or_nan(dense_part(self.task.reward), given))
        lengths = (response >= 0).sum(axis=1)
        rows = np.arange(len(response))
        per_token = np.zeros(response.shape)
        if raw.ndim == 2 and not self.dense:
            name = reward_name(self.task.reward)
            raise ValueError(f"reward {name!r} returned a number per token: set its attribute dense = True")
        if raw.ndim == 2:
            width = min(raw.shape[1], response.shape[1])
            per_token[:, :width] = np.where(response[:, :width] >= 0, raw[:, :width], 0.0)
        else:
            per_token[rows, lengths - 1] = raw
        if self.missing_eos is not None and finished:
            mode, amount = self.missing_eos
            cut = ~is_eos(response, self.eos_token_ids).any(axis=1)
            if mode == "replace":
                per_token[cut] = 0.0
                per_token[rows[cut], lengths[cut] - 1] = amount
            else:
                per_token[rows[cut], lengths[cut] - 1] -= amount
        return per_token

    def reference_logprob(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Return the response's ``(N, T)`` log-probabilities under the reference, teacher-forced, 0 beyond the end."""
        return response_logprob(
            self.reference,
            prompt.to(self.device),
            response.to(self.device),
            self.eos_token_ids,
            temperature=self.temperature,
            min_new_tokens=self.min_new_tokens,
            top_k=self.reference_top_k,
        )

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """Move a NumPy array to the reference's device."""
        return torch.as_tensor(array).to(self.device)


def check_kl_coef(kl_coef: float) -> None:
    """Raise ValueError unless the coefficient is a finite number that is not negative."""
    if not (isinstance(kl_coef, Real) and math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef must be finite and not negative, got {kl_coef!r}")
