"""DPO and its family: learn from preferences directly, without a reward model and without sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.comparisons import Comparisons, Labeled, PreferenceConfig
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.preference_losses import (
    REFERENCE_FREE,
    PreferenceLossConfig,
    drift,
    label_loss,
    log_ratio,
    preference_loss,
)
from lm_envs.data.packed import PackedExamples
from lm_envs.model.loading import weights_hash
from lm_envs.settings import Rate, Size
from lm_envs.trajectories import Trajectories

_ROWS = 256  # per forward of the reference


@dataclass
class DPOConfig(PreferenceLossConfig, PreferenceConfig):
    """Settings of :class:`DPO`; `episodes` is the number of groups per iteration, with "kto" of responses."""

    learning_rate: Rate = 3e-4
    episodes: Size | None = 64
    """Groups of ranked texts per iteration; a group from a task is a pair. With "kto", responses."""


class DPO(Agent[DPOConfig]):
    """``-log sigmoid(beta * (D_w - D_l))``, ``D`` the summed log-ratio to the reference (Rafailov et al. 2023, eq. 7),
    or another of the family, by ``loss``; see :mod:`lm_envs.algos.ops.losses`.

    The reference is the policy at the agent's construction. A ranking of K texts counts as its pairs, each with weight
    ``1 / (K choose 2)``; KTO reads single responses, of rank 0 if wanted, and takes its baseline from prompts with
    other rows' responses, over the whole batch.

    ``data`` are preferences, in memory or on disk; without data, simulated annotators rank pairs of the task's
    reference's samples.

    Raises:
        ValueError: no preferences, a group without a pair, or for KTO labels that are all the same.
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
        self._labels = self.config.loss == "kto"
        if self._labels:
            self.unit = "sequence"
        self._baseline = 0.0
        self.data = self.rows_of(data)
        if isinstance(self.data, Labeled):
            self.data.check_both(self.name)

    def rows_of(self, data: Trajectories | PackedExamples | None) -> Comparisons | Labeled:
        """Data as batches are drawn from it, with the policy of now as their reference."""
        found = Labeled(self.name, data) if self._labels else Comparisons(self.name, data)
        if self.config.loss in REFERENCE_FREE:
            return found
        policy, held, rows = self.policy, found.data, self.config.micro_batch or _ROWS
        if isinstance(held, PackedExamples):  # reference log-probabilities are kept on disk
            self.reference_key = weights_hash(policy.model.named_parameters())
            device = policy.model.device
            held.keep_reference(self.reference_key, lambda traj: Before(policy, traj.to(device), rows).logprob, rows)
        else:
            found.data = replace(held, ref_logprob=Before(policy, held, rows).logprob.to(held.mask.device))
        return found

    def update(self, traj: Trajectories) -> dict[str, float]:
        if not self._labels:
            return super().update(traj)
        assert traj.rank is not None
        other = traj.select(traj.rank < 0).to(next(iter(self._parameters.values())).device)
        self._baseline = drift(log_ratio(other, Before(self.policy, other, self.config.micro_batch)))
        return {"kl_baseline": self._baseline} | super().update(traj.select(traj.rank >= 0))

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        if not self._labels:
            return preference_loss(traj, now, self.config)
        return label_loss(traj, now, self.config, self._baseline)

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        held = self.data.data
        if self.config.loss in REFERENCE_FREE:
            return {}, {}
        if isinstance(held, PackedExamples):
            return {}, {"reference": self.reference_key}
        assert held.ref_logprob is not None
        return {"ref_logprob": held.ref_logprob}, {}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        held = self.data.data
        if "reference" in values:
            held.keep_reference(values["reference"])
        elif tensors:
            held.ref_logprob = tensors["ref_logprob"].clone()
