"""Advantage-weighted regression (Peng et al. 2019): an algorithm of your own is one file.

lm-envs compare --task reviews --algorithms ppo examples/awr.py:AWR --out runs/awr

python examples/awr.py CartPole-v1
python examples/awr.py lm_envs/Cat-v0
python examples/awr.py lm_envs/Reviews-v0
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import gymnasium

from lm_envs.algos.engine.agent import Agent, learn
from lm_envs.algos.engine.batching import rewards
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.ops.advantages import gae
from lm_envs.algos.ops.losses import masked_mean, nll, value_loss
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.policies.mlp import MLPPolicy
from lm_envs.algos.registry import make_agent


@dataclass
class AWRConfig(AgentConfig):
    """Settings of AWR."""

    beta: float = 1.0
    """Temperature of the weights exp(A / beta)."""


class AWR(Agent[AWRConfig]):
    """``-exp(A / beta) log pi(a|s)``, weights at most 20, and half the critic's squared error."""

    Config, name = AWRConfig, "awr"

    def prepare(self, traj, before):
        advantage = gae(rewards(traj), before.value, traj.mask, self.config.gamma)
        weight = (advantage / self.config.beta).exp().clamp(max=20)
        return {"weight": weight, "target": advantage + before.value[:, :-1]}

    def loss(self, traj, now, fixed):
        policy = masked_mean(fixed["weight"] * nll(now.logprob, traj.mask), traj.mask)
        critic = masked_mean(value_loss(now.value[:, :-1], fixed["target"], traj.mask), traj.mask)
        return policy + 0.5 * critic, {"policy_loss": policy.detach(), "value_loss": critic.detach()}


CONTROL = {"steps": 1024, "episodes": None, "gamma": 0.98, "epochs": 6, "minibatches": 8, "learning_rate": 1e-3}
SETTINGS = {
    "CartPole-v1": {**CONTROL, "iterations": 97},
    "lm_envs/Cat-v0": {**CONTROL, "iterations": 80, "beta": 0.1},
    "lm_envs/Reviews-v0": {"iterations": 40, "epochs": 4, "minibatches": 2, "learning_rate": 1e-3, "beta": 0.5},
}


def train(env_id: str, iterations: int | None = None, **changes) -> Agent:
    env, text = gymnasium.make_vec(env_id, num_envs=8, vectorization_mode=None), env_id == "lm_envs/Reviews-v0"
    mdp = env.unwrapped.mdp if text else None
    policy = LMPolicy.for_mdp(mdp, copy.deepcopy(mdp.reference).requires_grad_(True)) if text else MLPPolicy(env)
    agent = make_agent(f"{__name__}:AWR", policy, **SETTINGS[env_id] | changes)
    return learn(agent, env, iterations, lambda agent, traj, m: print(m["iteration"], m.get("return"), flush=True))


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "CartPole-v1")
