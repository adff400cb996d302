"""On-policy distillation: come near a teacher on texts that the policy itself writes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import Before
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.ops.losses import kl_estimate, policy_gradient_loss, sequence_mean, tally
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.policies.tabular import TabularPolicy
from lm_envs.exact.solver import Exact
from lm_envs.model.loading import load_policy, load_tokenizer
from lm_envs.settings import Rate
from lm_envs.tasks.base import TextTask
from lm_envs.trajectories import Trajectories, whole_episodes

OPTIMUM = "optimum"


@dataclass
class DistillationConfig(AgentConfig):
    """Settings of :class:`Distillation`; the defaults are for a small language model."""

    whole_episodes = True

    learning_rate: Rate = 1e-3
    teacher: str | None = None
    """Folder or hub name of a causal language model with the policy's vocabulary, or `optimum`, the exactly optimal
    policy of a task that can be enumerated; None takes the agent's `teacher`."""
    as_reward: bool = False
    """Also count what a token does to the KL at later positions, as a reward, so that the gradient is exact."""


class Distillation(Agent[DistillationConfig]):
    """``(1/B) sum_i sum_t KL(pi || teacher)`` at each position of texts sampled from the policy, summed exactly over
    the vocabulary (Agarwal et al. 2024, "On-policy distillation of language models", the reverse KL on own samples).

    The gradient stops at the visited states: it omits that an early token decides which KLs come later. ``as_reward``
    adds that part, ``-log pi(a_t) * (sum of later -KL - mean over the batch's others)``: then it is the exact gradient
    of the KL of whole responses. Both rest at the teacher, where the policy can be it. The env's reward counts for
    nothing.

    Attributes:
        teacher: a policy whose ``evaluate(traj).log_probs()`` is the teacher's distribution; None loads the setting's.
    """

    Config = DistillationConfig
    name = "distillation"
    unit = "sequence"
    teacher: Any = None

    @classmethod
    def lacks(cls, task: TextTask, config: DistillationConfig) -> str | None:
        return None if config.teacher is not None else "a teacher (set `teacher` to a model's folder, or `optimum`)"

    @property
    def uses_reward(self) -> bool:
        return False

    def settle_kl_coef(self, env: Any) -> float | None:
        coef = super().settle_kl_coef(env)
        if self.teacher is None and self.config.teacher is not None and self.mdp is not None:
            self.teacher = load_teacher(self.config.teacher, self.mdp)
        return coef

    def update(self, traj: Trajectories) -> dict[str, float]:
        if self.teacher is None:
            raise ValueError("distillation needs a teacher: name its folder in the setting teacher, or set .teacher")
        if traj.is_bandit:  # the KL of a position needs positions
            assert traj.prompt is not None and traj.response is not None
            traj = whole_episodes(traj.prompt, traj.response)
        return super().update(traj)

    def prepare(self, traj: Trajectories, before: Before) -> dict[str, Tensor]:
        """Return with ``as_reward`` the ``advantage (B, T)`` of what comes after each token."""
        if not self.config.as_reward:
            return {}
        teacher = Before(self.teacher, traj, self.config.micro_batch).log_probs()
        reward = -kl_estimate("full", before.log_probs(), teacher, traj.mask)
        later = adv.discounted_returns(reward, traj.mask, self.config.gamma) - adv.masked(reward, traj.mask)
        advantage = later - adv.leave_one_out(adv.extend(later, traj.mask))
        return {"advantage": adv.masked(advantage, traj.mask)}

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        with torch.no_grad():
            teacher = self.teacher.evaluate(traj).log_probs()
        loss = sequence_mean(kl_estimate("full", now.log_probs(), teacher, traj.mask), traj.mask)
        metrics: dict[str, Metric] = {"teacher_kl": loss.detach(), "entropy": tally(now.entropy, traj.mask)}
        if self.config.as_reward:
            policy = policy_gradient_loss(now.logprob, fixed["advantage"], traj.mask)
            loss = loss + sequence_mean(policy, traj.mask)
        return loss, metrics


def load_teacher(place: str, mdp: Any) -> LMPolicy | TabularPolicy:
    """Return the frozen policy of a folder or hub name on a text env, or its exact optimum; ValueError if its tokens
    are others than the task's, or if the task has too many texts for an optimum."""
    if place == OPTIMUM:
        try:
            exact = Exact(mdp)
        except ValueError as error:
            raise ValueError(f"teacher {OPTIMUM}: this task cannot be enumerated: {error}") from None
        return TabularPolicy(exact, exact.optimal_policy).requires_grad_(False)
    model, tokenizer = load_policy(place), load_tokenizer(place, "teacher")
    if tokenizer.get_vocab() != mdp.task.tokenizer.get_vocab():
        raise ValueError(f"teacher {place}: its tokens are not the policy's, so their probabilities do not compare")
    return LMPolicy.for_mdp(mdp, model.requires_grad_(False).to(mdp.device))
