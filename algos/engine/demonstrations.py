"""Likelihood of demonstrations: alone, and beside sampled episodes (REINFORCE's term and PPO-ptx)."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.ops.losses import masked_mean, nll, sequence_mean
from lm_envs.tasks.base import TextTask
from lm_envs.training import stream
from lm_envs.trajectories import Trajectories, demonstrations, from_responses


class MixesDemonstrations:
    """A mixin for agents that also learn from ``config.demonstrations`` demonstrations per Adam step.

    Raises:
        ValueError: they have a weight and there are none, or there are some and their weight is 0.
    """

    mixes_data = True
    mixing_weight: ClassVar[str]
    """The setting that weighs their likelihood; 0 takes none."""
    demonstrations: Trajectories | None

    def __init__(self: Any, policy: Any, config: Any = None, data: Trajectories | None = None) -> None:
        super().__init__(policy, config)  # type: ignore[call-arg]
        weight = getattr(self.config, self.mixing_weight)
        if weight and (data is None or not len(data)):
            raise ValueError(
                f"{self.name} learns from demonstrations beside its samples: pass data=Trajectories, see "
                "lm_envs.trajectories.demonstrations"
            )
        if data is not None and not weight:
            raise ValueError(f"{self.name} was given demonstrations and their weight is 0: it would ignore them")
        self.demonstrations = data

    @classmethod
    def data_of(cls, task: TextTask, config: Any) -> Trajectories | None:
        return demonstrations_of(task) if getattr(config, cls.mixing_weight) else None

    @classmethod
    def lacks(cls, task: TextTask, config: Any) -> str | None:
        wanted = getattr(config, cls.mixing_weight) and demonstrations_of(task) is None
        return "demonstrations" if wanted else None

    def mixture(self: Any, step: int) -> tuple[float, Trajectories] | None:
        if self.demonstrations is None:
            return None
        index = next(stream(len(self.demonstrations), self.config.demonstrations, self.config.seed, step))
        chosen = self.demonstrations.select(torch.from_numpy(index))
        return getattr(self.config, self.mixing_weight), chosen.to(next(self.policy.parameters()).device)


def likelihood(unit: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """The loss ``-log pi``: its mean over tokens, or over rows of sums over tokens."""
    mean = masked_mean if unit == "token" else sequence_mean
    return lambda traj, now, fixed: (mean(nll(now.logprob, traj.mask), traj.mask), {})


def token_likelihood(traj: Trajectories, now: Any) -> tuple[Tensor, dict[str, Metric]]:
    """``-log pi``, the mean over tokens, and its metrics: supervised fine-tuning's loss."""
    loss = masked_mean(nll(now.logprob, traj.mask), traj.mask)
    return loss, {"nll": loss.detach(), "entropy": masked_mean(now.entropy, traj.mask).detach()}


def demonstrations_of(task: TextTask) -> Trajectories | None:
    """A task's demonstrations: its pairs, else its texts that go on behind the longest prompt; None without any."""
    if task.responses:
        prompts, responses = zip(*task.responses, strict=True)
        return from_responses(prompts, [row[: task.max_new_tokens] for row in responses], task.prompt_length)
    texts = [text for text in task.demonstrations if len(text) > task.prompt_length]
    return demonstrations(texts, task.prompt_length, task.max_new_tokens) if texts else None
