"""vBoN: variational best-of-n, which learns to write in one sample what best-of-n would choose among n."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_envs.algos.engine.batching import rewards
from lm_envs.algos.engine.sampling import sample_beside
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.rloo import RLOO, RLOOConfig
from lm_envs.exact.best_of_n import log_gain
from lm_envs.settings import Several, Size
from lm_envs.trajectories import Trajectories


@dataclass
class VBoNConfig(RLOOConfig):
    """Settings of :class:`VBoN`; the defaults are for a small language model."""

    n: Several = 16
    """Samples of the best-of-n that is learned."""
    reference_samples: Size = 64
    """Samples of the reference, M, that a score is ranked among, for each prompt once; several times `n`."""


class VBoN(RLOO):
    """RLOO on the reward ``log p_n(y) / ref(y)``, without ties ``log n + (n - 1) log F(r)``, and a KL coefficient of 1.

    That minimizes ``KL(pi || p_n)``, p_n the distribution of best-of-n (Amini et al. 2024, "Variational best-of-n
    alignment").

    F is the distribution function of the score under the reference, estimated from M samples and the response itself.
    They are sampled when a prompt first comes up, and count as generated and scored. Text only.
    """

    Config = VBoNConfig
    config: VBoNConfig
    name = "vbon"
    published_kl_coef = 1.0

    def __init__(self, policy: Any, config: Any = None) -> None:
        super().__init__(policy, config)
        self._scores: dict[int, Tensor] = {}  # by prompt, (M,) ascending

    def update(self, traj: Trajectories) -> dict[str, float]:
        reward = rewards(traj).clone()
        if traj.prompt_index is None or traj.score is None or self.mdp is None or self.mdp.dense:
            raise ValueError("vbon learns from text and a score per response, which it ranks among the reference's")
        if missing := sorted(set(traj.prompt_index.tolist()) - self._scores.keys()):
            self._scores |= zip(missing, self._reference_scores(np.array(missing)), strict=True)
        held = torch.stack([self._scores[index] for index in traj.prompt_index.tolist()]).to(traj.score.device)
        score = traj.score.to(held.dtype)[:, None].contiguous()
        below = torch.searchsorted(held, score)[:, 0]
        upto = torch.searchsorted(held, score, right=True)[:, 0] + 1  # with the response itself
        count = held.shape[1] + 1
        gain = log_gain(below.double() / count, upto.double() / count, self.config.n).to(traj.score.dtype)
        reward[torch.arange(len(traj)), traj.lengths - 1] += (gain - traj.score).to(reward.dtype)
        return {"log_gain": float(gain.mean())} | super().update(replace(traj, reward=reward))

    def _reference_scores(self, prompts: NDArray[np.int64]) -> Tensor:
        """Scores of the reference's samples for each prompt ``(N,)``: ``(N, M)`` ascending, float64."""
        mdp, count = self.mdp, self.config.reference_samples
        rows = prompts.repeat(count)
        policy = LMPolicy.for_mdp(mdp, mdp.reference)
        episodes = rows * count + np.tile(np.arange(count), len(prompts))
        response = sample_beside(self, policy, torch.as_tensor(mdp.prompt(rows)), episodes)
        scores = mdp.score(rows, response.cpu().numpy()).sum(axis=1)
        return torch.as_tensor(np.sort(scores.reshape(len(prompts), count), axis=1), dtype=torch.float64)

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self._scores:
            return {}, {}
        return {"prompts": torch.tensor(list(self._scores)), "scores": torch.stack(list(self._scores.values()))}, {}

    def restore_extra(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        if tensors:  # what was sampled for a prompt is a function of the seed, so it need not be forgotten
            rows = zip(tensors["prompts"].tolist(), tensors["scores"], strict=True)
            self._scores = {index: scores.clone() for index, scores in rows}
