"""Value functions other than a head on the policy's trunk."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm_envs.model.tokens import accepted, model_inputs
from lm_envs.reward.learned import LearnedReward, has_independent_labels, pools_last_token, score_of
from lm_envs.tasks.base import TextTask

ValueFrom = Literal["policy", "reward_model"]


class RewardCritic(nn.Module):
    """A separate value function that starts as a copy of a reward model, trunk and head (Ouyang et al. 2022, C.4).

    ``V_t`` is the reward model's score of prompt and response *before* token t, in the reward's units.

    Raises:
        ValueError: the model is no decoder with a linear head, so it has no score before the end.
    """

    def __init__(self, reward: LearnedReward) -> None:
        super().__init__()
        if not pools_last_token(reward.model):
            raise ValueError(
                f"a value function can start only from a decoder with a linear score, and reward model "
                f"{reward.__name__!r} is a {type(reward.model).__name__}"
            )
        if reward.template != "text":
            raise ValueError(f"a value function reads plain text, and reward model {reward.__name__!r} a chat template")
        self.label, self.output = reward.label, reward.output
        self.model = copy.deepcopy(reward.model).eval().requires_grad_(True)
        self.normalise = reward.normalise

    def forward(self, prompt: Tensor, response: Tensor) -> Tensor:
        """``(B, T)`` values of ``prompt (B, P)``, left-padded with -1, and ``response (B, T)``, right-padded."""
        trunk: Any = self.model.base_model
        inputs = model_inputs(torch.cat([prompt, response[:, :-1]], dim=1))
        hidden = trunk(**accepted(trunk, **inputs, use_cache=False)).last_hidden_state[:, -response.shape[1] :]
        independent = has_independent_labels(self.model)
        score = score_of(self.model.score(hidden), self.label, self.output, independent=independent)
        mean, std = self.normalise
        return (score - mean) / std


def value_from_reward_model(policy: Any, task: TextTask | None) -> None:
    """Give a policy a value function that starts as the task's reward model.

    Raises:
        ValueError: the policy or the reward is not of the kind, or the two read different tokens.
    """
    if not policy.takes_critic:
        raise ValueError("value_from='reward_model' is for language-model policies")
    reward = None if task is None else task.reward
    if task is None or not isinstance(reward, LearnedReward):
        raise ValueError("value_from='reward_model' needs a task whose reward is one learned reward model")
    if reward.tokenizer.get_vocab() != task.tokenizer.get_vocab():
        raise ValueError(
            "value_from='reward_model': reward model and policy must share a tokenizer, and theirs differ; "
            "use value_from='policy'"
        )
    critic = RewardCritic(reward)
    policy.critic_of_its_own(critic.to(next(policy.parameters()).device))


def check_value_from(name: str, policy: Any, value_from: ValueFrom) -> None:
    """Raise ValueError where a value function was asked for that the policy does not have."""
    if value_from == "reward_model" and not policy.has_own_critic:
        raise ValueError(
            f"{name}: value_from='reward_model' needs the task: use registry.make_agent(..., task=...), or call "
            "critics.value_from_reward_model(policy, task) first"
        )
