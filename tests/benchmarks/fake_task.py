"""A text task of milliseconds, loadable by name in any process: ``tests.benchmarks.fake_task:load``."""

from __future__ import annotations

import contextlib
import os
import time
from itertools import product

import torch

from lm_envs.tasks.base import TextTask
from tests.tiny import count_b_minus_c, task

NAME = "tests.benchmarks.fake_task:load"


class Pausing:
    """A reward that, at one of its calls, writes its process to the file ``mark`` and waits to be killed; once there is
    one, it goes on."""

    def __init__(self, reward, mark: str | None, at: int) -> None:
        self.reward, self.mark, self.at, self.calls = reward, mark, at, 0

    def __call__(self, prompts, completions, **columns) -> list[float]:
        self.calls += 1
        if self.mark and self.calls >= self.at:
            with contextlib.suppress(FileExistsError), open(self.mark, "x") as mark:
                mark.write(str(os.getpid()))
                mark.flush()
                time.sleep(120)
        return self.reward(prompts, completions)


def gold(prompts, completions, **columns) -> list[float]:
    """Likes "b" and dislikes length: the proxy, which counts b's, can be over-optimized."""
    return [text.split().count("b") - 0.2 * len(text.split()) for text in completions]


def nothing(prompts, completions, **columns) -> list[float]:
    return [float("nan")] * len(completions)


def load(
    judge: bool = True,
    broken: bool = False,
    pause: str = "",
    mark: str | None = None,
    at: int = 0,
    task_seed: int = 0,
) -> TextTask:
    """Forty prompts of two tokens to train on, six new tokens.

    Args:
        judge: whether there is a gold judge.
        broken: the reward returns NaN.
        pause: "reward" or "judge": which of them pauses, see :class:`Pausing`.
        mark, at: of the pause.
        task_seed: other numbers than 0 have another reference.
    """
    reference = task().reference.to(torch.float32)
    if task_seed:
        noise = torch.Generator().manual_seed(task_seed)
        for parameter in reference.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
    pairs = [list(pair) for pair in product(range(1, 10), range(1, 10))]
    reward = nothing if broken else count_b_minus_c
    return task(
        name="fake",
        reference=reference,
        prompts={"train": pairs[:40], "validation": pairs[40:60], "test": pairs[60:]},
        reward=Pausing(reward, mark, at) if pause == "reward" else reward,
        judge=Pausing(gold, mark, at) if pause == "judge" else gold if judge else None,
        kl_coef=0.05,
        description="Say b",
    )
