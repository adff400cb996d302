"""TRPO: a natural-gradient step whose length is set by how far it moves the policy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_envs.algos.engine.batching import Before, select
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.ops.advantages import masked
from lm_envs.algos.ops.conjugate_gradients import conjugate_gradients
from lm_envs.algos.ops.losses import k3, ppo_penalty_loss, sequence_mean, tally
from lm_envs.algos.rloo import RLOO, RLOOConfig
from lm_envs.settings import Count, Positive
from lm_envs.trajectories import Trajectories

LARGEST = 2**28  # log-probabilities of whole distributions that are held for a batch, 1 GiB in float32


@dataclass
class TRPOConfig(RLOOConfig):
    """Settings of :class:`TRPO`; Adam's (`learning_rate`, `adam_eps`, `max_grad_norm`) have no effect."""

    old_kl_limit: Positive = 0.01
    """Nats per token (on a bandit env, per response) that a batch may move the policy; `anneal` lowers it to 0."""
    cg_steps: Count = 10
    """Steps of conjugate gradients, each a forward and a backward pass."""
    damping: Positive = 0.01
    """Multiple of the identity that is added to the Fisher matrix."""
    backtracks: Count = 10
    """Most halvings of the step, each a forward pass; if none is good enough, the batch changes nothing."""


class TRPO(RLOO):
    """``max E[A rho]`` subject to ``E_s[KL(old || new)] <= old_kl_limit`` (Schulman et al. 2015, "Trust region policy
    optimization", eq. 14), with RLOO's advantage.

    The step is ``sqrt(2 limit / x'Fx) x`` with ``(F + damping I) x = g``, solved by conjugate gradients, F the Fisher
    matrix, the Hessian of the KL; it is halved until surrogate and KL are as they should be (appendix C). A product
    with F is a difference of the KL's gradients. The KL is exact over the actions at the batch's states; on a bandit
    env, whose actions cannot be listed, it is estimated from those that were sampled.

    A batch costs ``cg_steps + 2`` forward and backward passes and up to ``backtracks`` forwards, on each process all of
    it, and holds whole distributions: it is for small models, in float32. The gradient is RLOO's, which is exact.
    """

    Config = TRPOConfig
    config: TRPOConfig
    name = "trpo"

    def __init__(self, policy: Any, config: TRPOConfig | None = None) -> None:
        super().__init__(policy, config)
        if coarse := {p.dtype for p in self._parameters.values()} - {torch.float32, torch.float64}:
            raise ValueError(f"trpo takes differences of gradients, which {min(map(str, coarse))} rounds away: use ppo")
        self.optimizer = _TrustRegion(self._parameters.values(), self.take_natural_step)  # type: ignore[assignment]
        self._moved = {"old_kl": 0.0, "step_share": 0.0}

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        fixed = super().prepare(traj, before) | {"old_logprob": before.logprob}
        if not traj.is_bandit:
            width = self.policy.evaluate(traj.select(slice(0, 1))).log_probs().shape[2]
            if (held := traj.mask.numel() * width) > LARGEST:
                why = f"trpo holds whole distributions, here {held:,} numbers, more than {LARGEST:,}"
                raise ValueError(f"{why}: sample fewer episodes, or use ppo-klpen, which estimates the KL")
            fixed["old"] = before.log_probs()
        self._batch = traj, {name: x.to(before.logprob.dtype) for name, x in fixed.items()}
        return fixed

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        each = ppo_penalty_loss(now.logprob, fixed["old_logprob"], fixed["advantage"], traj.mask, 0.0)
        policy = sequence_mean(each, traj.mask)
        metrics: dict[str, Metric] = {"policy_loss": policy.detach(), "entropy": tally(now.entropy, traj.mask)}
        return policy + sequence_mean(self.kl_penalty(traj, now), traj.mask), metrics

    def update(self, traj: Trajectories) -> dict[str, float]:
        return super().update(traj) | self._moved

    def take_natural_step(self) -> None:
        """Step from the gradients that the parameters hold."""
        parameters, config = list(self._parameters.values()), self.config
        limit = config.old_kl_limit * self.learning_rate / config.learning_rate
        start = torch.cat([p.detach().flatten() for p in parameters])
        gradient = -torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        self._moved = {"old_kl": 0.0, "step_share": 0.0}
        if not gradient.any():
            return

        def product(v: Tensor) -> Tensor:
            h = torch.finfo(v.dtype).eps ** (1 / 3) * (1 + start.norm()) / v.norm()
            _put(start + h * v, parameters)
            return self._gap_gradient(parameters) / h + config.damping * v

        x = conjugate_gradients(product, gradient, config.cg_steps)
        step = x * (2 * limit / (x @ product(x))).sqrt()
        _put(start, parameters)
        reached = self._loss_and_gap()[0]
        for share in (0.5**k for k in range(config.backtracks)):
            _put(start + share * step, parameters)
            loss, kl = self._loss_and_gap()
            if loss < reached and kl <= limit:
                self._moved = {"old_kl": kl, "step_share": share}
                return
        _put(start, parameters)

    def _parts(self) -> list[tuple[Trajectories, dict[str, Tensor]]]:
        traj, fixed = self._batch
        rows = torch.arange(len(traj), device=traj.mask.device).split(self.config.micro_batch or len(traj))
        return [self._batch] if len(rows) == 1 else [select(traj, fixed, part) for part in rows]

    def _gap(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> Tensor:
        """A part's share of the mean KL(old || new) over the batch's positions."""
        if "old" in fixed:
            old = fixed["old"]
            each = masked(old.exp() * (old - now.log_probs()), old > -torch.inf).sum(dim=2)
        else:
            each = k3(fixed["old_logprob"], now.logprob, traj.mask)
        return masked(each, traj.mask).sum() / self._batch[0].mask.sum()

    def _gap_gradient(self, parameters: list[nn.Parameter]) -> Tensor:
        found = []
        for traj, fixed in self._parts():
            kl = self._gap(traj, self.policy.evaluate(traj), fixed)
            parts = torch.autograd.grad(kl, parameters, allow_unused=True, materialize_grads=True)
            found.append(torch.cat([g.flatten() for g in parts]))
        return torch.stack(found).sum(dim=0)

    @torch.no_grad()
    def _loss_and_gap(self) -> tuple[float, float]:
        loss = kl = 0.0
        for traj, fixed in self._parts():
            now = self.policy.evaluate(traj)
            loss, kl = loss + float(self.loss(traj, now, fixed)[0]) * len(traj), kl + float(self._gap(traj, now, fixed))
        return loss, kl  # the loss as a sum over rows


@torch.no_grad()
def _put(flat: Tensor, parameters: list[nn.Parameter]) -> None:
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view_as(p))


class _TrustRegion(torch.optim.SGD):
    def __init__(self, parameters: Any, step: Callable[[], None]) -> None:
        super().__init__(parameters)
        self._natural = step

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._natural()
