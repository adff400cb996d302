"""A causal language model as the network of an actor-critic library: rows of observations in, logits and values out."""

import copy
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP
from lm_envs.env.report import text_envs
from lm_envs.env.rows import TextRows
from lm_envs.kernels.logprob_kl import scaled
from lm_envs.model.decoding import forbid_early_eos
from lm_envs.model.forwards import picked_logits
from lm_envs.model.tokens import NO_TOKEN


class LMActorCritic(nn.Module):
    """Logits of the next token and the value of the state, for observations of a text environment.

    The states of an episode are prefixes of each other, so a batch of them is computed as few texts: one forward per
    episode, if the batch holds whole episodes. Without gradients a batch of ``num_envs`` rows is treated as a step of
    the env, and rows that grew by one token use a KV cache. Both only change the cost.

    The logits are those of the trained distribution: divided by the env's temperature, with EOS at -inf before
    ``min_new_tokens``. Dropout is off in train mode too. The value head is linear on the last hidden state and starts
    at zero.

    Args:
        model: any transformers causal LM; it is trained in place.
        mdp: the env's definition.
        num_envs: rows that step together.
    """

    def __init__(self, model: PreTrainedModel, mdp: TextMDP, num_envs: int) -> None:
        super().__init__()
        self.policy = LMPolicy.for_mdp(mdp, model)
        self.policy.value_steps()
        self.num_envs = num_envs

    @property
    def model(self) -> PreTrainedModel:
        """The language model."""
        return self.policy.model

    @classmethod
    def for_env(cls, env: Any, model: PreTrainedModel | None = None) -> Self:
        """Make the network for an env: wrapped or not, single, vector or a ``SyncVectorEnv``.

        Args:
            model: None takes a copy of the task's start model.

        Raises:
            TypeError: ``env`` holds no text environment.
            ValueError: a bandit env, whose action is a whole response, or a model with another vocabulary.
        """
        inner = text_envs(env)
        if not inner:
            raise TypeError(f"{type(env).__name__} contains no text environment that can be reached")
        if inner[0].is_bandit:
            raise ValueError("an actor-critic over tokens needs a token-level env, whose id does not end in Bandit-v0")
        if model is None:
            model = copy.deepcopy(inner[0].task.start).requires_grad_(True)
        rows = inner[0].num_envs if isinstance(inner[0], TextRows) else len(inner)
        return cls(model, inner[0].mdp, rows)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(..., V)`` and values ``(...)``, float32 at least, of states ``obs (..., P + T)``, integers
        of any dtype, -1 where there is no token."""
        rows = obs.reshape(-1, obs.shape[-1]).to(device=self.model.device, dtype=torch.int64)
        if not torch.is_grad_enabled() and len(rows) == self.num_envs:
            logits, value = self.policy.next_logits(rows), self.policy.next_value()
        else:
            logits, value = read_states(self.policy, rows)
        logits = scaled(logits, self.policy.temperature)
        return logits.reshape(*obs.shape[:-1], -1), value.to(logits.dtype).reshape(obs.shape[:-1])


def read_states(policy: LMPolicy, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``(N, V)``, EOS at -inf where it is not allowed yet, and values ``(N,)`` of states ``(N, P + T)`` int64,
    -1 where there is no token; differentiable. Each text is computed once."""
    shared = shared_texts(rows.cpu().numpy(), policy.prompt_length)
    texts, row = (torch.as_tensor(x, device=rows.device) for x in shared)
    prompt, response = texts[:, : policy.prompt_length], texts[:, policy.prompt_length :]
    position = (rows[:, policy.prompt_length :] >= 0).sum(dim=1)
    prompt = prompt[:, int(((prompt >= 0).any(dim=0).cumsum(0) == 0).sum()) :]  # without columns that are empty in all
    # One column more than the longest response, for the states after its last token.
    response = nn.functional.pad(response, (0, 1), value=NO_TOKEN)[:, : int(position.max()) + 1]
    logits, hidden = picked_logits(policy.model, prompt, response, row, position)
    logits = forbid_early_eos(logits, position, policy.eos_token_ids, policy.min_new_tokens, in_place=True)
    return logits, policy.value_head(hidden.to(policy.value_head.weight.dtype)).squeeze(-1)


def shared_texts(texts: NDArray[np.int64], prompt_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the texts that are no prefix of another one.

    In lexicographic order a prefix comes right before a text that it begins, so each text belongs to the end of its
    run of prefixes.

    Args:
        texts: ``(N, P + T)`` int64, -1 where there is no token: the prompt left-padded, then the response.
        prompt_length: P.

    Returns:
        ``(L, P + T)`` those texts, each once, and ``(N,)`` int64, the index of the one that each text begins or is.
    """
    end = prompt_length + (texts[:, prompt_length:] >= 0).sum(axis=1)
    # Big-endian bytes compare as the numbers do; no token is 0 and comes before all.
    words = np.ascontiguousarray((texts + 1).astype(">u4")).view(f"S{4 * texts.shape[1]}").ravel()
    order = words.argsort(kind="stable")
    ordered = texts[order]
    behind = np.arange(texts.shape[1]) >= end[order[:-1], None]
    is_prefix = ((ordered[:-1] == ordered[1:]) | behind).all(axis=1)
    last = np.append(~is_prefix, True)
    row = np.empty(len(texts), dtype=np.int64)
    row[order] = last.cumsum() - last
    return ordered[last], row
