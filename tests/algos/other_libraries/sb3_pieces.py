"""What the tests of Stable-Baselines3 share: a small environment, a policy with a critic, and what was paid."""

from __future__ import annotations

import copy

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from lm_envs.algos.other_libraries.sb3 import CausalLMActorCriticPolicy, TextVecEnv
from lm_envs.env.vector import TextVectorEnv
from tests import tiny

WHOLE = dict(n_steps=12, batch_size=96, gamma=1.0, gae_lambda=0.95, device="cpu")  # of 8 rows


def env(rows=8, **options):
    return TextVecEnv(TextVectorEnv(other_start(), rows, **options))


def other_start(**changes):
    """A policy that starts away from the reference, so that there is a KL to be charged."""
    return tiny.task(policy=tiny.gpt2(seed=1), **changes)


def policy(venv, cls=CausalLMActorCriticPolicy, value_seed=3):
    made = cls(venv.observation_space, venv.action_space, lambda _: 1e-3)
    with torch.no_grad():  # a critic at zero would hide mistakes
        made.lm.value_head.weight.normal_(generator=torch.Generator().manual_seed(value_seed))
    return made


class Recorder(BaseCallback):
    """The rewards that the environment paid, with what they were paid for."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def _on_step(self):
        names = ("obs_tensor", "actions", "rewards", "dones", "infos", "log_probs")
        self.steps.append(copy.deepcopy([self.locals[name] for name in names]))
        return True


def mean_return(model):
    return np.mean([episode["r"] for episode in model.ep_info_buffer])
