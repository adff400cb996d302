"""What algorithms ask of a policy, and its evaluation of trajectories."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from lm_envs.kernels.logprob_kl import LogprobKL
from lm_envs.model.decoding import GREEDY, sample
from lm_envs.trajectories import Trajectories


@dataclass
class Evaluation:
    """The result of one teacher-forced forward over trajectories.

    Attributes:
        logprob: ``(B, T)`` of the actions taken, nats; 0 where the mask is False.
        entropy: ``(B, T)`` of the distribution the action was drawn from, nats; 0 where the mask is False.
        value: ``(B, T + 1)``; 0 at and after termination; at a truncated row's length the value of ``final_obs``.
        full, q: compute what :meth:`log_probs` and :meth:`q_values` return, when they are called.
    """

    logprob: Tensor
    entropy: Tensor
    value: Tensor
    full: Callable[[], Tensor] | None = None
    q: Callable[[], Tensor] | None = None

    def log_probs(self) -> Tensor:
        """``(B, T, V)`` log-probabilities of every action; RuntimeError for a bandit env, which has V**T."""
        if self.full is None:
            raise RuntimeError("this policy cannot enumerate its actions: use the MDP env for the full distribution")
        return self.full()

    def q_values(self) -> Tensor:
        """``(B, T, V)`` values of every action, whose mean under the policy is ``value``; RuntimeError without a Q
        critic."""
        if self.q is None:
            raise RuntimeError("this policy has no Q critic: call its use_q_critic() before training")
        return self.q()


class Policy(nn.Module):
    """What algorithms need of a policy.

    Attributes:
        sequence_obs: one observation row holds the whole episode (text); otherwise observations come per step.
        uniforms_per_action, uniforms_per_response: uniform numbers that one action or (text) one response takes.
        keeps_logprob: whether log-probabilities and values from sampling equal those of :meth:`evaluate` up to
            rounding that does not matter.
        takes_critic, has_own_critic: whether values may come, and do come, from a model of their own.
        reward_tokens: number of reward tokens that a prompt may begin with, ids V and up (see
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
        """Actions and their log-probabilities ``(N,)`` for observations ``(N, ...)``, by uniforms ``(N,)``, or
        ``(N, uniforms_per_action)`` where that is more than one; float64 in [0, 1)."""
        raise NotImplementedError

    def respond(self, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Whole responses to prompts ``(N, P)``, by ``uniforms (N, uniforms_per_response)`` float64 in [0, 1): tokens
        ``(N, T)`` int64, right-padded with -1, and log-probabilities ``(N, T)``."""
        raise NotImplementedError(f"{type(self).__name__} does not write text")

    def answer(self, index: Tensor, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Responses as :meth:`respond` gives them to rows ``index (N,)`` of the env's prompts, and the value before
        each token, ``(N, T)`` with 0 beyond the end, or None where it does not come with sampling."""
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


class TextPolicy(Policy):
    """A policy of text: an action is a token, or with ``bandit`` a whole response of up to ``horizon`` tokens."""

    sequence_obs = True

    def __init__(
        self, bandit: bool, prompt_length: int, horizon: int, eos_token_id: int, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.bandit, self.prompt_length, self.eos_token_id = bandit, prompt_length, eos_token_id
        self.temperature = temperature
        self.uniforms_per_response = horizon
        self.uniforms_per_action = horizon if bandit else 1

    def next_logits(self, rows: Tensor) -> Tensor:
        """Logits ``(N, V)`` of the next token of observations ``(N, P + T)``, -inf where a token is masked."""
        raise NotImplementedError

    def act(self, obs: NDArray[Any], uniforms: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        device = next(self.parameters()).device
        rows, numbers = torch.as_tensor(obs, device=device), torch.as_tensor(uniforms, device=device)
        with torch.no_grad():
            if self.bandit:
                response, logprob = self.respond(rows[:, : self.prompt_length], numbers)
                # An action needs some token behind the EOS: the env reads up to the first EOS.
                actions = torch.where(response < 0, self.eos_token_id, response)
                return actions.cpu().numpy(), logprob.double().sum(dim=1).cpu().numpy()
            tokens, logprob = sample(self.next_logits(rows), numbers, self.temperature)
        return tokens.cpu().numpy(), logprob.double().cpu().numpy()

    def greedy(self, prompts: Tensor) -> Tensor:
        """The likeliest token after the likeliest token, ``(N, T)`` int64 as :meth:`respond` gives it."""
        kept, self.temperature = self.temperature, GREEDY
        try:
            return self.respond(prompts, torch.full((len(prompts), self.uniforms_per_response), 0.5).double())[0]
        finally:
            self.temperature = kept

    def texts(self, traj: Trajectories) -> tuple[Tensor, Tensor]:
        """Prompts and responses on the policy's device; ValueError where there are none."""
        if traj.prompt is None or traj.response is None:
            raise ValueError(f"{type(self).__name__} needs trajectories of text, with prompt and response")
        device = next(self.parameters()).device
        return traj.prompt.to(device), traj.response.to(device)


def text_evaluation(
    traj: Trajectories,
    found: LogprobKL,
    value: Tensor,
    full: Callable[[], Tensor],
    q: Callable[[], Tensor] | None = None,
) -> Evaluation:
    """An evaluation of responses from ``value (B, T)``, that of each token's state; in a bandit env sums over tokens.

    Text always terminates, on EOS or at the horizon: the value at the end is zero.
    """
    if traj.is_bandit:
        logprob, entropy = (x.sum(dim=1, keepdim=True) for x in (found.logprob, found.entropy))
        return Evaluation(logprob, entropy, pad(value[:, :1], (0, 1)))
    return Evaluation(found.logprob, found.entropy, pad(value, (0, 1)), full, q)
