"""A causal language model as the network of an actor-critic library: rows of observations in, logits and values out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_envs.algos.other_libraries.prefix_chains import shared_texts
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP
from lm_envs.env.report import text_envs
from lm_envs.kernels.logprob_kl import scaled
from lm_envs.model.decoding import forbid_early_eos
from lm_envs.model.forwards import picked_logits
from lm_envs.model.tokens import NO_TOKEN


class LMActorCritic(nn.Module):
    """Logits of the next token and the value of the state, for observations of a text environment.

    A library that trains by single transitions hands over states, and those of one episode are prefixes of each other.
    So a batch of states is computed as few texts: a state that begins another one is read off that one's forward. What
    is left is a forward per episode, if the batch holds whole episodes. Without gradients a batch of ``num_envs`` rows
    is taken for a step of the environment, and rows that grew by one token go through a KV cache. Both change the cost
    and nothing else.

    The logits are those of the distribution that is trained: divided by the environment's temperature, and EOS at -inf
    before ``min_new_tokens``. Dropout stays off in train mode too. The value head is linear on the last hidden state
    and starts at zero.

    Args:
        model: any transformers causal LM; it is trained in place.
        mdp: what is played.
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
    def for_env(cls, env: Any, model: PreTrainedModel | None = None) -> LMActorCritic:
        """The network for an environment: wrapped or not, single, vector or a ``SyncVectorEnv``.

        Args:
            model: None takes a copy of the task's own start.

        Raises:
            TypeError: ``env`` holds no text environment.
            ValueError: the bandit face, whose action is a whole response, or a model of another vocabulary.
        """
        inner = text_envs(env)
        if not inner:
            raise TypeError(f"{type(env).__name__} holds no text environment that can be reached")
        if inner[0].face != "mdp":
            raise ValueError("an actor-critic over tokens needs the MDP face: ids that do not end in Bandit-v0")
        if model is None:
            model = copy.deepcopy(inner[0].task.start).requires_grad_(True)
        rows = getattr(inner[0], "num_envs", 1) if len(inner) == 1 else len(inner)
        return cls(model, inner[0].mdp, rows)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate states.

        Args:
            obs: ``(..., P + T)``, whole numbers of any dtype, -1 where there is no token.

        Returns:
            logits ``(..., V)`` and values ``(...)``, float32 or the model's dtype if that is wider.
        """
        rows = obs.reshape(-1, obs.shape[-1]).to(device=self.model.device, dtype=torch.int64)
        if not torch.is_grad_enabled() and len(rows) == self.num_envs:
            logits, value = self.policy.next_logits(rows), self.policy.next_value()
        else:
            logits, value = self._read(rows)
        logits = scaled(logits, self.policy.temperature)
        return logits.reshape(*obs.shape[:-1], -1), value.to(logits.dtype).reshape(obs.shape[:-1])

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, V)`` and values ``(N,)`` of the states, a forward of each text."""
        policy = self.policy
        found = shared_texts(rows.cpu().numpy(), policy.prompt_length)
        texts, row = (torch.as_tensor(x, device=rows.device) for x in found)
        prompt, response = texts[:, : policy.prompt_length], texts[:, policy.prompt_length :]
        position = (rows[:, policy.prompt_length :] >= 0).sum(dim=1)  # how much of its response a state has
        prompt = prompt[:, int(((prompt >= 0).any(dim=0).cumsum(0) == 0).sum()) :]  # columns that are empty in all
        # One column more than the longest: there are states after the last token too.
        response = nn.functional.pad(response, (0, 1), value=NO_TOKEN)[:, : int(position.max()) + 1]
        logits, hidden = picked_logits(policy.model, prompt, response, row, position)
        logits = forbid_early_eos(logits, position, policy.eos_token_ids, policy.min_new_tokens, in_place=True)
        return logits, policy.value_head(hidden.to(policy.value_head.weight.dtype)).squeeze(-1)
