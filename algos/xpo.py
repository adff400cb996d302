"""XPO: online DPO against the reference's samples, with a bonus for leaving them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import rewards
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.engine.preference_losses import REFERENCE_FREE, PreferenceLossConfig, preference_loss
from lm_envs.algos.engine.sampling import sample_beside
from lm_envs.algos.ops.advantages import masked
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.model.tokens import same_width
from lm_envs.settings import NonNegative, Rate
from lm_envs.trajectories import Trajectories, whole_episodes


@dataclass
class XPOConfig(PreferenceLossConfig):
    """Settings of :class:`XPO`; the defaults are for a small language model."""

    whole_episodes = True

    learning_rate: Rate = 1e-3
    optimism: NonNegative = 1e-3
    """Weight of the log-probability of the reference's samples, which is lowered; the paper's alpha."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss in ("kto", *REFERENCE_FREE):
            raise ValueError(f"xpo learns from pairs with the reference's samples: loss cannot be {self.loss!r}")


class XPO(Agent[XPOConfig]):
    """``-log sigmoid(beta (D_w - D_l)) + optimism * log pi(y')`` between a sample y of the policy and a sample y' of
    the reference (Xie et al. 2024, "Exploratory preference optimization", algorithm 1).

    The last term lowers what the reference already covers, whichever sample won, and so explores beyond it. The reward
    model's score chooses; ties are skipped. Another ``loss`` of :class:`~lm_envs.algos.dpo.DPO` on pairs may take the
    first's place. Each response takes one of the reference, which is charged. Text only.
    """

    Config = XPOConfig
    name = "xpo"
    unit = "group"

    def update(self, traj: Trajectories) -> dict[str, float]:
        rewards(traj)  # raises where there are none
        if self.mdp is None or traj.prompt is None or traj.response is None or traj.prompt_index is None:
            raise ValueError("xpo compares with the reference's samples: give it a text env, or set .mdp")
        assert traj.score is not None
        policy = LMPolicy.for_mdp(self.mdp, self.mdp.reference)
        prompt, own = traj.prompt.cpu(), traj.response.cpu()
        other = sample_beside(self, policy, prompt, self.episodes_done + np.arange(len(traj))).cpu()
        score = self.mdp.score(traj.prompt_index.cpu().numpy(), other.numpy()).sum(axis=1)
        gap = traj.score.cpu() - torch.as_tensor(score)
        metrics = {"win_share": float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())}
        kept = gap.nonzero().squeeze(1)
        if not len(kept):
            self.iterations_done += 1
            return metrics | {"updates": 0}
        both = same_width(own[kept], other[kept])
        # A pair is two rows in a row, the policy's first.
        prompt, response = prompt[kept].repeat_interleave(2, dim=0), torch.stack(both, dim=1).flatten(0, 1)
        pairs = whole_episodes(prompt, response, ref_logprob=self.mdp.reference_logprob(prompt, response).cpu())
        pairs.rank = torch.stack([gap[kept] < 0, gap[kept] > 0], dim=1).long().flatten()
        pairs.group = torch.arange(len(kept)).repeat_interleave(2)
        return metrics | super().update(pairs)

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        loss, metrics = preference_loss(traj, now, self.config)
        covered = masked(now.logprob, traj.mask).sum(dim=1)[1::2].mean()
        return loss + self.config.optimism * covered, metrics | {"covered": covered.detach()}
