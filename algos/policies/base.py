"""What algorithms ask of a policy, and what it says of the trajectories it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_envs.trajectories import Trajectories

Face = Literal["mdp", "bandit"]


@dataclass
class Evaluation:
    """A policy's view of trajectories; one teacher-forced forward.

    Attributes:
        logprob: ``(B, T)`` of the actions taken, nats; 0 where the mask is False.
        entropy: ``(B, T)`` of the distribution the action was drawn from, nats; 0 where the mask is False.
        value: ``(B, T + 1)``; 0 at and after termination; at a truncated row's length the value of ``final_obs``.
        full: computes the whole distribution when it is asked for.
        q: computes the value of every action when it is asked for.
    """

    logprob: Tensor
    entropy: Tensor
    value: Tensor
    full: Callable[[], Tensor] | None = None
    q: Callable[[], Tensor] | None = None

    def log_probs(self) -> Tensor:
        """``(B, T, V)`` log-probabilities of every action.

        Raises:
            RuntimeError: the policy has no such thing (the bandit face: there are V**T responses).
        """
        if self.full is None:
            raise RuntimeError("this policy cannot enumerate its actions: use the MDP face for the full distribution")
        return self.full()

    def q_values(self) -> Tensor:
        """``(B, T, V)`` value of every action, of a policy with a Q critic; ``value`` is then its mean under the
        policy.

        Raises:
            RuntimeError: the policy has none.
        """
        if self.q is None:
            raise RuntimeError("this policy has no Q critic: call its use_q_critic() before training")
        return self.q()


class Policy(nn.Module):
    """What algorithms need of a policy.

    Attributes:
        sequence_obs: one observation row holds the whole episode (text); otherwise observations come per step.
        uniforms_per_action: how many uniform numbers one action takes.
    """

    sequence_obs: bool = False
    uniforms_per_action: int = 1

    def act(self, obs: NDArray[Any], uniforms: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Actions and their log-probabilities ``(N,)`` for observations ``(N, ...)``.

        Args:
            uniforms: ``(N,)``, or ``(N, uniforms_per_action)`` where that is more than one; float64 in [0, 1).
        """
        raise NotImplementedError

    def evaluate(self, traj: Trajectories) -> Evaluation:
        """Log-probability, entropy and value of what was done; differentiable."""
        raise NotImplementedError

    def use_q_critic(self) -> None:
        """Learn the value of every action, ``Q(s, .)``, instead of ``V(s)``; call before making the agent."""
        raise ValueError(f"{type(self).__name__} has no Q critic")
