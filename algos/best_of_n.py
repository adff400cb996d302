"""Best-of-n: sample n responses and keep the one with the highest reward."""

import math

import numpy as np
import torch
from torch import Tensor

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP


class BestOfN:
    r"""A policy made from a base policy and a reward.

    Let F be the distribution function of the reward under the base policy, and F^- its left limit. A response is chosen
    with probability

    .. math:: p_n(y) = \frac{F(r_y)^n - F^-(r_y)^n}{F(r_y) - F^-(r_y)}\, \pi(y)

    (Stiennon et al. 2020, arXiv:2009.01325, appendix G, extended to ties, which go to the earliest sample). Its KL from
    the base policy is at most :func:`kl_bound` (Beirami et al. 2024, arXiv:2401.01879).

    Args:
        policy: the base policy.
        mdp: supplies the reward that chooses (``mdp.task.reward`` with the missing-EOS option).
        n: samples per prompt.
    """

    def __init__(self, policy: LMPolicy, mdp: TextMDP, n: int) -> None:
        if n < 1:
            raise ValueError(f"best-of-n needs n of at least 1, got {n}")
        self.policy, self.mdp, self.n = policy, mdp, n
        # The first sample uses the numbers of a plain response, so best-of-1 gives the base policy's tokens.
        self.uniforms_per_response = n * policy.uniforms_per_response
        self.tokens_generated = 0
        self.reward_calls = 0

    @torch.no_grad()
    def answer(self, index: Tensor, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the best of n responses per prompt, with log-probabilities under the *base* policy and no values.

        Arguments are those of :meth:`~lm_envs.algos.policies.base.Policy.answer`, with ``uniforms (N, n * T)``.
        """
        count = len(prompts)
        steps = self.policy.uniforms_per_response
        repeated = prompts.repeat_interleave(self.n, dim=0)
        response, logprob = self.policy.respond(repeated, uniforms.reshape(count * self.n, steps))
        rows = index.repeat_interleave(self.n).cpu().numpy()
        score = self.mdp.score(rows, response.cpu().numpy()).sum(axis=1).reshape(count, self.n)
        self.tokens_generated += int((response >= 0).sum())
        self.reward_calls += count * self.n
        best = torch.as_tensor(np.arange(count) * self.n + score.argmax(axis=1), device=response.device)
        return response[best], logprob[best], None


def kl_bound(n: int) -> float:
    """``log n - (n - 1) / n`` nats: an upper bound on the KL of best-of-n from its base policy, reached for
    continuous rewards of distinct responses (Beirami et al. 2024, arXiv:2401.01879, theorem 1)."""
    return math.log(n) - (n - 1) / n
