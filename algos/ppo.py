"""PPO: several epochs per batch within a clipped distance of the policy that sampled it."""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.policy_gradient import ActorCritic, ActorCriticConfig
from lm_envs.algos.ops.losses import ppo_clip_loss, ratio_metrics, row_weights, value_loss
from lm_envs.settings import Count, NonNegative, Positive
from lm_envs.trajectories import Trajectories


@dataclass
class ProximalConfig(ActorCriticConfig):
    """What PPO and PPO-KLPEN share; the defaults are for a small language model."""

    epochs: Count = 4
    minibatches: Count = 2
    value_clip: Positive | None = 0.2
    """Distance from the batch's old value beyond which a value is clipped. None does not clip."""
    kl_stop: NonNegative | None = None
    """KL of a minibatch to the sampling policy, in nats per token, that ends the epochs on a batch. None: no limit."""


C = TypeVar("C", bound=ProximalConfig)


class Proximal(ActorCritic[C]):
    """Several epochs per batch on a surrogate objective, with a learned value: what PPO and PPO-KLPEN share.

    ``rho`` is the ratio to the policy before the update, re-evaluated on the batch, so that it is exactly 1 at first
    whatever the precision of sampling.
    """

    @property
    def ratio_clip(self) -> tuple[float | None, float | None]:
        """The distances below and above 1 beyond which the metric counts a ratio as clipped; None without a clip."""
        return None, None

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        fixed = super().prepare(traj, before)
        return {**fixed, "old_logprob": before.logprob, "old_value": before.value[:, :-1]}

    def critic_loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> Tensor:
        old, clip = fixed["old_value"], self.config.value_clip
        return value_loss(now.value[:, :-1], fixed["target"], traj.mask, old, clip)

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        loss, metrics = super().loss(traj, now, fixed)
        return loss, {**metrics, **ratio_metrics(now.logprob, fixed["old_logprob"], traj.mask, *self.ratio_clip)}

    def should_stop(self, metrics: dict[str, float]) -> bool:
        return self.config.kl_stop is not None and metrics["approx_kl"] > self.config.kl_stop


@dataclass
class PPOConfig(ProximalConfig):
    """Settings of :class:`PPO`; the defaults are for a small language model."""

    clip: Positive = 0.2
    """Distance of the ratio to the sampling policy from 1 beyond which it is clipped."""
    clip_high: Positive | None = None
    """The same distance above 1; None is `clip`."""
    loss_mean: Literal["minibatch", "response", "token", "sum"] = "minibatch"
    """What has the same weight in the loss: each token of a minibatch, each response, each token of the whole batch, or
    (sum) each token, with responses as long as they are."""


class PPO(Proximal[PPOConfig]):
    """Proximal policy optimization with the clipped objective, ``max(-A rho, -A clip(rho))`` (Schulman et al. 2017,
    eq. 7).

    On text the KL penalty is in the reward, with a fixed or an adaptive coefficient (Ziegler et al. 2019).
    """

    Config = PPOConfig
    name = "ppo"

    def __init__(self, policy: Any, config: PPOConfig | None = None) -> None:
        super().__init__(policy, config)
        self.whole_batch = self.config.loss_mean != "minibatch"

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        fixed, mean = super().prepare(traj, before), self.config.loss_mean
        if mean == "minibatch":
            return fixed
        return fixed | {"weight": row_weights(mean, traj.mask) / row_weights("token", traj.mask)}

    def surrogate(self, logprob: Tensor, fixed: dict[str, Tensor], mask: Tensor) -> Tensor:
        return ppo_clip_loss(logprob, fixed["old_logprob"], fixed["advantage"], mask, *self.ratio_clip)

    @property
    def ratio_clip(self) -> tuple[float, float | None]:
        return self.config.clip, self.config.clip_high
