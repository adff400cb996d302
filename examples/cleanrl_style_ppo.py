"""PPO in one file, in the style of CleanRL (Huang et al. 2022), on text and on control.

    python examples/cleanrl_style_ppo.py                                  # Reviews, about a minute on one core
    python examples/cleanrl_style_ppo.py --env-id CartPole-v1 --gamma 0.99 --total-timesteps 100000

Only the env's id, the network and one call, `lm_envs.report`, concern language. The reward includes the KL penalty
`kl_coef * (log pi_ref - log pi)`. The env computes `log pi_ref`, which depends only on state and action, but it cannot
know the agent's `log pi`, so the agent reports it before each step. Without that line everything runs with a warning,
but the penalty is only `kl_coef * log pi_ref`, which has another optimum (docs/exact.md).

As in CleanRL's recurrent agents, a minibatch consists of whole rows of the batch: the states of an episode share their
beginning, which the network computes once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch import nn
from torch.distributions import Categorical

import lm_envs
from lm_envs.algos.other_libraries.network import LMActorCritic
from lm_envs.benchmarks.measure.samples import measure


@dataclass
class Args:
    env_id: str = "lm_envs/Reviews-v0"
    """Any Gymnasium id with discrete actions; text ids get a language model, others an MLP."""
    seed: int = 0
    """Of the env, the actions and the initial weights."""
    total_timesteps: int = 61440
    """Actions, over all rows."""
    num_envs: int = 64
    """Rows that step together."""
    num_steps: int = 24
    """Steps of each row between updates."""
    learning_rate: float = 7e-4
    """Adam's step size at the start; it falls linearly to 0."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation."""
    update_epochs: int = 3
    """Passes over each batch."""
    num_minibatches: int = 2
    """Adam steps per pass."""
    clip_coef: float = 0.2
    """Distance of the ratio to the sampling policy from 1 beyond which it is clipped."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    max_grad_norm: float = 1.0
    """The gradient's norm is clipped to this."""
    eval_prompts: int = 512
    """Test prompts that the language model is judged on at the end."""


class MLPActorCritic(nn.Module):
    """The network for control: two tanh layers each for logits and value."""

    def __init__(self, envs):
        super().__init__()
        inputs, actions = int(np.prod(envs.single_observation_space.shape)), int(envs.single_action_space.n)
        self.actor, self.critic = self.layers(inputs, actions, 0.01), self.layers(inputs, 1, 1.0)

    @staticmethod
    def layers(inputs, outputs, gain):
        sizes = [(inputs, 64, 2**0.5), (64, 64, 2**0.5), (64, outputs, gain)]
        made = [nn.Linear(a, b) for a, b, _ in sizes]
        for layer, (_, _, scale) in zip(made, sizes, strict=True):
            nn.init.orthogonal_(layer.weight, scale)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(made[0], nn.Tanh(), made[1], nn.Tanh(), made[2])

    def forward(self, obs):
        x = obs.float().flatten(start_dim=obs.ndim - 1)
        return self.actor(x), self.critic(x).squeeze(-1)


def main(args: Args) -> dict[str, float]:
    """Train; the figures of the last update, and on text those of the test prompts."""
    torch.manual_seed(args.seed)
    envs = RecordEpisodeStatistics(gymnasium.make_vec(args.env_id, num_envs=args.num_envs))
    text = bool(lm_envs.env.report.text_envs(envs))
    network = LMActorCritic.for_env(envs) if text else MLPActorCritic(envs)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate, eps=1e-5)
    # In this mode the step after an episode's end only returns the next episode's first observation.
    wasted_step = envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(shape + envs.single_observation_space.shape, dtype=torch.as_tensor(envs.reset()[0]).dtype)
    actions = torch.zeros(shape, dtype=torch.int64)
    logprobs, rewards, values = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    dones, real = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)

    next_obs = torch.as_tensor(envs.reset(seed=args.seed)[0])
    next_done = torch.zeros(args.num_envs)
    batch = args.num_envs * args.num_steps
    updates, start, figures = args.total_timesteps // batch, time.process_time(), {}
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - update / updates)

        for step in range(args.num_steps):
            obs[step], dones[step], real[step] = next_obs, next_done, ~(next_done.bool() & wasted_step)
            with torch.no_grad():
                logits, values[step] = network(next_obs)
                distribution = Categorical(logits=logits)
                actions[step] = distribution.sample()
                logprobs[step] = distribution.log_prob(actions[step])
            if text:
                lm_envs.report(envs, logprobs[step].numpy())
            found, reward, terminated, truncated, _ = envs.step(actions[step].numpy())
            rewards[step] = torch.as_tensor(reward)
            next_obs, next_done = torch.as_tensor(found), torch.as_tensor(terminated | truncated).float()

        with torch.no_grad():
            value, done, advantage = network(next_obs)[1], next_done, torch.zeros(args.num_envs)
            advantages = torch.zeros(shape)
            for step in reversed(range(args.num_steps)):
                delta = rewards[step] + args.gamma * value * (1 - done) - values[step]
                advantage = delta + args.gamma * args.gae_lambda * (1 - done) * advantage
                advantages[step], value, done = advantage, values[step], dones[step]
            targets = advantages + values

        for _ in range(args.update_epochs):
            for rows in torch.randperm(args.num_envs).chunk(args.num_minibatches):
                mask = real[:, rows]
                logits, value = network(obs[:, rows])
                distribution = Categorical(logits=logits)
                ratio = (distribution.log_prob(actions[:, rows]) - logprobs[:, rows]).exp()[mask]
                gain = advantages[:, rows][mask]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(gain * ratio, gain * clipped).mean()
                old, target = values[:, rows][mask], targets[:, rows][mask]
                moved = old + (value[mask] - old).clamp(-args.clip_coef, args.clip_coef)
                value_loss = 0.5 * torch.max((value[mask] - target) ** 2, (moved - target) ** 2).mean()
                entropy = distribution.entropy()[mask].mean()
                loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                optimizer.step()

        last = envs.return_queue  # of the last 100 episodes
        figures = {"return": float(np.mean(last)) if last else float("nan"), "episodes": envs.episode_count}
        clipped_share = float(((ratio - 1).abs() > args.clip_coef).float().mean())
        print(
            f"{(update + 1) * batch:7d} steps  return {figures['return']:7.2f}  clipped {clipped_share:.2f}", flush=True
        )

    figures["cpu_seconds"] = time.process_time() - start
    if text:
        figures |= measure(network.model, envs.unwrapped.task, prompts=args.eval_prompts)
    print({name: round(value, 3) for name, value in figures.items()})
    return figures


if __name__ == "__main__":
    main(tyro.cli(Args))
