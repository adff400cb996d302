"""Judged pairs of a policy's responses, and reward models trained on choices between them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lm_envs import rng, training
from lm_envs.env.mdp import TextMDP
from lm_envs.reward.learned import LearnedReward, initialise_reward_head
from lm_envs.reward.units import Samples, moments, standardised
from lm_envs.tasks import sampling
from lm_envs.tasks.reviews import ranking_accuracy

_ROWS = 512  # texts per forward


@dataclass
class JudgedPairs:
    """N pairs of responses: 2N ``samples``, a pair in rows 2i and 2i + 1, and the judge's scores of them."""

    samples: Samples
    gold: NDArray[np.float64]
    """``(N, 2)``."""
    tokens: int
    """Generated for them."""

    def read_by(self, reward: LearnedReward) -> list[list[list[int]]]:
        """The N pairs as token ids that a reward model reads."""
        samples = self.samples
        texts = zip(samples.prompts, samples.completions, samples.finish_reasons, strict=True)
        rows = [reward.encode(prompt + completion, reason == "stop") for prompt, completion, reason in texts]
        return [rows[i : i + 2] for i in range(0, len(rows), 2)]

    def accuracy(self, reward: Any) -> float:
        """The share of pairs that a reward orders as the judge does."""
        scores = self.samples.score(reward).reshape(-1, 2)
        return ranking_accuracy(self.gold, scores[:, 0] - scores[:, 1])


def judge_pairs(mdp: TextMDP, policy: Any, first: int, count: int, seed: int) -> JudgedPairs:
    """Sample pairs number ``first`` and up of a policy's responses to the MDP's prompts, and score them by the task's
    judge. The result depends on the arguments alone; training never draws the same random numbers."""
    pair = np.arange(first, first + count)
    index = np.repeat(rng.integers(seed, rng.PROMPT, sampling.SAMPLE_EPISODES + pair, len(mdp.prompts)), 2)
    prompt = mdp.prompt(index)
    row = sampling.SAMPLE_EPISODES + 2 * first + np.arange(2 * count)
    places = np.arange(policy.uniforms_per_response)
    parts = []
    for start in range(0, 2 * count, _ROWS):
        rows = slice(start, start + _ROWS)
        uniforms = rng.uniform(seed, rng.TOKEN, row[rows, None], places)
        parts.append(policy.respond(torch.as_tensor(prompt[rows]), torch.as_tensor(uniforms))[0].cpu())
    response = torch.cat(parts).numpy()
    samples = mdp.samples(index, response)
    return JudgedPairs(samples, samples.score(mdp.task.judge).reshape(-1, 2), int((response >= 0).sum()))


def make_reward_model(
    template: LearnedReward,
    pairs: Sequence[Sequence[Sequence[int]]],
    first_is_better: NDArray[np.bool_],
    units: Sequence[Sequence[Sequence[int]]],
    name: str,
    *,
    start: Literal["fresh", "task"] = "fresh",
    steps: int = 192,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> LearnedReward:
    """Train a reward by Bradley-Terry on choices between the two texts of each pair; its model is frozen.

    Args:
        template: gives architecture, tokenizer and batch size, and with start "task" the first weights.
        pairs: N pairs of token ids.
        first_is_better: ``(N,)``.
        units: pairs of texts on which the reward has mean 0 and (population) standard deviation 1.
        seed: of fresh weights and of the order of the pairs.
        steps, batch_size, learning_rate, weight_decay: as for :func:`lm_envs.training.fit`.

    Raises:
        ValueError: the model gives all texts of ``units`` the same score.
    """
    model = fresh(template.model, seed) if start == "fresh" else copy.deepcopy(template.model)
    training.fit_reward_model(
        model.eval().requires_grad_(True),
        pairs,
        np.stack([~first_is_better, first_is_better], axis=1).astype(np.int64),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
    )
    made = LearnedReward(model.requires_grad_(False), template.tokenizer, batch_size=template.batch_size, name=name)
    return standardised(made, *moments(made.raw([text for pair in units for text in pair]), name))


def fresh(model: Any, seed: int) -> Any:
    """Make a model of the same architecture with weights drawn from the seed; torch's global generator is not moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(model)(model.config).to(dtype=model.dtype, device=model.device).eval()
    head = getattr(made, "score", None)
    if isinstance(head, nn.Linear):
        initialise_reward_head(head, torch.Generator().manual_seed(seed))
    return made
