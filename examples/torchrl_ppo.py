"""TorchRL's PPO on text, with its GymWrapper, collector, advantages, loss and distribution unchanged.

    python examples/torchrl_ppo.py                              # Reviews, about two minutes on one core

`GymWrapper` turns a text vector env into a TorchRL env: it reads its spaces, its same-step reset and the last
observation of an episode. The network is the language model. The exact KL penalty also needs the log-probability of
each token (`lm_envs.report`). In TorchRL a policy is a chain of modules on a TensorDict, so reporting is a last module,
which reads the "action_log_prob" that the actor has just written. Only the collector's chain has it; the loss uses the
actor.

A minibatch consists of whole rows of the batch, not single transitions: the states of an episode share their beginning,
which the network computes once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gymnasium
import torch
import tyro
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import lm_envs
from lm_envs.algos.other_libraries.network import LMActorCritic
from lm_envs.benchmarks.measure.samples import measure


@dataclass
class Args:
    env_id: str = "lm_envs/Reviews-v0"
    """A text environment."""
    seed: int = 0
    """Of the env and of the sampled actions."""
    total_frames: int = 61440
    """Tokens, over all rows."""
    num_envs: int = 64
    """Rows that step together."""
    num_steps: int = 24
    """Steps of each row between updates."""
    learning_rate: float = 7e-4
    """Adam's step size at the start; it falls linearly to 0."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation."""
    epochs: int = 3
    """Passes over each batch."""
    minibatches: int = 2
    """Adam steps per pass."""
    clip: float = 0.2
    """Distance of the ratio to the sampling policy from 1 beyond which it is clipped."""
    critic_coef: float = 0.05
    """Weight of the value loss."""
    eval_prompts: int = 512
    """Test prompts that the language model is judged on at the end."""


def main(args: Args) -> dict[str, float]:
    """Train; what :func:`lm_envs.benchmarks.measure.samples.measure` says of the language model."""
    torch.manual_seed(args.seed)
    envs = gymnasium.make_vec(args.env_id, num_envs=args.num_envs, kl_coef=0.0)
    env = GymWrapper(envs, categorical_action_encoding=True)  # takes random steps, which nobody reports,
    lm_envs.set_kl_coef(envs, envs.unwrapped.task.kl_coef)  # so the penalty begins after it
    env.set_seed(args.seed)

    network = LMActorCritic.for_env(envs)
    both = TensorDictModule(network, in_keys=["observation"], out_keys=["logits", "value"])
    actor = ProbabilisticActor(
        both,
        in_keys=["logits"],
        spec=env.action_spec,
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    # One forward gives logits and value: in the loss, the critic uses what the actor has computed.
    value = TensorDictModule(nn.Unflatten(-1, (-1, 1)), in_keys=["value"], out_keys=["state_value"])
    critic = TensorDictSequential(both, value)
    tell = TensorDictModule(lambda logprob: lm_envs.report(envs, logprob.numpy()), ["action_log_prob"], [])

    advantage = GAE(gamma=1.0, lmbda=args.gae_lambda, value_network=critic, deactivate_vmap=True)
    loss = ClipPPOLoss(
        actor,
        value,
        clip_epsilon=args.clip,
        critic_coeff=args.critic_coef,
        loss_critic_type="l2",
        entropy_bonus=False,
        normalize_advantage=True,
        clip_value=args.clip,
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate, eps=1e-5)
    batch = args.num_envs * args.num_steps
    updates, start = args.total_frames // batch, time.process_time()
    collector = Collector(
        env,
        TensorDictSequential(actor, tell),
        frames_per_batch=batch,
        total_frames=updates * batch,
        auto_register_policy_transforms=False,
    )
    for update, data in enumerate(collector):  # (num_envs, num_steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - update / updates)
        with torch.no_grad():
            advantage(data)
        for _ in range(args.epochs):
            for rows in torch.randperm(args.num_envs).chunk(args.minibatches):
                losses = loss(data[rows])
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
        reward = float(data["next", "reward"].sum() / data["next", "done"].sum())
        clipped = float(losses["clip_fraction"])
        print(f"{(update + 1) * batch:7d} tokens  reward per episode {reward:6.2f}  clipped {clipped:.2f}", flush=True)
    collector.shutdown()

    figures = {"cpu_seconds": time.process_time() - start}
    figures |= measure(network.model, envs.unwrapped.task, prompts=args.eval_prompts)
    print({name: round(value, 3) for name, value in figures.items()})
    return figures


if __name__ == "__main__":
    main(tyro.cli(Args))
