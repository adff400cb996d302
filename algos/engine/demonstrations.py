"""Demonstrations learned from beside sampled episodes: REINFORCE's likelihood term and PPO-ptx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_envs.algos.engine.batching import micro_batches, select, units
from lm_envs.algos.ops.losses import masked_mean, nll, sequence_mean
from lm_envs.training import stream
from lm_envs.trajectories import Trajectories, demonstrations, from_responses

if TYPE_CHECKING:
    from lm_envs.tasks.base import TextTask


class Demonstrations:
    """Batches of demonstrations that are a function of the seed and the batch's number alone.

    Args:
        agent: whose they are; its seed orders them.
        data: the demonstrations.
        weight: of their likelihood; 0 takes none.
        size: how many per batch.

    Raises:
        ValueError: there is a weight and no data, or data and no weight.
    """

    def __init__(self, agent: Any, data: Trajectories | None, weight: float, size: int) -> None:
        if weight and (data is None or not len(data)):
            raise ValueError(
                f"{agent.name} learns from demonstrations beside its samples: pass data=Trajectories, see "
                "lm_envs.trajectories.demonstrations"
            )
        if data is not None and not weight:
            raise ValueError(f"{agent.name} was given demonstrations and their weight is 0: it would ignore them")
        self.data, self.weight, self.size, self._seed = data, weight, size, agent.config.seed

    def mixture(self, step: int) -> tuple[float, Trajectories] | None:
        """The weight and the batch of that number, of passes over the data, each in a new order; None without data."""
        if self.data is None:
            return None
        index = next(stream(len(self.data), self.size, self._seed, step))
        return self.weight, self.data.select(torch.from_numpy(index))


def add_nll_gradient(agent: Any, weight: float, data: Trajectories) -> Tensor:
    """Adds to the policy's ``.grad`` the gradient of ``weight`` times the mean of ``-log pi`` over the agent's
    unit: over tokens, or over rows of sums over tokens.

    Micro-batches as in the rest of the batch: the gradient does not depend on their size (law 8).

    Returns:
        the mean, without the weight.
    """
    parameter = next(agent.policy.parameters())
    data = data.to(parameter.device)
    unit = "token" if agent.unit == "token" else "sequence"
    mean = masked_mean if unit == "token" else sequence_mean
    whole, total = units(data, unit), torch.zeros((), device=parameter.device)
    for rows in micro_batches(data, unit, agent.config.micro_batch, agent.forward_cost):
        part = data if rows is None else select(data, {}, rows)[0]
        share = units(part, unit) / whole
        loss = mean(nll(agent.policy.evaluate(part).logprob, part.mask), part.mask)
        (weight * share * loss).backward()
        total = total + share * loss.detach()
    return total


def demonstrations_of(task: TextTask) -> Trajectories | None:
    """A task's demonstrations: its pairs, else its texts that go on behind the longest prompt; None without any."""
    if task.responses:
        prompts, responses = zip(*task.responses, strict=True)
        return from_responses(prompts, [row[: task.max_new_tokens] for row in responses], task.prompt_length)
    texts = [text for text in task.demonstrations if len(text) > task.prompt_length]
    return demonstrations(texts, task.prompt_length, task.max_new_tokens) if texts else None
