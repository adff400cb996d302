"""The KL coefficient an agent trains with, and its controller."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lm_envs.algos.engine.config import AgentConfig
from lm_envs.env.mdp import TextMDP, check_kl_coef
from lm_envs.env.report import text_envs


@dataclass
class AdaptiveKL:
    """Proportional-integral controller of the log of a coefficient.

    ``log beta = log base + 2 clip(e, -0.5, 1)`` and ``log base <- log base + clip(e, -0.2, 0.2) / horizon``, with
    ``e = KL / target - 1``. The second alone is the controller of Ziegler et al. 2019, "Fine-tuning language models
    from human preferences", section 2.2: it moves slowly, and the policy follows it slowly, so that the KL swings far
    past its target, or a short run ends first. The first answers at once, and lets the KL come to rest.

    Args:
        coef: the coefficient to start with.
        target: KL to the reference to reach, nats per **sequence**.
        horizon: **iterations** over which the clipped error compounds once.
    """

    coef: float
    target: float
    horizon: float
    gain: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        for name, value in (("target", self.target), ("horizon", self.horizon)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"AdaptiveKL needs a finite {name} above 0, got {value}")
        if not (self.coef > 0 and math.isfinite(self.coef)):
            raise ValueError(f"AdaptiveKL multiplies its coefficient, so it must start above 0, got {self.coef}")
        self.base = self.coef

    def update(self, kl: float) -> float:
        """Update the coefficient after an iteration of mean ``kl`` (nats per sequence), and return it."""
        error = kl / self.target - 1
        self.base *= math.exp(min(max(error, -0.2), 0.2) / self.horizon)
        self.coef = self.base * math.exp(self.gain * min(max(error, -0.5), 1.0))
        return self.coef


class KLCoefficient:
    """An agent's view of the coefficient, which the MDP of its env holds.

    Args:
        name: the algorithm's.
        published: the coefficient that the algorithm was published with, None where it has none.
    """

    def __init__(self, name: str, published: float | None) -> None:
        self.name, self.published = name, published
        self._control: AdaptiveKL | None = None
        self.mdp: TextMDP | None = None  # of the env that was settled last

    def settle(self, env: Any, config: AgentConfig, in_reward: bool) -> float | None:
        """Put the coefficient into the env's MDP and return it; None where the env has no penalty.

        An explicit setting, in the config or on the env, comes before the published coefficient, and that before the
        task's. ``kl_target`` steers it from there.

        Args:
            in_reward: whether the env charges the penalty; else it is a term of the loss.

        Raises:
            ValueError: two explicit settings differ, or there is a ``kl_target`` and no penalty to steer.
        """
        mdps = [inner.mdp for inner in text_envs(env)]
        if not mdps:
            if config.kl_target is not None:
                raise ValueError(f"{self.name}: kl_target steers a text env's KL penalty, and this env has none")
            return None
        explicit = [config.kl_coef, *(mdp.explicit_kl_coef for mdp in mdps)]
        given = {coef for coef in explicit if coef is not None}
        if len(given) > 1:
            raise ValueError(
                f"{self.name}: kl_coef is {' and '.join(map(str, sorted(given)))} in the settings of agent and env: "
                "set it in one place, or to one number"
            )
        default = mdps[0].task.kl_coef if self.published is None else self.published
        coef = given.pop() if given else default
        if config.kl_target is not None:
            self._control = self._control or AdaptiveKL(coef, config.kl_target, config.kl_horizon)
            coef = self._control.coef
        check_kl_coef(coef)
        for mdp in mdps:
            mdp.kl_coef, mdp.kl_in_reward = coef, in_reward
        self.mdp = mdps[0]
        return coef

    def now(self, config: AgentConfig) -> float:
        """The coefficient of a penalty in the loss; ValueError where nothing names one and no env was settled."""
        if self.mdp is not None:
            return self.mdp.kl_coef
        steered = None if self._control is None else self._control.coef
        for coef in (steered, config.kl_coef, self.published):
            if coef is not None:
                return coef
        raise ValueError(f"{self.name}: kl_coef=None takes the env's, and no env was seen yet: set kl_coef")

    @property
    def steered(self) -> list[float] | None:
        """The coefficient as ``kl_target`` has steered it, and the controller's base, for checkpoints; None without a
        target."""
        return None if self._control is None else [self._control.coef, self._control.base]

    def steer(self, kl: float) -> None:
        """Move the coefficient after an iteration of mean ``kl``, nats per sequence."""
        if self._control is not None:
            self._control.update(kl)

    def restore(self, steered: list[float] | None, config: AgentConfig) -> None:
        """Take back :attr:`steered`."""
        self._control = None
        if steered is not None and config.kl_target is not None:
            self._control = AdaptiveKL(steered[0], config.kl_target, config.kl_horizon)
            self._control.base = steered[1]
