"""DPO: learn from preferences directly, without a reward model and without sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.comparisons import Comparisons, PreferenceConfig, by_group, group_weights
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.ops.advantages import masked
from lm_envs.algos.ops.losses import dpo_loss
from lm_envs.algos.policies.adaptation import weights_hash
from lm_envs.data.packed import PackedExamples
from lm_envs.settings import Positive, Rate, Size
from lm_envs.trajectories import Trajectories

_ROWS = 256  # per forward of the reference


@dataclass
class DPOConfig(PreferenceConfig):
    """Settings of :class:`DPO`; `episodes` is the number of groups per iteration."""

    learning_rate: Rate = 3e-4
    episodes: Size | None = 64
    """Groups of ranked texts per iteration; a group from a task is a pair."""
    beta: Positive = 0.1
    """Coefficient of the implicit KL penalty."""


class DPO(Agent[DPOConfig]):
    """``-log sigmoid(beta * (D_w - D_l))``, ``D`` the summed log-ratio to the reference (Rafailov et al. 2023, eq. 7).

    The reference is the policy at the agent's construction. A ranking of K texts counts as its pairs, each with weight
    ``1 / (K choose 2)``.

    ``data`` are preferences, in memory or on disk; without data, simulated annotators rank pairs of the task's
    reference's samples.

    Raises:
        ValueError: no preferences, or a group without a pair.
    """

    Config = DPOConfig
    name = "dpo"
    unit = "group"
    needs_data = True
    preference_data = True

    def __init__(
        self, policy: Any, config: DPOConfig | None = None, data: Trajectories | PackedExamples | None = None
    ) -> None:
        super().__init__(policy, config)
        self.data = Comparisons(self.name, data)
        held, rows = self.data.data, self.config.micro_batch or _ROWS
        if isinstance(held, PackedExamples):  # reference log-probabilities are kept on disk
            self.reference_key = weights_hash(policy.model.named_parameters())
            device = policy.model.device
            held.keep_reference(self.reference_key, lambda traj: Before(policy, traj.to(device), rows).logprob, rows)
            return
        reference = Before(policy, held, rows).logprob.to(held.mask.device)
        self.data.data = replace(held, ref_logprob=reference)

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        return preference_loss(traj, now, self.config.beta)

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        held = self.data.data
        if isinstance(held, PackedExamples):
            return {}, {"reference": self.reference_key}
        assert held.ref_logprob is not None
        return {"ref_logprob": held.ref_logprob}, {}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        held = self.data.data
        if isinstance(held, PackedExamples):
            held.keep_reference(values["reference"])
        else:
            held.ref_logprob = tensors["ref_logprob"].clone()


def preference_loss(traj: Trajectories, now: Any, beta: float) -> tuple[Tensor, dict[str, Metric]]:
    """Return :func:`~lm_envs.algos.ops.losses.dpo_loss` of a batch of whole groups, and its metrics."""
    assert traj.group is not None and traj.rank is not None and traj.ref_logprob is not None
    moved = masked(now.logprob, traj.mask) - masked(traj.ref_logprob, traj.mask).to(now.logprob.dtype)
    ratio, _ = by_group(moved.sum(dim=1), traj.group, 0.0)
    ranks, _ = by_group(traj.rank, traj.group, -1)
    loss = dpo_loss(ratio, ranks, beta, group_weights(traj))
    pairs = (ranks[:, :, None] < ranks[:, None, :]) & (ranks >= 0)[:, :, None]
    margin = (ratio[:, :, None] - ratio[:, None, :]).detach()
    return loss, {
        "dpo_loss": loss.detach(),
        "accuracy": ((pairs & (margin > 0)).sum(), pairs.sum()),
        "margin": (beta * masked(margin, pairs).sum(), pairs.sum()),
    }
