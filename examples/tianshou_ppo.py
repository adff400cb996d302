"""Tianshou's PPO on text, with its collector, buffer, policy class, algorithm and trainer unchanged.

    python examples/tianshou_ppo.py                             # Reviews, about two minutes on one core

Three classes connect Tianshou with a text env:

- `TextRows`: Tianshou steps a list of single envs in turn (`DummyVectorEnv`), which also works here, at one forward of
  the reference per row. `TextRows` gives Tianshou the text vector env instead, with one forward for all rows.
- `LMActor` and `LMCritic`: Tianshou calls actor and critic separately; one forward serves both.
- `ReportingPolicy`: the exact KL penalty needs the log-probability of each token. The collector calls the policy in
  eval mode and then steps the env with its actions, so the policy reports there.

`batch_size=None` makes the minibatch the whole batch: Tianshou's minibatches are single transitions in random order,
each of which would recompute the beginnings of nearly all episodes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
import tyro
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
from tianshou.data import Collector, CollectStats, VectorReplayBuffer
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import ActionReprNet
from torch import nn

import lm_envs
from lm_envs.algos.other_libraries.network import LMActorCritic
from lm_envs.benchmarks.measure.samples import measure


@dataclass
class Args:
    env_id: str = "lm_envs/Reviews-v0"
    """A text environment."""
    seed: int = 0
    """Of the env and of the sampled actions."""
    total_steps: int = 61440
    """Tokens, over all rows."""
    num_envs: int = 64
    """Rows that step together."""
    num_steps: int = 24
    """Steps of each row between updates."""
    learning_rate: float = 7e-4
    """Adam's step size at the start; it falls linearly to 0."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation."""
    epochs: int = 4
    """Adam steps per batch."""
    clip: float = 0.2
    """Distance of the ratio to the sampling policy from 1 beyond which it is clipped."""
    critic_coef: float = 0.05
    """Weight of the value loss."""
    eval_prompts: int = 512
    """Test prompts that the language model is judged on at the end."""


class TextRows:
    """Our vector env as Tianshou's: rows are reset when it says so, and infos are one dict per row."""

    is_async = False

    def __init__(self, envs):
        self.envs = envs
        self.action_space = [envs.single_action_space] * envs.num_envs

    def __len__(self):
        return self.envs.num_envs

    def reset(self, env_id=None, seed=None):
        rows = np.arange(len(self)) if env_id is None else np.asarray(env_id)
        chosen = np.isin(np.arange(len(self)), rows)
        obs, _ = self.envs.reset(seed=seed, options={"reset_mask": chosen})
        return obs[rows], np.array([{} for _ in rows])

    def step(self, action, id=None):
        if id is not None and len(id) != len(self):
            raise ValueError("the rows step together: collect by n_step, not by n_episode")
        obs, reward, terminated, truncated, _ = self.envs.step(np.asarray(action))
        return obs, reward, terminated, truncated, np.array([{"env_id": row} for row in range(len(self))])

    def close(self):
        self.envs.close()


class LMActor(ActionReprNet):
    """Logits; what the same forward knew of the value is kept for the critic."""

    def __init__(self, network):
        super().__init__()
        self.network, self.last = network, (None, None)

    def forward(self, obs, state=None, info=None):
        logits, value = self.network(torch.as_tensor(obs))
        self.last = (obs, value)
        return logits, state


class LMCritic(nn.Module):
    """The value: of the batch that the actor has just seen, or by a forward of its own."""

    def __init__(self, actor):
        super().__init__()
        self.actor = actor

    def forward(self, obs):
        seen, value = self.actor.last
        return value if seen is obs and torch.is_grad_enabled() else self.actor.network(torch.as_tensor(obs))[1]


class ReportingPolicy(DiscreteActorPolicy):
    """Tianshou's policy, which tells the env how likely the tokens were that it is about to be stepped with."""

    envs = None

    def forward(self, batch, state=None):
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            chosen = super().forward(batch, state)
        if not self.training:
            lm_envs.report(self.envs, chosen.dist.log_prob(chosen.act).numpy())
        return chosen


def main(args: Args) -> dict[str, float]:
    """Train; what :func:`lm_envs.benchmarks.measure.samples.measure` says of the language model."""
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002 - Tianshou shuffles with the global generator
    envs = gymnasium.make_vec(args.env_id, num_envs=args.num_envs, autoreset_mode="Disabled")
    network = LMActorCritic.for_env(envs)
    actor = LMActor(network)
    policy = ReportingPolicy(
        actor=actor, action_space=envs.single_action_space, observation_space=envs.single_observation_space
    )
    policy.envs = envs
    batch = args.num_envs * args.num_steps
    updates = args.total_steps // batch
    optimizer = AdamOptimizerFactory(lr=args.learning_rate, eps=1e-5)
    optimizer.with_lr_scheduler_factory(LRSchedulerFactoryLinear(1, updates * batch, batch))
    algorithm = PPO(
        policy=policy,
        critic=LMCritic(actor),
        optim=optimizer,
        gamma=1.0,
        gae_lambda=args.gae_lambda,
        eps_clip=args.clip,
        value_clip=True,
        vf_coef=args.critic_coef,
        ent_coef=0.0,
        max_grad_norm=1.0,
        max_batchsize=batch,
    )
    collector = Collector[CollectStats](algorithm, TextRows(envs), VectorReplayBuffer(batch, args.num_envs))
    collector.reset(gym_reset_kwargs={"seed": args.seed})
    start = time.process_time()
    algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=updates * batch,
            collection_step_num_env_steps=batch,
            update_step_num_repetitions=args.epochs,
            batch_size=None,
            show_progress=False,
            verbose=False,
        )
    )
    figures = {"cpu_seconds": time.process_time() - start}
    figures |= measure(network.model, envs.unwrapped.task, prompts=args.eval_prompts)
    print({name: round(value, 3) for name, value in figures.items()})
    return figures


if __name__ == "__main__":
    main(tyro.cli(Args))
