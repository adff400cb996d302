"""Quark: learn responses conditioned on a reward token, and sample conditioned on the best one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import episode_value
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.policy_gradient import reference_policy
from lm_envs.algos.ops.losses import kl_estimate, masked_mean, nll
from lm_envs.algos.policies.reward_tokens import prepend, without_tokens
from lm_envs.env.report import text_envs
from lm_envs.settings import Count, Finite, Rate, Several, Size
from lm_envs.trajectories import Trajectories

_DRAW = 2**31  # separates the draw from the pool from the order of minibatches


@dataclass
class QuarkConfig(AgentConfig):
    """Settings of :class:`Quark`; the defaults are for a small language model."""

    whole_episodes = True

    learning_rate: Rate = 1e-3
    minibatches: Count = 8
    """Adam steps per pass. The meaning of reward tokens is learned slowly: few steps per batch leave them alike."""
    quantiles: Several = 5
    """K, the number of quantiles of the pool and of reward tokens."""
    best_only: bool = False
    """Learn only from the best quantile (AlpacaFarm's form) instead of from the whole pool."""
    pool: Size | None = None
    """Number of newest episodes that the pool keeps. None keeps all."""
    learn_episodes: Size | None = 512
    """Maximum number of episodes drawn from the pool per iteration. None uses the number of sampled episodes."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""


class Quark(Agent[QuarkConfig]):
    """``-log pi(y|r_k, x) + kl_coef * KL(pi || ref) - entropy_coef * H``, means over tokens (Lu et al. 2022, "Quark:
    controllable text generation with reinforced unlearning", section 2).

    All samples go into a pool, which is split into K quantiles of the score. An episode of the k-th quantile is learned
    with the k-th reward token before its prompt. Sampling uses the best token, or none before the first update, when
    the policy is the reference. The KL is over the whole vocabulary at each state; the reference reads the prompt
    without the token. ``best_only`` is AlpacaFarm's form (Dubois et al. 2023). Text only: control has no prompts.
    """

    Config = QuarkConfig
    name = "quark"
    unit = "token"
    kl_in_reward = False
    published_kl_coef = 0.05

    def __init__(self, policy: Any, config: QuarkConfig | None = None) -> None:
        config = QuarkConfig() if config is None else config
        policy.add_reward_tokens(config.quantiles)  # first, so that Adam sees them
        super().__init__(policy, config)
        self._pool: Trajectories | None = None

    def settle_kl_coef(self, env: Any) -> float | None:
        if self.reference is None and text_envs(env):
            self.reference = reference_policy(env)
        return super().settle_kl_coef(env)

    def update(self, traj: Trajectories) -> dict[str, float]:
        config, fresh = self.config, poolable(traj)
        pool = fresh if self._pool is None else Trajectories.concatenate([self._pool, fresh])
        self._pool = pool = pool if config.pool is None else pool.select(slice(-config.pool, None))
        assert pool.score is not None and pool.prompt is not None
        quantile = quantiles(pool.score, config.quantiles)
        candidates = (quantile == config.quantiles - 1).nonzero().squeeze(1) if config.best_only else None
        count = len(pool) if candidates is None else len(candidates)
        rng = np.random.default_rng((config.seed, self.iterations_done, _DRAW))
        index = torch.from_numpy(rng.permutation(count)[: config.learn_episodes or len(traj)])
        index = index if candidates is None else candidates[index]
        drawn = pool.select(index)
        drawn.prompt = prepend(pool.prompt[index], self.policy.vocabulary + quantile[index])
        best = pool.score[quantile == config.quantiles - 1]
        metrics = {"pool": len(pool), "best_quantile_score": float(best.mean())}
        metrics |= super().update(drawn)
        self.policy.condition_on(config.quantiles - 1)
        return metrics

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        mask, coef = traj.mask, self.kl_coefficient()
        likelihood = masked_mean(nll(now.logprob, mask), mask)
        entropy = masked_mean(now.entropy, mask)
        loss = likelihood - self.config.entropy_coef * entropy
        metrics: dict[str, Metric] = {"nll": likelihood.detach(), "entropy": entropy.detach()}
        if coef:
            if self.reference is None:
                raise ValueError("quark: the KL needs a reference, but there was no env yet: set .reference")
            assert traj.prompt is not None
            plain = traj.select(slice(None))
            plain.prompt = without_tokens(traj.prompt, self.policy.vocabulary)
            with torch.no_grad():
                reference = self.reference.evaluate(plain).log_probs()
            kl = masked_mean(kl_estimate("full", now.log_probs(), reference, mask), mask)
            loss, metrics["token_kl"] = loss + coef * kl, kl.detach()
        return loss, metrics

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        pool = self._pool
        if pool is None:
            return {}, {}
        assert pool.prompt is not None and pool.response is not None and pool.score is not None
        return {"prompt": pool.prompt, "response": pool.response, "score": pool.score}, {}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self._pool = pool_of(tensors["prompt"], tensors["response"], tensors["score"]) if tensors else None


def poolable(traj: Trajectories) -> Trajectories:
    """Return the prompts, responses and scores of a batch, from an MDP or a bandit env, for the pool."""
    score = episode_value(traj)
    if traj.prompt is None or traj.response is None:
        raise ValueError("quark learns from text, but these trajectories have no prompts")
    return pool_of(traj.prompt, traj.response, score)


def pool_of(prompt: Tensor, response: Tensor, score: Tensor) -> Trajectories:
    """Return episodes of tokens, on the CPU."""
    prompt, response, score = (x.detach().cpu().clone() for x in (prompt, response, score))
    ended = torch.ones(len(response), dtype=torch.bool)
    text = {"prompt": prompt, "response": response, "score": score}
    return Trajectories(response.clamp(min=0), response >= 0, terminated=ended, truncated=~ended, **text)


def quantiles(score: Tensor, count: int) -> Tensor:
    """Return ``(N,)`` int64, the quantile of each of ``score (N,)`` among ``count``, 0 the lowest; of equal scores the
    later ranks higher."""
    order = torch.argsort(score, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(score))
    return place * count // len(score)
