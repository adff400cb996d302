"""The cost of a method, by one definition for all of them: see docs/costs.md."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from lm_envs.algos.engine.agent import Agent
from lm_envs.reward.base import leaves
from lm_envs.reward.learned import LearnedReward
from lm_envs.tasks.base import TextTask
from lm_envs.trajectories import Trajectories

_GIVEN = ("comparisons", "given_tokens", "given_episodes")
COLUMNS = ("tokens_generated", "reward_calls", "scored_tokens", *_GIVEN, "episodes", "trained_tokens")


def of_preferences(data: Any) -> Counter[str]:
    """The cost of ranked responses, of which K are ``K (K - 1) / 2`` comparisons; nothing for other data."""
    if not isinstance(data, Trajectories) or data.rank is None:
        return Counter()
    assert data.group is not None
    sizes = torch.unique(data.group, return_counts=True)[1]
    tokens = int(data.response_lengths.sum())
    return Counter(comparisons=int((sizes * (sizes - 1) // 2).sum()), given_episodes=len(data), given_tokens=tokens)


def of_reward(task: TextTask) -> Counter[str]:
    """The cost of the comparisons, if there are any, that a task's own reward model was trained on."""
    if not any(isinstance(part, LearnedReward) for part in leaves(task.reward)):
        return Counter()
    tokens = sum(len(first) + len(second) for _, first, second in task.pairs)
    return Counter(comparisons=len(task.pairs), given_episodes=2 * len(task.pairs), given_tokens=tokens)


def total(agent: Agent[Any] | None, given: Mapping[str, int], measured: Mapping[str, Any]) -> dict[str, int]:
    """The cost of a run.

    Args:
        agent: the one that trained, if any.
        given: the cost of its data, see :func:`of_preferences` and :func:`of_reward`.
        measured: with ``inference_tokens``, ``inference_episodes``, ``inference_reward_calls`` and, for a policy that
            the reward chooses for, ``inference_scored_tokens``.
    """
    spent = Counter(given) + Counter(
        tokens_generated=measured["inference_tokens"],
        episodes=measured["inference_episodes"],
        reward_calls=measured["inference_reward_calls"],
        scored_tokens=measured.get("inference_scored_tokens", 0),
    )
    if agent is not None:
        text = agent.policy.sequence_obs
        spent += Counter(  # on control a token and a reward call are an env step
            tokens_generated=agent.tokens_done if text else agent.steps_done,
            reward_calls=agent.reward_calls if text else agent.steps_done,
            episodes=agent.samples_done,
            scored_tokens=agent.scored_tokens,
            comparisons=agent.comparisons_done,
            trained_tokens=agent.trained_tokens,
        )
    return {name: spent[name] for name in COLUMNS}
