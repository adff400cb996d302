"""The coefficient of the KL penalty, steered towards a target; and when to stop an update early.

Two different KLs: the penalty's is of the policy against the *reference*, in nats per sequence; the early
stop's is of the policy against the one that *sampled*, in nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class AdaptiveKL:
    """Proportional controller in log space (Ziegler et al. 2019, "Fine-tuning language models from human
    preferences", section 2.2).

    ``beta <- beta * (1 + e * n / horizon)``, ``e = clip(KL / target - 1, -0.2, 0.2)``; where the n episodes of a batch
    are more than the horizon, ``beta <- beta * (1 + e) ** (n / horizon)``, so that the coefficient stays positive.

    Attributes:
        coef: the coefficient now.
        target: wanted KL to the reference, nats per **sequence**.
        horizon: episodes over which the clipped error compounds once.

    Raises:
        ValueError: a target or horizon that is not positive, or a coefficient that a multiplication can not
            move.
    """

    coef: float
    target: float
    horizon: float
    limit: float = 0.2

    def __post_init__(self) -> None:
        if self.target <= 0 or self.horizon <= 0:
            raise ValueError(f"AdaptiveKL needs target > 0 and horizon > 0, got {self.target} and {self.horizon}")
        if self.coef <= 0:
            raise ValueError(f"AdaptiveKL multiplies its coefficient, so it must start above 0, got {self.coef}")

    def update(self, kl: float, episodes: int) -> float:
        """Moves the coefficient after ``episodes`` episodes of mean ``kl`` (nats per sequence), and
        returns it.
        """
        error = min(max(kl / self.target - 1, -self.limit), self.limit)
        share = episodes / self.horizon
        # Beyond the horizon the published factor would reach 0 and turn negative: there the error compounds.
        self.coef *= 1 + error * share if share <= 1 else (1 + error) ** share
        return self.coef


def exceeds(approx_kl: float, limit: float | None) -> bool:
    """Whether an update has moved further from the sampling policy than ``limit`` nats per token (None
    never stops).
    """
    return limit is not None and approx_kl > limit
