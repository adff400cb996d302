"""Returns, advantages and baselines: pure functions on ``(B, T)`` tensors and a mask.

The mask is True on real steps, which are a prefix of every row. Masked positions change nothing, even if they hold NaN;
results are 0 there. The functions are meant to be called without gradients.
"""

import torch
from torch import Tensor

_EPS = 1e-8


def masked(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """Return ``x`` with ``fill`` in masked positions. A product with the mask would keep NaN (``NaN * 0 = NaN``)."""
    return torch.where(mask, x, torch.full_like(x, fill))


def discounted_returns(reward: Tensor, mask: Tensor, gamma: float = 1.0, bootstrap: Tensor | None = None) -> Tensor:
    """Return the reward-to-go ``G_t = r_t + gamma * G_{t+1}``, with ``G_L = bootstrap`` after the last of L real steps.

    Sutton and Barto, "Reinforcement Learning", 2nd ed., eq. 3.9. The first column is the return of the row.

    Args:
        bootstrap: ``(B,)`` value after the row: V(final_obs) if truncated, 0 if terminated (law 5 in docs/laws.md).
            None is 0.
    """
    future = torch.zeros_like(reward[:, 0]) if bootstrap is None else bootstrap.to(reward.dtype)
    out = torch.zeros_like(reward)
    for t in reversed(range(reward.shape[1])):
        future = torch.where(mask[:, t], reward[:, t] + gamma * future, future)
        out[:, t] = torch.where(mask[:, t], future, out[:, t])
    return out


def value_at_end(value: Tensor, mask: Tensor) -> Tensor:
    """Return ``(B,)``, the entry of ``value (B, T+1)`` after each row's last real step."""
    return value.gather(1, mask.sum(dim=1, keepdim=True)).squeeze(1)


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalized advantage estimation.

    ``A_t = delta_t + gamma * lam * A_{t+1}`` with ``delta_t = r_t + gamma * V_{t+1} - V_t`` (Schulman et al. 2016,
    "High-dimensional continuous control using generalized advantage estimation", eq. 16). ``lam = 1`` is the
    bootstrapped return minus V, ``lam = 0`` the one-step error.

    Args:
        value: ``(B, T+1)``; the entry after the last real step is 0 if the row terminated and V(final_obs) if it was
            truncated. Later entries are ignored.

    Raises:
        ValueError: ``value`` is not one column wider than ``reward``.
    """
    if value.shape != (reward.shape[0], reward.shape[1] + 1):
        raise ValueError(f"gae: value must be (B, T+1) for reward {tuple(reward.shape)}, got {tuple(value.shape)}")
    delta = masked(reward + gamma * value[:, 1:] - value[:, :-1], mask)
    return discounted_returns(delta, mask, gamma * lam)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return ``(x - mean) / sqrt(var + 1e-8)`` with mean and population variance over the unmasked positions only.

    Args:
        shift_mean: False adds the mean back. For rewards, subtracting it would add a constant per token, a length bias.
    """
    count = mask.sum().clamp(min=1)
    mean = masked(x, mask).sum() / count
    centred = masked(x - mean, mask)
    scaled = centred / torch.sqrt((centred**2).sum() / count + _EPS)
    return scaled if shift_mean else masked(scaled + mean, mask)


def extend(signal: Tensor, mask: Tensor) -> Tensor:
    """Repeat each row's last real entry over its masked positions, ``(B, T)``, so that rows of different lengths can be
    compared at every step."""
    last = signal.gather(1, mask.sum(dim=1, keepdim=True) - 1)
    return torch.where(mask, signal, last)


def _group_sums(x: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return, per row, the sum of ``x`` over its group and the group's size (broadcastable against ``x``)."""
    if group is None:
        inverse, count = torch.zeros(len(x), dtype=torch.int64, device=x.device), 1
    else:
        found, inverse = torch.unique(group, return_inverse=True)
        count = len(found)
    sums = x.new_zeros((count, *x.shape[1:])).index_add(0, inverse, x)
    sizes = x.new_zeros(count).index_add(0, inverse, torch.ones_like(inverse, dtype=x.dtype))
    return sums[inverse], sizes[inverse].reshape(-1, *([1] * (x.ndim - 1)))


def group_mean(x: Tensor, group: Tensor | None = None) -> Tensor:
    """Return the mean of ``x (B, ...)`` over the rows of each row's group; None is one group of all."""
    sums, sizes = _group_sums(x, group)
    return sums / sizes


def group_std(x: Tensor, group: Tensor | None = None) -> Tensor:
    """Return the population standard deviation of ``x (B, ...)`` over each row's group; None is one group of all."""
    return group_mean((x - group_mean(x, group)) ** 2, group).sqrt()


def differing(x: Tensor, group: Tensor | None = None) -> Tensor:
    """Return ``(B,)`` bool: whether ``x (B,)`` differs within a row's group; None is one group of all (Yu et al. 2025,
    "DAPO", eq. 11: what is equal teaches nothing)."""
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device) if group is None else group
    inverse = torch.unique(group, return_inverse=True)[1]
    low, high = (x.clone().scatter_reduce(0, inverse, x, how, include_self=False) for how in ("amin", "amax"))
    return (low < high)[inverse]


def overlong_penalty(lengths: Tensor, limit: int, share: float) -> Tensor:
    """Return ``(B,)`` in [-1, 0]: 0 up to ``(1 - share) * limit`` tokens, then linearly down to -1 at ``limit`` (Yu et
    al. 2025, "DAPO", eq. 13, where share is 4,096 of 20,480)."""
    return ((limit * (1 - share) - lengths) / (limit * share)).clamp(-1, 0)


def leave_one_out(x: Tensor, group: Tensor | None = None) -> Tensor:
    """Return the mean of ``x (B, ...)`` over the *other* rows of each row's group, an unbiased baseline.

    ``b_i = (sum_j x_j - x_i) / (K - 1)`` (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for
    free!"; RLOO, Ahmadian et al. 2024). A group of None is one group of all rows.

    Raises:
        ValueError: a group has a single row.
    """
    sums, sizes = _group_sums(x, group)
    if bool((sizes < 2).any()):
        raise ValueError("leave_one_out needs at least two episodes per prompt: set group_size >= 2 on env and agent")
    return (sums - x) / (sizes - 1)


def running_mean(mean: float, weight: float, x: float, decay: float) -> tuple[float, float]:
    """Update the weighted sum of the values so far and the sum of their weights, both 0 at first, with a value ``x``;
    ``mean / weight`` is then an exponential moving average without bias toward the start (Adam's correction)."""
    return decay * mean + (1 - decay) * x, decay * weight + (1 - decay)
