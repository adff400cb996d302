"""The coefficient of the KL penalty, steered toward a target KL to the reference in nats per sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class AdaptiveKL:
    """Proportional controller in log space (Ziegler et al. 2019, "Fine-tuning language models from human preferences",
    section 2.2).

    ``beta <- beta * (1 + e * n / horizon)``, ``e = clip(KL / target - 1, -0.2, 0.2)``; if the batch has more episodes n
    than the horizon, ``beta <- beta * (1 + e) ** (n / horizon)``, so that the coefficient stays positive.

    Attributes:
        coef: the current coefficient.
        target: KL to the reference to reach, nats per **sequence**.
        horizon: episodes over which the clipped error compounds once.

    Raises:
        ValueError: target, horizon or coefficient is not positive.
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
        """Update the coefficient after ``episodes`` episodes of mean ``kl`` (nats per sequence), and return it."""
        error = min(max(kl / self.target - 1, -self.limit), self.limit)
        share = episodes / self.horizon
        # Beyond the horizon the published factor would reach 0 and turn negative, so the error compounds instead.
        self.coef *= 1 + error * share if share <= 1 else (1 + error) ** share
        return self.coef
