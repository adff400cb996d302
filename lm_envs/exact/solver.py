r"""Exact solutions of text environments that are small enough to enumerate.

The environment's own reward scores every sequence, and its own reference every prefix, at its temperature and with its
masks. With beta the KL coefficient, ``r`` the score and ``ref`` the reference, the objective and its optimum are
(Todorov 2006; Levine 2018, arXiv:1805.00909)

.. math::
    J(\pi) = E_\pi[r] - \beta\, KL(\pi\|ref), \quad
    \pi^* \propto ref\, e^{r/\beta}, \quad
    J^* = \beta \log \sum_y ref(y)\, e^{r(y)/\beta}, \quad
    J^* - J(\pi) = \beta\, KL(\pi\|\pi^*)

all averaged over the prompts. A policy is an object with ``evaluate``, a transformers model, a table of
log-probabilities ``(X, S, V)`` over X prompts, S prefixes and V tokens, or, if only whole responses matter,
log-probabilities ``(X, L)`` of the L sequences, all in the order of :class:`~lm_envs.tasks.enumerable.PrefixTree`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_envs.env.mdp import TextMDP, kl_penalty
from lm_envs.exact.best_of_n import cumulative, log_gain, soft_log_gain
from lm_envs.kernels.logprob_kl import log_softmax
from lm_envs.model.decoding import forbid_early_eos
from lm_envs.model.forwards import response_forward
from lm_envs.model.tokens import left_pad
from lm_envs.tasks.enumerable import PrefixTree
from lm_envs.trajectories import Trajectories, whole_episodes

AnyPolicy = Any  # one of those above


class Exact:
    """Exact quantities of a small text environment, by enumeration; float64, on the CPU.

    Args:
        mdp: ``env.mdp``; its split's prompts are equally likely.
        kl_coef: beta; None uses the MDP's.
        batch_size: rows per forward of a policy.

    Attributes:
        tree: the numbering of prefixes and sequences.
        prompts: ``(X, P)`` int64, left-padded with -1.
        responses: ``(L, T)`` int64, every sequence, right-padded with -1.
        states: ``(L, T)`` int64, the prefix before each token; 0 beyond the end.
        mask: ``(L, T)`` bool, True on tokens.
        score: ``(X, L)`` the reward before the KL penalty.
        log_ref: ``(X, S, V)`` the reference's log-probabilities; -inf where a token is masked.

    ValueError for too many sequences, a reward per token, or several EOS tokens.
    """

    def __init__(self, mdp: TextMDP, *, kl_coef: float | None = None, batch_size: int = 8192) -> None:
        if mdp.dense:
            raise ValueError("exact solutions need a reward per response, but this task's reward is per token")
        if len(mdp.eos_token_ids) > 1:
            raise ValueError(f"exact solutions need one EOS token, but this task has {mdp.eos_token_ids}")
        self.mdp, self.batch_size = mdp, batch_size
        self.kl_coef = mdp.kl_coef if kl_coef is None else kl_coef
        self.tree = PrefixTree(mdp.vocab_size, mdp.eos_token_id, mdp.max_new_tokens)
        self.prompts = torch.as_tensor(left_pad(mdp.prompts, mdp.prompt_length))
        self.responses = self.tree.responses()
        self.mask = self.responses >= 0
        self.states = self.tree.states(self.responses)[:, :-1].masked_fill(~self.mask, 0)
        self._actions = self.responses.clamp(min=0)
        self.log_ref = self.table(mdp.reference).detach()
        every = self.responses.numpy()
        rows = [mdp.score(np.full(len(every), x), every).sum(axis=1) for x in range(len(self.prompts))]
        self.score = torch.as_tensor(np.stack(rows))

    def _deepest(self) -> Tensor:
        """Return ``(n^(T-1), T)`` responses whose first T-1 tokens visit every prefix."""
        last = self.tree.texts()[self.tree.level(self.tree.horizon - 1)]
        last[:, -1] = self.tree.tokens[0]
        return last

    def _fold(self, x: Tensor) -> Tensor:
        """Select ``(X, S, ...)`` from values for the rows of :meth:`_deepest`, ``(X * n^(T-1), T, ...)``."""
        x = x.reshape(len(self.prompts), -1, *x.shape[1:])
        steps = self.tree.horizon
        return torch.cat([x[:, :: self.tree.arity ** (steps - 1 - t), t] for t in range(steps)], dim=1)

    def _rows(self) -> Sequence[tuple[Tensor, Tensor]]:
        deepest = self._deepest()
        response = deepest.repeat(len(self.prompts), 1)
        prompt = self.prompts.repeat_interleave(len(deepest), dim=0)
        return list(zip(prompt.split(self.batch_size), response.split(self.batch_size), strict=True))

    def table(self, policy: AnyPolicy) -> Tensor:
        """Return ``(X, S, V)`` log-probabilities of every token after every prefix, differentiable."""
        if isinstance(policy, Tensor):
            shape = (len(self.prompts), self.tree.prefixes, self.tree.vocab_size)
            if policy.shape != shape:
                raise ValueError(f"expected a table (X, S, V) = {shape}, got shape {tuple(policy.shape)}")
            return policy
        parts = []
        for prompt, response in self._rows():
            if isinstance(policy, PreTrainedModel):
                logits = response_forward(policy, prompt.to(policy.device), response.to(policy.device)).logits()
                position = torch.arange(self.tree.horizon, device=logits.device)
                logits = forbid_early_eos(logits, position, self.mdp.eos_token_id, self.mdp.min_new_tokens)
                parts.append(log_softmax(logits, self.mdp.temperature))
            else:
                parts.append(policy.evaluate(whole_episodes(prompt, response)).log_probs())
        # Normalized again in float64: a float32 model's probabilities sum to 1 only up to rounding.
        return self._fold(torch.cat(parts).double().cpu().log_softmax(dim=-1))

    @torch.no_grad()
    def values_of(self, policy: nn.Module) -> Tensor:
        """Return the values ``(X, S)``, float64, of every prefix by a policy's own critic."""
        evaluate: Any = policy.evaluate
        parts = [evaluate(whole_episodes(*rows)).value[:, :-1] for rows in self._rows()]
        return self._fold(torch.cat(parts).double().cpu())

    def sequences(self, policy: AnyPolicy) -> Tensor:
        """Return ``(X, L)`` log-probabilities of every sequence, differentiable."""
        if isinstance(policy, Tensor) and policy.ndim == 2:
            if policy.shape != self.score.shape:
                raise ValueError(f"expected (X, L) = {tuple(self.score.shape)}, got shape {tuple(policy.shape)}")
            return policy
        table = self.table(policy)
        reached, ended = self._reach(table)
        return torch.cat([ended, reached[-1]], dim=1)

    def _reach(self, table: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return log-probabilities of reaching the texts of each length, ``(X, n^k)``, and ending there, ``(X, S)``."""
        levels = [table.new_zeros(len(table), 1)]
        for k in range(self.tree.horizon):
            here = table[:, self.tree.level(k)][:, :, self.tree.tokens]
            levels.append((levels[-1].unsqueeze(2) + here).flatten(1))
        return levels, torch.cat(levels[:-1], dim=1) + table[:, :, self.tree.eos_token_id]

    def visits(self, policy: AnyPolicy) -> Tensor:
        """Return the ``(X, S)`` probabilities of visiting each prefix."""
        return torch.cat(self._reach(self.table(policy))[0][:-1], dim=1).exp()

    def reward(self, policy: AnyPolicy) -> Tensor:
        """Return ``E[r]``, a scalar."""
        return (self.sequences(policy).exp() * self.score).sum(dim=1).mean()

    def kl(self, policy: AnyPolicy, other: AnyPolicy = None) -> Tensor:
        """Return ``KL(policy || other)``, nats per sequence, a scalar; ``other`` None is the reference."""
        log_p = self.sequences(policy)
        log_q = self._log_ref_sequences if other is None else self.sequences(other)
        never = log_p == -math.inf
        gap = log_p.masked_fill(never, 0.0) - log_q.masked_fill(never, 0.0)
        return (log_p.exp() * gap).sum(dim=-1).mean()

    def objective(self, policy: AnyPolicy) -> Tensor:
        """Return ``J = E[r] - beta KL``, a scalar, whose gradient is the exact policy gradient."""
        log_p = self.sequences(policy)
        return self.reward(log_p) - self.kl_coef * self.kl(log_p)

    @cached_property
    def _log_ref_sequences(self) -> Tensor:
        return self.sequences(self.log_ref)

    @cached_property
    def _soft(self) -> tuple[Tensor, Tensor]:
        return self.backward(self._soft_step)

    def _soft_step(self, q: Tensor, states: slice) -> tuple[Tensor, Tensor]:
        log_ref = self.log_ref[:, states]
        if self.kl_coef == 0:
            return q.masked_fill(log_ref == -math.inf, -math.inf).amax(dim=2), q
        return self.kl_coef * (log_ref + q / self.kl_coef).logsumexp(dim=2), q

    def backward(self, step: Any) -> tuple[Tensor, Tensor]:
        """Compute V ``(X, S)`` and Q ``(X, S, V)`` by backward recursion: ``step(value after each token, states)``
        returns both for the states of one length."""
        found: list[tuple[Tensor, Tensor]] = []
        following = self.score[:, self.tree.prefixes :]  # of texts one token longer
        for k in reversed(range(self.tree.horizon)):
            states = self.tree.level(k)
            after = self.score.new_empty(len(self.score), self.tree.arity**k, self.tree.vocab_size)
            after[:, :, self.tree.tokens] = following.reshape(len(self.score), -1, self.tree.arity)
            after[:, :, self.tree.eos_token_id] = self.score[:, states]
            found.insert(0, step(after, states))
            following = found[0][0]
        values, q = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return values, q

    @property
    def soft_value(self) -> Tensor:
        """The optimal value ``V*(s) = beta log sum_a ref(a|s) exp(Q*(s,a) / beta)``, ``(X, S)``; the largest Q* if beta
        is 0."""
        return self._soft[0]

    @property
    def optimal_value(self) -> Tensor:
        """The optimum ``J*``, a scalar."""
        return self.soft_value[:, 0].mean()

    @cached_property
    def optimal_policy(self) -> Tensor:
        """The optimum ``log pi* = log ref + (Q* - V*) / beta``, ``(X, S, V)``; if beta is 0, the reference restricted
        to the best actions."""
        value, q = self._soft
        if self.kl_coef > 0:
            return self.log_ref + (q - value.unsqueeze(2)) / self.kl_coef
        return self.log_ref.masked_fill(q < value.unsqueeze(2), -math.inf).log_softmax(dim=2)

    @cached_property
    def reference_value(self) -> Tensor:
        """The reference's objective ``J_ref``, a scalar."""
        return self.reward(self._log_ref_sequences)

    @torch.no_grad()
    def regret(self, policy: AnyPolicy) -> float:
        """Return the normalized regret ``(J* - J) / (J* - J_ref)``: 0 for the optimum, 1 for the reference."""
        gap = self.optimal_value - self.objective(policy)
        return float(gap / (self.optimal_value - self.reference_value))

    def values(self, policy: AnyPolicy) -> tuple[Tensor, Tensor]:
        """Return ``V^pi (X, S)`` and ``Q^pi (X, S, V)`` of the environment's rewards: the score at the end, and
        ``beta (log ref - log pi)`` per token; Q includes the penalty of its action."""
        log_p = self.table(policy).detach()
        p = log_p.exp()

        def step(after: Tensor, states: slice) -> tuple[Tensor, Tensor]:
            here = log_p[:, states]
            q = after - kl_penalty(self.kl_coef, here, self.log_ref[:, states]).masked_fill(here == -math.inf, 0.0)
            return (p[:, states] * q).sum(dim=2), q

        return self.backward(step)

    def value_error(self, value: Tensor, policy: AnyPolicy) -> float:
        """Return the mean squared error of values ``(X, S)`` against ``V^pi``, over the prefixes the policy visits."""
        visits = self.visits(policy).detach()
        return float((visits * (value - self.values(policy)[0]) ** 2).sum() / visits.sum())

    def gradient(self, policy: nn.Module) -> dict[str, Tensor]:
        """Return the exact policy gradient, ``dJ / d parameter`` by name, of the parameters that J depends on."""
        named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(self.objective(policy), list(named.values()), allow_unused=True)
        return {name: g for name, g in zip(named, found, strict=True) if g is not None}

    def best_of_n(self, policy: AnyPolicy, n: int, temperature: float | None = None) -> Tensor:
        """Return ``(X, L)`` log-probabilities of the best of n samples, ties to the earliest, or with a temperature of
        soft best-of-n; see :mod:`lm_envs.exact.best_of_n`."""
        if n < 1:
            raise ValueError(f"best-of-n needs n of at least 1, got {n}")
        log_p = self.sequences(policy)
        if temperature is None:
            return log_p + log_gain(*self._distribution(log_p.exp()), n)
        rows = zip(self.score, log_p.exp(), strict=True)
        return log_p + torch.stack([soft_log_gain(score, p, n, temperature) for score, p in rows])

    def _distribution(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``F^-`` and ``F`` of the score's distribution under p, at the score of every sequence, ``(X, L)``."""
        rows = [cumulative(score, each) for score, each in zip(self.score, p, strict=True)]
        return torch.stack([below for below, _ in rows]), torch.stack([upto for _, upto in rows])

    def win_rate(self, policy: AnyPolicy, against: AnyPolicy) -> float:
        """Return the probability that ``policy`` scores higher than ``against`` on a prompt; ties count half."""
        below, upto = self._distribution(self.sequences(against).exp())
        return float((self.sequences(policy).exp() * (below + upto) / 2).sum(dim=1).mean())

    def tilted(self, kl_coef: float) -> Tensor:
        """Return ``(X, L)`` log-probabilities of ``pi ∝ ref exp(r / kl_coef)``, the optimum at another coefficient."""
        return (self._log_ref_sequences + self.score / kl_coef).log_softmax(dim=1)

    def frontier(self, kl_coefs: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return KL ``(N,)`` and reward ``(N,)`` of the optima at these coefficients: the highest reward at each KL."""
        points = [self.tilted(kl_coef) for kl_coef in kl_coefs]
        return torch.stack([self.kl(p) for p in points]), torch.stack([self.reward(p) for p in points])

    def frontier_reward(self, kl: float) -> float:
        """Return ``R*(KL)``, the highest expected score of any policy with this KL (nats per sequence)."""
        best = self.score.masked_fill(self._log_ref_sequences == -math.inf, -math.inf).amax(dim=1, keepdim=True)
        ties = self._log_ref_sequences.masked_fill(self.score < best, -math.inf)
        if kl >= float(-ties.logsumexp(dim=1).mean()):
            return float(best.mean())
        spread = float((best - self.score).amax())
        if kl <= 0 or spread == 0:
            return float(self.reward(self._log_ref_sequences))
        low, high = math.log(spread) - 30, math.log(spread) + 30  # of log beta: less KL with a larger one
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self.kl(self.tilted(math.exp(middle)))) > kl else (low, middle)
        return float(self.reward(self.tilted(math.exp(high))))

    @torch.no_grad()
    def frontier_gap(self, policy: AnyPolicy) -> float:
        """Return ``R*(KL(pi)) - R(pi)``, the score that the policy loses at its own KL; never negative."""
        log_p = self.sequences(policy)
        return self.frontier_reward(float(self.kl(log_p))) - float(self.reward(log_p))

    @torch.no_grad()
    def trajectories(self, policy: AnyPolicy) -> tuple[Trajectories, Tensor]:
        """Return all possible episodes with the environment's rewards, at most X * L, those of a prompt adjacent and in
        one ``group``; and their probabilities, which sum to 1."""
        table = self.table(policy)
        count = len(self.prompts)
        weight = (self.sequences(table).exp() / count).flatten()
        step = (slice(None), self.states, self._actions)
        logprob, ref = (x[step].masked_fill(~self.mask, 0.0).flatten(0, 1) for x in (table, self.log_ref))
        prompt, response = self.prompts.repeat_interleave(len(self.responses), dim=0), self.responses.repeat(count, 1)
        score, reward = self.score.flatten(), -kl_penalty(self.kl_coef, logprob, ref)
        index = torch.arange(count).repeat_interleave(len(self.responses))
        more = {"logprob": logprob, "ref_logprob": ref, "score": score, "group": index, "prompt_index": index}
        traj = whole_episodes(prompt, response, reward=reward, **more)
        reward[torch.arange(len(traj)), traj.lengths - 1] += score
        possible = weight > 0
        return traj.select(possible), weight[possible]


def cosine(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the cosine of the angle between two gradients, over the parameters of the second."""
    a, b = _flat(found, exact)
    return float(a @ b / (a.norm() * b.norm()))


def relative_bias(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return ``|found - exact| / |exact|``, Euclidean norms over the parameters of the second."""
    a, b = _flat(found, exact)
    return float((a - b).norm() / b.norm())


def _flat(*gradients: dict[str, Tensor]) -> list[Tensor]:
    """Return each gradient as one vector, over the parameters of the last."""
    return [torch.cat([gradient[name].flatten().double() for name in gradients[-1]]) for gradient in gradients]
