"""The expected gradient of an algorithm's loss, by enumerating all batches or estimated from some."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import Before, units
from lm_envs.env.mdp import kl_penalty
from lm_envs.exact.solver import Exact
from lm_envs.trajectories import Trajectories

MAX_BATCHES = 20_000
_AT_ONCE = 256  # batches per backward pass
_LEAST_BATCHES = 16  # of an estimate: its error comes from how they differ


def expected_gradient(
    agent: Agent[Any], exact: Exact, *, batch: int = 1, same_prompt: bool = True, sampler: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute the mean direction of an algorithm's first step, ``-E[grad loss]`` by parameter.

    The batches are all tuples of ``batch`` episodes, weighted by their probability under the agent's policy; each goes
    through the agent's own ``prepare`` and ``loss``. A loss that is a mean over tokens is weighted by its tokens per
    episode, as in a large batch. So an unbiased algorithm gives the exact policy gradient,
    :meth:`lm_envs.exact.solver.Exact.gradient`, for the policy's own parameters.

    Args:
        agent: its policy fits an MDP; its state (such as a running mean) is the same for every batch.
        exact: the env's solver.
        batch: episodes per batch.
        same_prompt: the episodes share a prompt and are one group; else prompts are independent, and each episode is
            its own group.
        sampler: log-probabilities ``(X, S, V)`` that episodes are drawn from; None takes the policy's.

    Returns:
        tensors by the names of the policy's parameters, zeros where the loss does not reach.

    Raises:
        ValueError: more than :data:`MAX_BATCHES` batches.
    """
    agent.mdp = exact.mdp
    traj, weight = exact.trajectories(exact.table(agent.policy) if sampler is None else sampler)
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
                # p(x) prod p(y|x) with one prompt, prod p(x) p(y|x) with independent ones
                yield index, float(weight[index].prod()) * (prompts ** (batch - 1) if same_prompt else 1)

    by_token = asdict(agent.config).get("loss_mean", agent.unit) in ("token", "minibatch")
    tensors, values = agent.extra_state()
    agent.policy.zero_grad(set_to_none=True)
    total, held = torch.zeros((), dtype=torch.float64), 0
    for index, probability in batches():
        part = traj.select(index)
        part.group = torch.zeros(batch, dtype=torch.int64) if same_prompt else torch.arange(batch)
        if (rows := agent.select(part)) is not None:
            part = part.select(rows)
        if not len(part):
            continue
        agent.restore_extra(tensors, values)
        with torch.no_grad():
            fixed = agent.prepare(part, Before(agent.policy, part))
        loss = agent.loss(part, agent.policy.evaluate(part), fixed)[0]
        tokens = units(part, "token") / len(part) if by_token else 1.0
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


def first_gradient(agent: Agent[Any], traj: Trajectories) -> dict[str, Tensor]:
    """Compute the gradient of an update's first Adam step, which is not taken, by the names of the policy's parameters;
    zeros where the loss does not reach."""
    optimizer, done = agent.optimizer, agent.iterations_done
    agent.optimizer = _Recorder()  # type: ignore[assignment]
    agent.policy.zero_grad(set_to_none=True)
    try:
        with suppress(_Taken):
            agent.update(traj)
        named = {name: p for name, p in agent.policy.named_parameters() if p.requires_grad}
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}
    finally:
        agent.optimizer, agent.iterations_done = optimizer, done
        agent.policy.zero_grad(set_to_none=True)


def sampled_cosine(
    agent: Agent[Any], exact: Exact, *, episodes: int = 2**16, bandit: bool = False, seed: int = 0
) -> tuple[float, float]:
    """Estimate the cosine between the mean direction of an algorithm's first Adam step and the exact policy gradient,
    from batches of the algorithm's own size.

    Each batch goes through the agent's own ``update`` up to its first step, which is not taken; one minibatch is the
    whole batch. With ``g_k`` the gradients of K batches and ``G`` the exact one, the estimate is
    ``mean_k g_k.G / (|G| sqrt(mean_{k != l} g_k.g_l))``: products of different batches, so that noise does not make it
    smaller; it can exceed 1. Only parameters that ``J`` depends on are compared.

    Args:
        agent: fresh, its policy a table for an MDP or a bandit env; it is left as it was.
        exact: the env's solver; its coefficient is that of ``G``, and the agent's where the agent has none.
        episodes: approximate total, at least 16 batches.
        bandit: a response is one action.
        seed: decides the batches.

    Returns:
        the cosine and its standard error, from differences between batches; NaN where noise hides the direction.
    """
    config, policy, agent.mdp = agent.config, agent.policy, exact.mdp
    if policy.reward_tokens:
        policy.condition_on(policy.reward_tokens - 1)  # what it samples from later
    target = exact.gradient(policy)
    flat = torch.cat([g.flatten() for g in target.values()])
    coef = next(c for c in (config.kl_coef, agent.published_kl_coef, exact.kl_coef) if c is not None)
    traj, weight = exact.trajectories(policy.log_probs().detach())
    assert traj.reward is not None and traj.ref_logprob is not None and traj.logprob is not None
    charged = coef if agent.kl_in_reward else 0.0
    traj.reward = traj.reward - kl_penalty(charged - exact.kl_coef, traj.logprob, traj.ref_logprob)
    size = config.episodes
    assert size is not None and traj.group is not None
    generator = torch.Generator().manual_seed(seed)
    prompts = len(exact.prompts)
    # A prompt's rows are consecutive and prompts are equally likely, so draws from one are inverted in its share.
    upto = weight.cumsum(dim=0)
    tensors, values = agent.extra_state()
    agent.config = replace(config, minibatches=1, kl_coef=coef)
    found = []
    try:
        for _ in range(max(_LEAST_BATCHES, episodes // size)):
            asked = torch.randint(prompts, (size // config.group_size,), generator=generator)
            asked = asked.repeat_interleave(config.group_size)
            drawn = (asked + torch.rand(len(asked), dtype=torch.float64, generator=generator)) / prompts
            part = traj.select(torch.searchsorted(upto, drawn).clamp(max=len(traj) - 1))
            part.group = torch.arange(len(asked)) // config.group_size
            agent.restore_extra(tensors, values)
            grads = first_gradient(agent, _as_bandit(part, exact.mdp.eos_token_id) if bandit else part)
            found.append(torch.cat([-grads[name].flatten() for name in target]) * (flat != 0))
    finally:
        agent.config = config
        agent.restore_extra(tensors, values)
    return jackknifed_cosine(torch.stack(found), flat)


def jackknifed_cosine(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Cosine of ``exact (D,)`` and ``E[g]``, with independent samples ``found (K, D)`` of g, and its standard error;
    see :func:`sampled_cosine`."""
    count, total = len(found), found.sum(dim=0)
    along, own = found @ (exact / exact.norm()), (found**2).sum(dim=1)

    def cosine_of(along: Tensor, pairs: Tensor, count: int) -> Tensor:
        return (along / count) / (pairs / (count * (count - 1))).sqrt()  # NaN where the pairs are negative

    whole = cosine_of(along.sum(), total @ total - own.sum(), count)
    others = (total @ total - 2 * found @ total + own) - (own.sum() - own)
    each = cosine_of(along.sum() - along, others, count - 1)
    jackknife = ((each - each.mean()) ** 2).sum() * (count - 1) / count
    # Noise times noise, 2 tr(Sigma^2) / (K (K - 1)) in the mean of products: the jackknife counts it twice on average,
    # and as hardly anything where the noise of the mean happens to be small.
    rest = (found - total / count) @ (found - total / count).T
    squares = ((rest**2).sum() - (rest.diagonal() ** 2).sum()) / (count * (count - 1))
    products = (total @ total - own.sum()) / (count * (count - 1))
    quadratic = (whole / (2 * products)) ** 2 * 2 * squares / (count * (count - 1))
    return float(whole), float(torch.maximum(jackknife - quadratic, quadratic).sqrt())


class _Taken(Exception):
    """An Adam step was due."""


class _Recorder:
    """A stand-in for the optimizer that leaves the gradients as they are."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{}]
        self.state: dict[Any, Any] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: gradients were cleared before the batch."""

    def step(self) -> None:
        """End the update."""
        raise _Taken


def _as_bandit(traj: Trajectories, eos_token_id: int) -> Trajectories:
    """MDP episodes as bandit episodes: one action, the whole response."""
    assert traj.response is not None and traj.reward is not None
    assert traj.logprob is not None and traj.ref_logprob is not None
    response = traj.response
    return replace(
        traj,
        obs=traj.prompt,
        actions=torch.where(response < 0, eos_token_id, response).unsqueeze(1),
        mask=torch.ones(len(response), 1, dtype=torch.bool),
        reward=traj.reward.sum(dim=1, keepdim=True),
        logprob=traj.logprob.sum(dim=1, keepdim=True),
        ref_logprob=traj.ref_logprob.sum(dim=1, keepdim=True),
    )
