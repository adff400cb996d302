r"""Where penalties that are not the exact one come to rest, solved by recursion from the ends.

The exact penalty is a reward: what an early token does to later KL counts. A penalty in the loss acts at each state on
its own, given the states that are visited; an environment that was not told the agent's log-probabilities charges only
half. At rest no state's gradient moves its distribution any more, so with ``Q(s,a)`` the expected rewards that follow,
at the policy that rests,

=====================================  =============================================================
penalty                                 at rest
=====================================  =============================================================
KL(pi || ref) per state (k2, full)      ``pi ∝ ref e^{Q/beta}``, Q the score alone
KL(ref || pi) per state (k3)            ``pi = beta ref / (lambda - Q)``, Q the score alone
none (k1 in the loss)                   the best response
half (not reported)                     the response with the most ``r + beta log ref``
half, and an entropy bonus c            ``pi ∝ e^{(Q + beta log ref)/c}``, Q the score and later ``beta log ref``
=====================================  =============================================================

Compare :meth:`lm_envs.exact.solver.Exact.optimal_policy`, where Q also holds the KL that follows. All return tables
``(X, S, V)`` of log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lm_envs.exact.solver import Exact

_STEPS = 200  # of the bisection for lambda


def _rest(exact: Exact, respond: Callable[[Tensor, Tensor], Tensor], paid: Tensor) -> Tensor:
    """Backward over the states: ``respond(q, log_ref)`` is the log-policy at rest where q is what follows each token,
    and ``paid (X, S, V)`` is paid with the token itself."""
    tables: list[Tensor] = []

    def step(after: Tensor, states: slice) -> tuple[Tensor, Tensor]:
        q = after + paid[:, states]
        log_p = respond(q, exact.log_ref[:, states])
        tables.insert(0, log_p)
        return (log_p.exp() * q.masked_fill(log_p == -math.inf, 0.0)).sum(dim=2), q

    exact.backward(step)
    return torch.cat(tables, dim=1)


def state_kl(exact: Exact) -> Tensor:
    """KL(pi || ref) of each state in the loss: the estimators k2 per token, ratio * k3, and the full sum."""

    def respond(q: Tensor, log_ref: Tensor) -> Tensor:
        return (log_ref + q / exact.kl_coef).log_softmax(dim=2)

    return _rest(exact, respond, torch.zeros_like(exact.log_ref))


def reverse_state_kl(exact: Exact) -> Tensor:
    """KL(ref || pi) of each state in the loss: the estimator k3 per token, as in GRPO.

    ``sum_a pi Q - beta KL(ref || pi)`` is largest at ``pi = beta ref / (lambda - Q)``; lambda, above the largest Q,
    makes it sum to 1.
    """

    def respond(q: Tensor, log_ref: Tensor) -> Tensor:
        ref = exact.kl_coef * log_ref.exp()
        top = q.masked_fill(log_ref == -math.inf, -math.inf).amax(dim=2, keepdim=True)
        # At top + beta the sum is at most 1, since every term is at most ref; at top it is infinite.
        low, high = torch.zeros_like(top), torch.full_like(top, exact.kl_coef)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            large = (ref / (top - q + middle)).nan_to_num(nan=0.0).sum(dim=2, keepdim=True) > 1
            low, high = torch.where(large, middle, low), torch.where(large, high, middle)
        return (ref / (top - q + high)).log().log_softmax(dim=2)

    return _rest(exact, respond, torch.zeros_like(exact.log_ref))


def no_penalty(exact: Exact) -> Tensor:
    """The score alone: k1 in the loss, whose expected gradient is 0. Ties stay in the reference's proportions."""
    return _greedy(exact, torch.zeros_like(exact.log_ref))


def unreported(exact: Exact, entropy_coef: float = 0.0) -> Tensor:
    """The environment's half alone, ``beta log ref`` with every token, and perhaps an entropy bonus in the loss.

    Args:
        entropy_coef: weight of the entropy of each state.
    """
    paid = (exact.kl_coef * exact.log_ref).masked_fill(exact.log_ref == -math.inf, 0.0)
    if entropy_coef == 0:
        return _greedy(exact, paid)

    def respond(q: Tensor, log_ref: Tensor) -> Tensor:
        return (q / entropy_coef).masked_fill(log_ref == -math.inf, -math.inf).log_softmax(dim=2)

    return _rest(exact, respond, paid)


def _greedy(exact: Exact, paid: Tensor) -> Tensor:
    def respond(q: Tensor, log_ref: Tensor) -> Tensor:
        best = q.masked_fill(log_ref == -math.inf, -math.inf).amax(dim=2, keepdim=True)
        return log_ref.masked_fill(q < best, -math.inf).log_softmax(dim=2)

    return _rest(exact, respond, paid)
