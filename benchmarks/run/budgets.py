"""The budget of a run: how much of it is spent, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm_envs.benchmarks.run.suites import Plan

MOST = 2**31 - 1  # iterations of a run that another budget ends
LEAST_POINTS = 4  # of a learning curve, where it has any: some algorithms take few, large iterations


@dataclass(frozen=True)
class Budget:
    """The amount of training that a plan gives an agent."""

    plan: Plan
    agent: Any

    def spent(self, wall_s: float) -> float | None:
        """Return the share that is spent of a budget other than iterations, None without one.

        Args:
            wall_s: seconds of training so far.
        """
        agent = self.agent
        if self.plan.spending is None or agent.config.iterations < MOST:
            return None
        kind, amount = self.plan.spending
        weights = sum(p.numel() for p in agent.policy.parameters() if p.requires_grad)
        sampled = agent.tokens_done if agent.policy.sequence_obs else agent.steps_done
        spent = {
            "tokens": sampled,
            "total_tokens": sampled + agent.scored_tokens,
            "reward_calls": agent.reward_calls,
            "flops": 6 * weights * agent.trained_tokens,
            "seconds": wall_s,
        }
        return float(spent[kind] / amount)

    def over(self, wall_s: float) -> bool:
        """Return whether nothing is left of it."""
        spent = self.spent(wall_s)
        return self.agent.iterations_done >= self.agent.config.iterations if spent is None else spent >= 1

    def total(self, wall_s: float) -> int:
        """Return the iterations of the run; where another budget ends it, as many as its share so far suggests."""
        spent, done = self.spent(wall_s), self.agent.iterations_done
        if spent is None:
            return int(self.agent.config.iterations)
        return max(done, round(done / spent)) if spent else max(done, 1)
