"""A text task whose splits, rewards and prompts can all be told apart: ``tests.benchmarks.distinct_task:load``.

The first word of a prompt says its split, the reward and the judge want different words, the judge reads a column that
differs from prompt to prompt, and there are more test prompts than one chunk of the evaluation holds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from lm_envs.reward.learned import LearnedReward
from lm_envs.tasks.base import TextTask
from tests.tiny import task, tokenizer

NAME = "tests.benchmarks.distinct_task:load"
FIRST = {"train": 1, "validation": 2, "test": 3}  # the words "a", "b" and "c"
COUNTS = {"train": 24, "validation": 40, "test": 1100}


def prompts(split: str) -> list[list[int]]:
    """As many as COUNTS says, all different, of five tokens."""
    rest = list(product(range(1, 10), repeat=4))[:: 3 if split == "test" else 7]
    return [[FIRST[split], *row] for row in rest[: COUNTS[split]]]


def weights(split: str) -> list[float]:
    """What the judge pays for a "d" after each prompt of a split."""
    return [1.0 + (i % 13) / 10 for i in range(COUNTS[split])]


def proxy_of(completion: str) -> float:
    """The reward that trains: an "e" is worth 1, an "f" -0.5."""
    words = completion.split()
    return words.count("e") - 0.5 * words.count("f")


def gold_of(completion: str, weight: float) -> float:
    """The judge: a "d" is worth the prompt's weight, an "e" -0.25."""
    words = completion.split()
    return weight * words.count("d") - 0.25 * words.count("e")


class Logged:
    """The reward that trains; every call adds a line (first words of the prompts, tokens) to a file."""

    __name__ = "proxy"

    def __init__(self, log: str | None) -> None:
        self.log = log

    def __call__(self, prompts, completions, completion_ids, **columns) -> list[float]:
        if self.log is not None:
            line = {"splits": [p.split()[0] for p in prompts], "tokens": [len(ids) for ids in completion_ids]}
            with Path(self.log).open("a") as file:
                file.write(json.dumps(line) + "\n")
        return [proxy_of(text) for text in completions]


def judge(prompts, completions, weight, **columns) -> list[float]:
    return [gold_of(text, w) for text, w in zip(completions, weight, strict=True)]


def fixed() -> TextTask:
    """All responses have six tokens, so costs can be counted by hand. The reward is a learned model, trained on four
    pairs of three and two tokens; five texts go on behind their prompts for three tokens.
    """
    from tests.algos.batches import reward_policy

    train = prompts("train")
    return replace(
        load(),
        reward=LearnedReward(reward_policy().model, tokenizer(), normalise=(0.3, 2.0)),
        min_new_tokens=6,
        pairs=[(row, [4, 5, 6], [7, 8]) for row in range(4)],
        demonstrations=[[*prompt, 4, 5, 6] for prompt in train[:5]],
    )


def load(log: str | None = None) -> TextTask:
    """Up to six new tokens; ``log`` is the file of :class:`Logged`."""
    return task(
        name="distinct",
        reference=task().reference.to(torch.float32),
        prompts={split: prompts(split) for split in FIRST},
        columns={split: {"weight": weights(split)} for split in FIRST},
        reward=Logged(log),
        judge=judge,
        kl_coef=0.05,
        description="Distinct splits",
    )
