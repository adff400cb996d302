"""The expected gradient of an algorithm's loss, by going through every batch it could sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lm_envs.algos.agent import Agent
from lm_envs.algos.batching import Before, units
from lm_envs.exact import Exact

MAX_BATCHES = 20_000
_AT_ONCE = 256  # batches per backward pass


def expected_gradient(
    agent: Agent[Any], exact: Exact, *, batch: int = 1, same_prompt: bool = True
) -> dict[str, Tensor]:
    """The direction in which an algorithm's first step goes on average, ``-E[grad loss]`` by parameter.

    The batches are all tuples of ``batch`` episodes, each with its probability under the agent's policy; every one
    goes through the agent's own ``prepare`` and ``loss``. A loss that is a mean over tokens counts by its tokens per
    episode: a mean over a fixed number of them, as over a large batch, and not over those of this batch. So an
    unbiased algorithm gives the exact policy gradient, :meth:`lm_envs.exact.Exact.gradient`, for the policy's own
    parameters (a critic's loss adds its own gradient for the critic's).

    Args:
        agent: its policy on the MDP face; its state (such as a running mean) is the same for every batch.
        exact: of the environment.
        batch: episodes per batch.
        same_prompt: they share a prompt and are one group; else their prompts are independent, each episode its own
            group.

    Returns:
        tensors by the names of the policy's parameters, zeros where the loss does not reach.

    Raises:
        ValueError: more than :data:`MAX_BATCHES` batches.
    """
    traj, weight = exact.trajectories(exact.table(agent.policy))
    assert traj.group is not None
    prompts = len(exact.prompts)
    sizes = torch.bincount(traj.group, minlength=prompts).tolist()
    count = sum(size**batch for size in sizes) if same_prompt else len(traj) ** batch
    if count > MAX_BATCHES:
        raise ValueError(
            f"{count:,} batches of {batch} episodes are more than the {MAX_BATCHES:,} that are enumerated: "
            "use a smaller environment or batch"
        )

    def batches() -> Iterator[tuple[Tensor, float]]:
        rows = torch.arange(len(traj))
        parts = [rows[traj.group == x] for x in range(prompts)] if same_prompt else [rows]
        for part in parts:
            for chosen in itertools.product(part.tolist(), repeat=batch):
                index = torch.tensor(chosen)
                # Of one prompt: p(x) prod p(y|x); independent: prod p(x) p(y|x).
                yield index, float(weight[index].prod()) * (prompts ** (batch - 1) if same_prompt else 1)

    tensors, values = agent.extra_state()
    agent.policy.zero_grad(set_to_none=True)
    total, held = torch.zeros((), dtype=torch.float64), 0
    for index, probability in batches():
        part = traj.select(index)
        part.group = torch.zeros(batch, dtype=torch.int64) if same_prompt else torch.arange(batch)
        agent.restore_extra(tensors, values)
        with torch.no_grad():
            fixed = agent.prepare(part, Before(agent.policy, part))
        loss = agent.loss(part, agent.policy.evaluate(part), fixed)[0]
        tokens = units(part, "token") / batch if agent.unit == "token" else 1.0
        total, held = total + probability * tokens * loss, held + 1
        if held == _AT_ONCE:
            total.backward()
            total, held = torch.zeros((), dtype=torch.float64), 0
    if held:
        total.backward()
    agent.restore_extra(tensors, values)
    found = {
        name: torch.zeros_like(p) if p.grad is None else -p.grad
        for name, p in agent.policy.named_parameters()
        if p.requires_grad
    }
    agent.policy.zero_grad(set_to_none=True)
    return found
