"""Best-of-n: sample n responses and keep the one with the highest reward, or with its soft form nearly that one."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_envs import rng
from lm_envs.algos.engine.settings_by_size import SMALL, rows_at_once
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP
from lm_envs.exact.best_of_n import cumulative, log_gain, soft_log_gain
from lm_envs.tasks.sampling import SAMPLE_EPISODES

_KL_SEED = 1 << 43  # of the samples that the KL is measured on; nothing else draws them
_EACH, _LEAST, _MOST = 16, 4, 1024  # samples a prompt and at least, both times n, and at most


class BestOfN:
    r"""A policy made from a base policy and a reward.

    Let F be the distribution function of the reward under the base policy, and F^- its left limit. A response is chosen
    with probability

    .. math:: p_n(y) = \frac{F(r_y)^n - F^-(r_y)^n}{F(r_y) - F^-(r_y)}\, \pi(y)

    (Stiennon et al. 2020, arXiv:2009.01325, appendix G, extended to ties, which go to the earliest sample). Its KL from
    the base policy is at most :func:`kl_bound` (Beirami et al. 2024, arXiv:2401.01879).

    With a temperature a sample is chosen with probability proportional to ``e^{r / temperature}`` (soft best-of-n,
    Verdun et al. 2025): the base policy at n = 1, best-of-n near temperature 0, and for many samples
    ``pi e^{r / temperature}``, the optimum at that KL coefficient.

    Args:
        policy: the base policy.
        mdp: supplies the reward that chooses (``mdp.task.reward`` with the missing-EOS option).
        n: samples per prompt.
        temperature: above 0, in the reward's units; None keeps the best.
    """

    def __init__(self, policy: LMPolicy, mdp: TextMDP, n: int, temperature: float | None = None) -> None:
        if n < 1:
            raise ValueError(f"best-of-n needs n of at least 1, got {n}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"soft best-of-n needs a temperature (the KL coefficient) above 0, got {temperature}")
        self.policy, self.mdp, self.n, self.temperature = policy, mdp, n, temperature
        # The first sample uses the numbers of a plain response, so best-of-1 gives the base policy's tokens.
        self.uniforms_per_response = n * policy.uniforms_per_response + (0 if temperature is None else n)
        self.tokens_generated = 0
        self.reward_calls = self.scored_tokens = 0

    @torch.no_grad()
    def answer(self, index: Tensor, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the best of n responses per prompt, with log-probabilities under the *base* policy and no values.

        Arguments are those of :meth:`~lm_envs.algos.policies.base.Policy.answer`, with ``uniforms (N, n * T)``, and n
        more for the choice with a temperature.
        """
        count, steps = len(prompts), self.n * self.policy.uniforms_per_response
        repeated = prompts.repeat_interleave(self.n, dim=0)
        response, logprob = self.policy.respond(repeated, uniforms[:, :steps].reshape(count * self.n, -1))
        rows = index.repeat_interleave(self.n).cpu().numpy()
        score = self.mdp.score(rows, response.cpu().numpy()).sum(axis=1).reshape(count, self.n)
        sampled = int((response >= 0).sum())
        self.tokens_generated += sampled
        self.scored_tokens += sampled + int((repeated >= 0).sum())
        self.reward_calls += count * self.n
        if self.temperature is not None:  # the largest of r / temperature plus Gumbel noise is so distributed
            noise = uniforms[:, steps:].cpu().numpy().clip(min=np.finfo(float).tiny)
            score = score / self.temperature - np.log(-np.log(noise))
        best = torch.as_tensor(np.arange(count) * self.n + score.argmax(axis=1), device=response.device)
        return response[best], logprob[best], None

    @torch.no_grad()
    def measured_kl(self, budget: int | None = None, prompts: int = 2**31) -> NDArray[np.float64]:
        """Estimate the KL from the base policy for some prompts, from the first on: ``(X,)`` nats, by
        :func:`kl_of_scores` of 16 n samples of each, which are not charged. Empty where n is too large for that.

        Args:
            budget: samples in all; 4,096 if not given, and of a pretrained model 1,024, or as many as the responses to
                ``prompts`` prompts take if that is fewer.
            prompts: see ``budget``.
        """
        size = sum(p.numel() for p in self.policy.model.parameters())
        budget, rows = budget or (4096 if size < SMALL else min(1024, self.n * prompts)), rows_at_once(size)
        each = min(_EACH * self.n, _MOST)
        if each < _LEAST * self.n:
            return np.empty(0)
        index = np.repeat(np.arange(max(1, min(len(self.mdp.prompts), budget // each))), each)
        episode, places = SAMPLE_EPISODES + np.arange(len(index)), np.arange(self.policy.uniforms_per_response)
        scores = []
        for part in np.array_split(np.arange(len(index)), -(-len(index) // rows)):
            uniforms = torch.as_tensor(rng.uniform(_KL_SEED, rng.TOKEN, episode[part, None], places))
            response, _ = self.policy.respond(torch.as_tensor(self.mdp.prompt(index[part])), uniforms)
            scores.append(self.mdp.score(index[part], response.cpu().numpy()).sum(axis=1))
        return kl_of_scores(np.concatenate(scores).reshape(-1, each), self.n, self.temperature)


def kl_of_scores(scores: NDArray[np.float64], n: int, temperature: float | None = None) -> NDArray[np.float64]:
    """Estimate the KL of best-of-n, or of its soft form, from its base policy, ``(X,)`` nats.

    The density ratio depends on the score alone, so this is the KL between distributions of scores, exact for the
    empirical one. With M samples it is too low, by 1 % at M = 4 n and much less at 16 n.

    Args:
        scores: ``(X, M)``, of M samples of the base policy for each of X prompts; M several times n.
    """
    p = torch.full(scores.shape[1:], 1 / scores.shape[1], dtype=torch.float64)
    found = []
    for row in torch.as_tensor(scores, dtype=torch.float64):
        gain = soft_log_gain(row, p, n, temperature) if temperature else log_gain(*cumulative(row, p), n)
        found.append(float((p * gain.exp() * gain).sum()))
    return np.array(found)


def kl_bound(n: int) -> float:
    """``log n - (n - 1) / n`` nats: an upper bound on the KL of best-of-n from its base policy, reached for
    continuous rewards of distinct responses (Beirami et al. 2024, arXiv:2401.01879, theorem 1)."""
    return math.log(n) - (n - 1) / n
