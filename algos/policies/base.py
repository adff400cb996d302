"""What algorithms ask of a policy, and what it says of the trajectories it is shown."""

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
            RuntimeError: the policy has no such thing (a bandit env has V**T responses).
        """
        if self.full is None:
            raise RuntimeError("this policy cannot enumerate its actions: use the MDP env for the full distribution")
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
        uniforms_per_response: the same of a whole response, of policies of text.
        keeps_logprob: whether the log-probabilities and values that come with sampling are what :meth:`evaluate` would
            compute, up to rounding that does not matter.
        takes_critic: whether values may come from a model of their own, see :meth:`critic_of_its_own`.
        has_own_critic: whether values come from a model of their own, by :meth:`critic_values`.
        reward_tokens: how many reward tokens a prompt may begin with, ids V and up (see
            :mod:`lm_envs.algos.policies.reward_tokens`); 0 before :meth:`add_reward_tokens`.
        condition: the reward token of prompts that have none, -1 for none; None before :meth:`add_reward_tokens`.
    """

    sequence_obs: bool = False
    uniforms_per_action: int = 1
    uniforms_per_response: int = 0
    keeps_logprob: bool = False
    takes_critic: bool = False
    has_own_critic: bool = False
    reward_tokens: int = 0
    condition: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("condition", None)

    def act(self, obs: NDArray[Any], uniforms: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Actions and their log-probabilities ``(N,)`` for observations ``(N, ...)``.

        Args:
            uniforms: ``(N,)``, or ``(N, uniforms_per_action)`` where that is more than one; float64 in [0, 1).
        """
        raise NotImplementedError

    def respond(self, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Whole responses to prompts ``(N, P)``, by policies of text: tokens ``(N, T)`` int64, right-padded with -1,
        and log-probabilities ``(N, T)``.

        Args:
            uniforms: ``(N, uniforms_per_response)`` float64 in [0, 1).
        """
        raise NotImplementedError(f"{type(self).__name__} does not write text")

    def answer(self, index: Tensor, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What :func:`~lm_envs.env.rollout.rollout` asks: :meth:`respond`, and the value before each token, ``(N, T)``
        with 0 beyond the end, or None where it does not come with sampling.

        Args:
            index: ``(N,)`` int64, the rows of the env's prompts.
        """
        return *self.respond(prompts, uniforms), None

    def evaluate(self, traj: Trajectories) -> Evaluation:
        """Log-probability, entropy and value of what was done; differentiable."""
        raise NotImplementedError

    def use_q_critic(self) -> None:
        """Learn the value of every action, ``Q(s, .)``, instead of ``V(s)``; call before making the agent."""
        raise ValueError(f"{type(self).__name__} has no Q critic")

    def critic_of_its_own(self, critic: nn.Module) -> None:
        """Take values from another model, ``critic(prompt, response) -> (B, T)``."""
        raise ValueError(f"{type(self).__name__} takes no critic of its own")

    def critic_values(self, traj: Trajectories) -> Tensor:
        """``(B, T + 1)`` values of a critic of its own, without a forward of the policy."""
        raise ValueError(f"{type(self).__name__} has no critic of its own")

    def add_reward_tokens(self, count: int) -> None:
        """Let prompts begin with one of ``count`` reward tokens; until :meth:`condition_on` the policy is as it was."""
        raise ValueError(f"{type(self).__name__} takes no reward tokens: they are for language-model policies")

    def condition_on(self, token: int) -> None:
        """From here on begin every prompt that has no reward token with this one, ``0 .. count - 1``."""
        assert self.condition is not None
        self.condition.fill_(token)

    @property
    def vocabulary(self) -> int:
        """V, ids below which are tokens and not reward tokens."""
        raise ValueError(f"{type(self).__name__} does not write text")
