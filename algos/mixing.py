"""Demonstrations learned from beside sampled episodes: REINFORCE's likelihood term and PPO-ptx."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm_envs.algos.batching import micro_batches, stream, units
from lm_envs.algos.losses import masked_mean, nll, sequence_mean
from lm_envs.trajectories import Trajectories


class Demonstrations:
    """Batches of demonstrations that are a function of the seed and the batch's number alone.

    Args:
        agent: whose they are; its seed orders them.
        data: the demonstrations.
        size: how many per batch.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, agent: Any, data: Trajectories | None, size: int) -> None:
        if data is None or not len(data):
            raise ValueError(
                f"{agent.name} learns from demonstrations beside its samples: pass data=Trajectories, see "
                "sft.demonstrations"
            )
        self.data, self.size, self._seed = data, size, agent.config.seed

    def batch(self, number: int) -> Trajectories:
        """The batch of that number; passes over the data, each in a new order."""
        index = next(stream(len(self.data), self.size, self._seed, number))
        return self.data.select(torch.from_numpy(index))


def check_mixing(name: str, weight: float, size: int) -> None:
    """Raises ValueError for a negative weight or an empty batch."""
    if weight < 0:
        raise ValueError(f"{name} must not be negative, got {weight}")
    if size < 1:
        raise ValueError(f"demonstrations must be at least 1, got {size}")


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
    for rows in micro_batches(data, unit, agent.config.micro_batch):
        part = data if rows is None else data.select(rows)
        share = units(part, unit) / whole
        loss = mean(nll(agent.policy.evaluate(part).logprob, part.mask), part.mask)
        (weight * share * loss).backward()
        total = total + share * loss.detach()
    return total
