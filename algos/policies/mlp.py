"""A small feed-forward policy for control: separate actor and critic, discrete actions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lm_envs.algos.policies.base import Evaluation, Policy
from lm_envs.kernels.logprob_kl import log_softmax, logprob_kl
from lm_envs.trajectories import Trajectories


def _trunk(sizes: Sequence[int], last_gain: float, generator: torch.Generator) -> nn.Sequential:
    """Linear layers with tanh between them; orthogonal weights, zero biases (Engstrom et al. 2020)."""
    layers: list[nn.Module] = []
    for i, (width, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        last = i == len(sizes) - 2
        linear = nn.utils.skip_init(nn.Linear, width, out)
        nn.init.orthogonal_(linear.weight, last_gain if last else 2**0.5, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class MLPPolicy(Policy):
    """Actor and critic as two multilayer perceptrons with tanh.

    Args:
        env: any Gymnasium ``Env`` or ``VectorEnv`` with ``Discrete`` actions and ``Box`` or ``Discrete``
            observations (the latter as one-hot vectors). Only its spaces are read.
        hidden: widths of the hidden layers of each.
        seed: of the weights; no global generator is touched.

    Raises:
        ValueError: a space of another kind, or actions that do not start at 0.
    """

    sequence_obs = False

    def __init__(self, env: Any, hidden: Sequence[int] = (64, 64), seed: int = 0) -> None:
        super().__init__()
        is_vector = isinstance(env, VectorEnv)
        obs_space = env.single_observation_space if is_vector else env.observation_space
        action_space = env.single_action_space if is_vector else env.action_space
        if not isinstance(action_space, spaces.Discrete) or action_space.start != 0:
            raise ValueError(f"MLPPolicy needs Discrete actions that start at 0, got {action_space}")
        self._one_hot, self._first = 0, 0
        if isinstance(obs_space, spaces.Discrete):
            width = self._one_hot = int(obs_space.n)
            self._first = int(obs_space.start)
        elif isinstance(obs_space, spaces.Box):
            width = int(np.prod(obs_space.shape))
        else:
            raise ValueError(f"MLPPolicy needs Box or Discrete observations, got {obs_space}")
        generator = torch.Generator().manual_seed(seed)
        # A small last gain starts the policy near uniform; the critic's starts it on the scale of its inputs.
        self.actor = _trunk((width, *hidden, int(action_space.n)), 0.01, generator)
        self.critic = _trunk((width, *hidden, 1), 1.0, generator)
        self.q_critic = False

    def use_q_critic(self) -> None:
        """Learn ``Q(s, .)``: the critic's last layer gets an output per action, all equal at first."""
        if not self.q_critic:
            last, actions = self.critic[-1], self.actor[-1].out_features
            assert isinstance(last, nn.Linear) and isinstance(actions, int)
            wide = nn.utils.skip_init(nn.Linear, last.in_features, actions, dtype=last.weight.dtype)
            with torch.no_grad():
                wide.weight.copy_(last.weight.expand(actions, -1))
                wide.bias.copy_(last.bias.expand(actions))
            self.critic[-1], self.q_critic = wide, True

    def _values(self, features: Tensor, log_p: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """V ``(N,)``, and the critic's output: V again, or Q ``(N, A)``, whose mean under the policy is V."""
        found = self.critic(features)
        if not self.q_critic:
            return found.squeeze(1), found
        log_p = log_softmax(self.actor(features)) if log_p is None else log_p
        return (log_p.detach().exp() * found).sum(dim=1), found

    def _features(self, obs: Tensor) -> Tensor:
        """``(N, width)`` in the weights' dtype, from ``(N, *shape)``."""
        weight = next(self.parameters())
        obs = obs.to(weight.device)
        if self._one_hot:
            return one_hot(obs.long() - self._first, self._one_hot).to(weight.dtype)
        return obs.reshape(len(obs), -1).to(weight.dtype)

    @torch.no_grad()
    def act(self, obs: NDArray[Any], uniforms: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Actions by inverse CDF, in float64: the first action whose cumulative probability exceeds the uniform."""
        logits = self.actor(self._features(torch.as_tensor(obs))).double().cpu().numpy()
        logits = logits - logits.max(axis=1, keepdims=True)
        weight = np.exp(logits)
        cumulative = weight.cumsum(axis=1)
        total = cumulative[:, -1:]
        actions = (cumulative <= np.asarray(uniforms).reshape(-1, 1) * total).sum(axis=1)
        logprob = np.take_along_axis(logits - np.log(total), actions[:, None], axis=1)[:, 0]
        return actions, logprob

    def evaluate(self, traj: Trajectories) -> Evaluation:
        """One forward of each network over the real steps; the critic also sees ``final_obs`` of truncated rows."""
        if traj.obs is None:
            raise ValueError("MLPPolicy.evaluate needs Trajectories.obs, (B, T, *shape)")
        # Masked positions, which may hold NaN, are never read.
        mask = traj.mask
        features = self._features(traj.obs[mask])
        logits = self.actor(features)
        chosen, _, entropy, _ = logprob_kl(logits, None, traj.actions[mask])
        value, said = self._values(features, log_softmax(logits) if self.q_critic else None)
        zeros = chosen.new_zeros(mask.shape)
        values = chosen.new_zeros(mask.shape[0], mask.shape[1] + 1)
        where = torch.nn.functional.pad(mask, (0, 1))
        values = values.masked_scatter(where, value)
        if traj.final_obs is not None and bool(traj.truncated.any()):
            # Law 5: truncation bootstraps from the observation after the cut, termination does not.
            cut = traj.truncated
            final = self._values(self._features(traj.final_obs[cut]))[0]
            values = values.index_put((cut.nonzero().squeeze(1), traj.lengths[cut]), final)

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter(mask.unsqueeze(-1), x)

        return Evaluation(
            zeros.masked_scatter(mask, chosen),
            zeros.masked_scatter(mask, entropy),
            values,
            lambda: spread(log_softmax(logits)),
            (lambda: spread(said)) if self.q_critic else None,
        )
