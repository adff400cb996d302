"""Supervised fine-tuning: maximum likelihood on demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.batching import stream
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.metrics import Metric
from lm_envs.algos.ops.losses import masked_mean, nll
from lm_envs.model.tokens import left_pad
from lm_envs.reward.base import right_pad
from lm_envs.trajectories import Rows, Trajectories

if TYPE_CHECKING:
    from lm_envs.tasks.base import TextTask


@dataclass
class SFTConfig(AgentConfig):
    """Settings of :class:`SFT`; `episodes` is the number of demonstrations per iteration."""

    learning_rate: float = 1e-3
    """Adam's step size at the start."""
    episodes: int | None = 64
    """Demonstrations per iteration."""


class SFT(Agent[SFTConfig]):
    """``-log pi(a_t|s_t)`` on demonstrations, the mean over tokens.

    Demonstrations are Trajectories without reward, of text (see :func:`demonstrations`) or of control.

    Args:
        policy: what learns.
        config: settings.
        data: the demonstrations: Trajectories, or what selects them from elsewhere.
    """

    Config = SFTConfig
    name = "sft"
    unit = "token"
    needs_data = True

    def __init__(self, policy: Any, config: SFTConfig | None = None, data: Rows | None = None) -> None:
        super().__init__(policy, config)
        if data is None or not len(data):
            raise ValueError("sft learns from demonstrations: pass data=Trajectories, see sft.demonstrations")
        self.data = data

    @classmethod
    def data_of(cls, task: TextTask, config: AgentConfig) -> Trajectories | None:
        """A task's demonstrations, those that go on behind the longest prompt."""
        return demonstrations_of(task)

    def batches(self) -> Iterator[Trajectories]:
        """Passes over the demonstrations, each in a new order that depends on the seed and the pass alone."""
        size = self.config.episodes
        assert size is not None
        for index in stream(len(self.data), size, self.config.seed, self.iterations_done):
            yield self.data.select(torch.from_numpy(index))

    def loss(self, traj: Trajectories, now: Any, fixed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Metric]]:
        """Negative log-likelihood, the mean over tokens."""
        loss = masked_mean(nll(now.logprob, traj.mask), traj.mask)
        return loss, {"nll": loss.detach(), "entropy": masked_mean(now.entropy, traj.mask).detach()}


def demonstrations_of(task: TextTask) -> Trajectories | None:
    """A task's demonstrations: its pairs, else its texts that go on behind the longest prompt; None without any."""
    if task.responses:
        prompts, responses = zip(*task.responses, strict=True)
        return from_responses(prompts, [row[: task.max_new_tokens] for row in responses], task.prompt_length)
    texts = [text for text in task.demonstrations if len(text) > task.prompt_length]
    return demonstrations(texts, task.prompt_length, task.max_new_tokens) if texts else None


def demonstrations(
    texts: Sequence[Sequence[int]],
    prompt_length: int,
    max_new_tokens: int,
    group: Sequence[int] | None = None,
) -> Trajectories:
    """Texts as Trajectories for the MDP face, with no reward.

    Args:
        texts: token ids, prompt and response in one; the EOS included where the response ended.
        prompt_length: how many tokens of each text are its prompt.
        max_new_tokens: longer responses are cut there.
        group: a number per text, equal where they share a prompt.

    Raises:
        ValueError: a text has nothing after its prompt.
    """
    for i, text in enumerate(texts):
        if len(text) <= prompt_length:
            raise ValueError(
                f"text {i} has {len(text)} tokens and its prompt {prompt_length}: nothing is left to learn"
            )
    return from_responses(
        [text[:prompt_length] for text in texts],
        [text[prompt_length : prompt_length + max_new_tokens] for text in texts],
        prompt_length,
        group,
    )


def from_responses(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    prompt_length: int,
    group: Sequence[int] | None = None,
) -> Trajectories:
    """Prompts and responses as Trajectories for the MDP face, with no reward.

    Args:
        prompts: token ids, at most ``prompt_length`` each.
        responses: token ids, at least one each; the EOS included where the response ended.
        prompt_length: the places of the prompt.
        group: a number per text, equal where they share a prompt.
    """
    prompt = torch.from_numpy(left_pad(prompts, prompt_length))
    response = right_pad(responses)
    mask = response >= 0
    ended = torch.ones(len(response), dtype=torch.bool)
    return Trajectories(
        actions=response.clamp(min=0),
        mask=mask,
        terminated=ended,
        truncated=~ended,
        obs=torch.cat([prompt, response], dim=1),
        prompt=prompt,
        response=response,
        group=None if group is None else torch.as_tensor(group, dtype=torch.int64),
    )
