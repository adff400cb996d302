"""Losses and diagnostics: pure functions on ``(B, T)`` tensors and a mask.

Masked positions change neither a value nor a gradient, even if they hold NaN (law 1 in docs/laws.md): inputs are masked
*before* any nonlinear function, since the gradient of ``where(mask, exp(x), 0)`` at a masked NaN is ``0 * NaN``.

Losses are per position; :func:`masked_mean` (unit "token") or :func:`sequence_mean` (unit "sequence") reduces them.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lm_envs.algos.ops.advantages import masked
from lm_envs.kernels.logprob_kl import logprob_kl
from lm_envs.training import bradley_terry_loss, mean_over_pairs

KLEstimator = Literal["k1", "k2", "k3", "k3_ratio", "full"]
LossMean = Literal["response", "token", "sum"]
Correction = Literal["token", "token_mask", "sequence", "sequence_mask", "geometric_mask", "negative_mask"]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """``sum_{b,t} m x / sum_{b,t} m``, a scalar: each token has the same weight."""
    return masked(x, mask).sum() / mask.sum()


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """``(1/B) sum_b sum_t m x``, a scalar, as in the score-function gradient of a sequence."""
    return masked(x, mask).sum() / len(x)


def row_weights(mean: LossMean, mask: Tensor) -> Tensor:
    """``(B,)`` weights w of a whole batch's rows, in ``(1/B) sum_b w_b sum_t m x``.

    - "response": ``1/|o_b|``, each row has the same weight, so a token of a long row has less (GRPO).
    - "token": ``B / sum_b |o_b|``, each token of the whole batch has the same weight (DAPO).
    - "sum": 1, the score-function gradient of a sequence (REINFORCE, Dr. GRPO).
    """
    lengths = mask.sum(dim=1).double()
    each = torch.ones_like(lengths)
    return {"response": each / lengths, "token": each / lengths.mean(), "sum": each}[mean]


def policy_gradient_loss(logprob: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """``-A_t * log pi(a_t|s_t)`` per position, ``(B, T)`` (Williams 1992, "Simple statistical gradient-following
    algorithms")."""
    return -masked(advantage, mask) * masked(logprob, mask)


def importance_ratio(logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> Tensor:
    """``rho_t = pi(a_t|s_t) / pi_old(a_t|s_t)``, ``(B, T)``, 1 in masked positions."""
    return torch.exp(masked(logprob, mask) - masked(old_logprob, mask))


def sampler_weights(kind: Correction, logprob: Tensor, sampler_logprob: Tensor, mask: Tensor, limit: float) -> Tensor:
    """Importance weights ``(B, T)`` of actions drawn from another distribution mu than the policy's pi, without a
    gradient; 1 in masked positions.

    With ``w_t = pi(a_t|s_t) / mu(a_t|s_t)`` and ``w = prod_t w_t`` over the row:

    - "token": ``min(w_t, limit)``, truncated importance sampling (Yao et al. 2025, "Your efficient RL framework
      secretly brings you off-policy RL training"). Corrects an action, not what was sampled before and after it.
    - "token_mask": ``w_t`` in ``[1 / limit, limit]``, else 0 (IcePop; Ling team 2025, "Every step evolves").
    - "sequence": ``min(w, limit)`` for each token of the row; without a limit exact (Liu et al. 2025, "When speed kills
      stability").
    - "sequence_mask": ``w`` up to ``limit``, else 0 (the same source).
    - "geometric_mask": 1 where ``w^(1/|y|)``, the ratio's geometric mean, is in ``[1 / limit, limit]``, else 0 (the
      same source, its continuation): rows are dropped alike at any length, and none is reweighted.
    - "negative_mask": 1 where ``w^(1/|y|)`` is at least ``1 / limit``, else 0, for negative advantages alone
      (DeepSeek-AI 2025, "DeepSeek-V3.2", off-policy sequence masking with delta ``log limit``).
    """
    log_ratio = k1(logprob, sampler_logprob, mask).detach()
    if not kind.startswith("token"):
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    if kind in ("geometric_mask", "negative_mask"):
        mean = log_ratio / mask.sum(dim=1, keepdim=True)
        far = (mean.abs() if kind == "geometric_mask" else -mean) > math.log(limit)
        return (~(far & mask)).to(log_ratio.dtype)
    ratio = log_ratio.exp()
    if not kind.endswith("mask"):
        bounded = ratio.clamp(max=limit)
    else:
        least = 1 / limit if kind == "token_mask" else 0.0
        bounded = torch.where((ratio >= least) & (ratio <= limit), ratio, torch.zeros_like(ratio))
    return torch.where(mask, bounded, torch.ones_like(ratio))


def ppo_clip_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Tensor:
    """``max(-A * rho, -A * clamp(rho, 1 - clip, 1 + clip_high))`` per position, ``(B, T)``.

    Schulman et al. 2017, "Proximal policy optimization algorithms", eq. 7, negated; no gradient where the clip holds.
    ``clip_high`` is ``clip`` where it is None; a larger one lets unlikely tokens grow (Yu et al. 2025, "DAPO", eq. 10).
    """
    ratio = importance_ratio(logprob, old_logprob, mask)
    return _clipped(ratio, masked(advantage, mask), clip, clip_high)


def _clipped(ratio: Tensor, advantage: Tensor, clip: float, clip_high: float | None) -> Tensor:
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return torch.maximum(-advantage * ratio, -advantage * bounded)


def sequence_ratio(logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> Tensor:
    """``s = (pi(y|x) / pi_old(y|x))^(1/|y|)``, ``(B, 1)``: the geometric mean of a row's ratios (Zheng et al. 2025,
    "Group sequence policy optimization", eq. 7)."""
    log_ratio = masked(logprob, mask) - masked(old_logprob, mask)
    return torch.exp(log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True))


def gspo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: float,
    clip_high: float | None = None,
    by_token: bool = False,
) -> Tensor:
    """``max(-A s, -A clamp(s, 1 - clip, 1 + clip_high))`` per position, ``(B, T)``, with :func:`sequence_ratio` s.

    Zheng et al. 2025, eq. 5. By token (eq. 13) the ratio is ``sg(s) pi / sg(pi)``: of the same value, with a gradient
    through the token's own probability, so that tokens may have advantages of their own. Where a row's tokens share one
    advantage, both have the same mean over the row and the same gradient.
    """
    ratio = sequence_ratio(logprob, old_logprob, mask)
    if by_token:
        ratio = ratio.detach() * importance_ratio(logprob, logprob.detach(), mask)
    return _clipped(ratio, masked(advantage, mask), clip, clip_high)


def cispo_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor, clip: float, clip_high: float | None = None
) -> Tensor:
    """``-sg(clamp(rho, 1 - clip, 1 + clip_high)) A log pi`` per position, ``(B, T)``: a bounded weight, and a gradient
    for every token (MiniMax 2025, "MiniMax-M1", eq. 4). At ratio 1 it has REINFORCE's gradient."""
    ratio = importance_ratio(logprob, old_logprob, mask).detach()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return bounded * policy_gradient_loss(logprob, advantage, mask)


def sapo_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor, tau: float, tau_negative: float
) -> Tensor:
    """``-A (4 / tau) sigmoid(tau (rho - 1))`` per position, ``(B, T)``, ``tau_negative`` where A is negative.

    Gao et al. 2025, "Soft adaptive policy optimization". The slope in rho is ``4 s (1 - s)`` with s the
    sigmoid: 1 at ratio 1, where the gradient is REINFORCE's, and near 0 far from it on both sides.
    """
    ratio, advantage = importance_ratio(logprob, old_logprob, mask), masked(advantage, mask)
    taus = tau + (tau_negative - tau) * (advantage < 0).to(ratio.dtype)
    return -advantage * 4 / taus * torch.sigmoid(taus * (ratio - 1))


def ppo_penalty_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor, coef: float) -> Tensor:
    """``-A * rho + coef * (rho - 1 - log rho)`` per position, ``(B, T)``.

    Schulman et al. 2017, eq. 8, negated; the second part is an unbiased estimate of KL(old || new), and of its
    gradient, on samples of the old policy. ``coef = 0`` is :func:`ppo_clip_loss` without a clip.
    """
    ratio = importance_ratio(logprob, old_logprob, mask)
    return -masked(advantage, mask) * ratio + coef * k3(old_logprob, logprob, mask)


def value_loss(
    value: Tensor, target: Tensor, mask: Tensor, old_value: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """``0.5 * (V - target)^2`` per position, or with a clip ``0.5 * max((V - target)^2, (V_clip -
    target)^2)``, ``(B, T)``.

    ``V_clip = V_old + clamp(V - V_old, -clip, clip)`` (OpenAI baselines' PPO2; lm-human-preferences).

    Raises:
        ValueError: a clip without ``old_value``.
    """
    value, target = masked(value, mask), masked(target, mask)
    error = (value - target) ** 2
    if clip is not None:
        if old_value is None:
            raise ValueError("value_loss: clip needs old_value, the values before the update")
        old_value = masked(old_value, mask)
        error = torch.maximum(error, (old_value + (value - old_value).clamp(-clip, clip) - target) ** 2)
    return 0.5 * error


def nll(logprob: Tensor, mask: Tensor) -> Tensor:
    """``-log pi(a_t|s_t)`` per position, ``(B, T)``: maximum likelihood on demonstrations."""
    return -masked(logprob, mask)


def plackett_luce_loss(scores: Tensor, rank: Tensor, weight: Tensor | None = None) -> Tensor:
    """``-sum_k [s_(k) - log sum_{j >= k} exp s_(j)]``, the mean over groups, ``s_(k)`` the score of the k-th best.

    The best is chosen among all, the next among the rest, and so on (Plackett 1975; Luce 1959). With two texts this is
    the Bradley-Terry loss. Unlike the mean over pairs it grows with K, as a log-likelihood.

    Args:
        scores: ``(G, K)``.
        rank: ``(G, K)`` int64, 0 is best, without ties in a group; negative ranks mark absent texts.
        weight: ``(G,)`` by which a group's loss is multiplied.
    """
    order = torch.where(rank < 0, rank.max() + 1, rank).argsort(dim=1)
    here = (rank >= 0).gather(1, order)
    ordered = scores.gather(1, order)
    low = torch.finfo(scores.dtype).min
    rest = masked(ordered, here, low).flip(1).logcumsumexp(dim=1).flip(1)
    losses = masked(rest - ordered, here).sum(dim=1)
    return (losses if weight is None else weight.to(losses.dtype) * losses).sum() / len(scores)


def dpo_loss(log_ratio: Tensor, rank: Tensor, beta: float, weight: Tensor | None = None) -> Tensor:
    """``-log sigmoid(beta * (D_w - D_l))``, the mean over groups of the mean over their pairs (Rafailov et al. 2023,
    "Direct preference optimization", eq. 7). ``log 2`` where the policy is the reference.

    Args:
        log_ratio: ``(G, K)``, ``D = sum_t log pi - log ref`` of each response.
        rank: ``(G, K)`` int64, 0 is best; equal ranks make no pair, negative ranks mark absent responses.
        beta: coefficient of the implicit KL penalty.
        weight: ``(G,)`` by which a group's loss is multiplied.
    """
    return bradley_terry_loss(beta * log_ratio, rank, weight)


def ipo_loss(log_ratio: Tensor, rank: Tensor, beta: float, weight: Tensor | None = None) -> Tensor:
    """``(D_w - D_l - 1 / (2 beta))^2`` (Azar et al. 2023, "A general theoretical paradigm to understand learning from
    human preferences", eq. 17, tau = beta). Arguments as for :func:`dpo_loss`."""
    return mean_over_pairs(log_ratio, rank, lambda margin: (margin - 1 / (2 * beta)) ** 2, weight)


def conservative_dpo_loss(
    log_ratio: Tensor, rank: Tensor, beta: float, flip: float, weight: Tensor | None = None
) -> Tensor:
    """``-(1 - e) log sigmoid(m) - e log sigmoid(-m)``, ``m = beta (D_w - D_l)``: cross-entropy with labels smoothed by
    e = ``flip`` (Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO")."""

    def loss(margin: Tensor) -> Tensor:
        return -(1 - flip) * F.logsigmoid(margin) - flip * F.logsigmoid(-margin)

    return mean_over_pairs(beta * log_ratio, rank, loss, weight)


def robust_dpo_loss(log_ratio: Tensor, rank: Tensor, beta: float, flip: float, weight: Tensor | None = None) -> Tensor:
    """``[-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2 e)``, ``m = beta (D_w - D_l)``: where a share e =
    ``flip`` of the choices is recorded the wrong way round, its expectation is :func:`dpo_loss` of the right ones
    (Chowdhury et al. 2024, "Provably robust DPO: aligning language models with noisy feedback")."""

    def loss(margin: Tensor) -> Tensor:
        return (-(1 - flip) * F.logsigmoid(margin) + flip * F.logsigmoid(-margin)) / (1 - 2 * flip)

    return mean_over_pairs(beta * log_ratio, rank, loss, weight)


def simpo_loss(mean_logprob: Tensor, rank: Tensor, beta: float, margin: float, weight: Tensor | None = None) -> Tensor:
    """``-log sigmoid(beta (l_w - l_l) - margin)``, ``l = (1/|y|) sum_t log pi`` of each response, ``(G, K)``, without a
    reference (Meng et al. 2024, "SimPO", eq. 6)."""
    return mean_over_pairs(beta * mean_logprob, rank, lambda found: -F.logsigmoid(found - margin), weight)


def orpo_loss(mean_logprob: Tensor, rank: Tensor, odds_weight: float, weight: Tensor | None = None) -> Tensor:
    """``-l_w - odds_weight * log sigmoid(o_w - o_l)``, ``l = (1/|y|) sum_t log pi`` and ``o = l - log(1 - e^l)`` the
    log-odds of each response, ``(G, K)``: likelihood of the better one and an odds ratio, without a reference (Hong et
    al. 2024, "ORPO", eqs. 6 and 7)."""
    mean = mean_logprob.clamp(max=-torch.finfo(mean_logprob.dtype).eps)
    odds = bradley_terry_loss(mean - torch.log(-torch.expm1(mean)), rank, weight)
    better = ((rank[:, :, None] < rank[:, None, :]) & (rank >= 0)[:, :, None]).sum(dim=2)  # pairs that each one wins
    pairs = better.sum(dim=1)
    likelihood = (better * masked(mean_logprob, rank >= 0)).sum(dim=1) / pairs.clamp(min=1)
    likelihood = likelihood if weight is None else weight.to(likelihood.dtype) * likelihood
    return odds_weight * odds - likelihood.sum() / (pairs > 0).sum().clamp(min=1)


def kto_loss(log_ratio: Tensor, wanted: Tensor, baseline: float, beta: float, weight: Tensor | float = 1.0) -> Tensor:
    """``w sigmoid(beta (z - D))`` of a wanted response, ``w sigmoid(beta (D - z))`` of any other, the mean over
    responses (Ethayarajh et al. 2024, "KTO: model alignment as prospect theoretic optimization").

    Args:
        log_ratio: ``(B,)``, ``D = sum_t log pi - log ref``.
        wanted: ``(B,)`` bool.
        baseline: ``z``, an estimate of ``KL(pi || ref)`` without a gradient.
        weight: ``w``, of each response.
    """
    value = beta * (log_ratio - baseline)
    losses = torch.sigmoid(torch.where(wanted, -value, value))
    return (weight * losses).mean()


def k1(logprob: Tensor, ref_logprob: Tensor, mask: Tensor) -> Tensor:
    """``l = log pi - log ref`` per position, ``(B, T)``, on samples of pi.

    As a value: unbiased for KL(pi || ref), can be negative. As a reward with reward-to-go: the exact
    gradient. As a loss term: its expected gradient is 0. (Schulman 2020, "Approximating KL divergence".)
    """
    return masked(logprob, mask) - masked(ref_logprob, mask)


def k2(logprob: Tensor, ref_logprob: Tensor, mask: Tensor) -> Tensor:
    """``l^2 / 2`` per position, ``(B, T)``, on samples of pi.

    As a value: biased, low in variance, never negative. As a loss term per token: the gradient of the per-state KL,
    exact state by state, but it omits what an early token does to later KL; of a whole sequence's l it is exact.
    """
    return 0.5 * k1(logprob, ref_logprob, mask) ** 2


def k3(logprob: Tensor, ref_logprob: Tensor, mask: Tensor) -> Tensor:
    """``exp(-l) - 1 + l`` per position, ``(B, T)``, on samples of pi.

    As a value: unbiased and never negative; its variance can be infinite where pi is much smaller than ref. As a loss
    term per token: biased, the gradient of ``KL(ref || pi)`` at each state (GRPO uses it). As a reward: biased.
    """
    log_ratio = k1(logprob, ref_logprob, mask)
    return torch.expm1(-log_ratio) + log_ratio


def k3_ratio(logprob: Tensor, ref_logprob: Tensor, mask: Tensor) -> Tensor:
    """:func:`k3` times ``pi / sg(pi)``, ``(B, T)``: k3's value, and as a loss term k2's expected gradient."""
    return importance_ratio(logprob, logprob.detach(), mask) * k3(logprob, ref_logprob, mask)


def kl_estimate(kind: KLEstimator, logprob: Tensor, ref_logprob: Tensor, mask: Tensor) -> Tensor:
    """Estimate ``KL(pi || ref)`` per position, ``(B, T)`` nats, 0 in masked positions, as a term of a loss.

    The expected gradient on samples of pi, compared with that of the KL of whole sequences:

    - "k1": zero for every policy, for comparison; k1 belongs in the reward.
    - "k2": the gradient of the KL at each state, which omits what an early token does to later KL. On a bandit env,
      where one position is the whole sequence, it is exact.
    - "k3": biased even at each state: ``E[(1 - ref/pi) grad log pi]`` is the gradient of ``KL(ref || pi)``, the other
      direction. Used by GRPO.
    - "k3_ratio": as "k2" (DeepSeek-AI 2025, "DeepSeek-V3.2", eq. 7, with the ratio to the policy that sampled).
    - "full": as "k2", but summed over the vocabulary, so without the variance of a sample.

    On samples of another policy (several epochs) "full" stays the KL at the visited states; the others lack its weights
    (:func:`sampler_weights`).

    Args:
        logprob, ref_logprob: ``(B, T)``; for "full" all log-probabilities, ``(B, T, V)``.

    Raises:
        ValueError: no estimator of that name, or "full" without whole distributions.
    """
    if kind == "full":
        if logprob.ndim != 3:
            raise ValueError(f"kl_estimate: 'full' needs log-probabilities (B, T, V), got shape {tuple(logprob.shape)}")
        kl = logprob_kl(logprob, ref_logprob.to(logprob.dtype), torch.zeros_like(mask, dtype=torch.int64), mask=mask).kl
        assert kl is not None
        return kl
    estimators = {"k1": k1, "k2": k2, "k3": k3, "k3_ratio": k3_ratio}
    if kind not in estimators:
        raise ValueError(f"kl_estimate: no estimator is called {kind!r}; there are {', '.join(get_args(KLEstimator))}")
    return estimators[kind](logprob, ref_logprob.to(logprob.dtype), mask)


def explained_variance(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """``1 - Var(target - prediction) / Var(target)`` over unmasked positions, a scalar.

    1 is a perfect critic, 0 one no better than a constant. NaN if the target is constant.
    """
    target, error = target[mask], (target - prediction)[mask]
    variance = target.var(unbiased=False)
    return torch.where(variance > 0, 1 - error.var(unbiased=False) / variance, torch.full_like(variance, float("nan")))


def ratio_metrics(
    logprob: Tensor, old_logprob: Tensor, mask: Tensor, clip: float | None = None, clip_high: float | None = None
) -> dict[str, Tensor]:
    """Measure an update's distance from the sampling policy: ``ratio``, ``ratio_max``, ``approx_kl``,
    ``clip_fraction``, means over tokens.

    ``approx_kl`` is k3 on samples of the old policy, ``rho - 1 - log rho``: unbiased for KL(old || new), not negative.
    """
    with torch.no_grad():
        ratio = importance_ratio(logprob, old_logprob, mask)
        out = {
            "ratio": masked_mean(ratio, mask),
            "ratio_max": masked(ratio, mask).max(),
            "approx_kl": masked_mean(k3(old_logprob, logprob, mask), mask),
        }
        if clip is not None:
            high = clip if clip_high is None else clip_high
            out["clip_fraction"] = masked_mean(((1 - ratio > clip) | (ratio - 1 > high)).to(ratio.dtype), mask)
    return out


def tally(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum, count)`` of ``x`` over unmasked positions: a metric that adds up exactly over micro-batches."""
    return masked(x.detach(), mask).sum(), mask.sum()
