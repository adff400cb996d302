"""A text task of milliseconds for the comparison's tests, loadable by name in any process:
``tests.benchmarks.fake_task:load``.
"""

from __future__ import annotations

from itertools import product

import torch

from lm_envs.tasks.task import TextTask
from tests.tiny import count_b_minus_c, task

NAME = "tests.benchmarks.fake_task:load"


def gold(prompts, completions, **columns) -> list[float]:
    """Likes "b" and dislikes length: the proxy, which counts b's, can be over-optimised."""
    return [text.split().count("b") - 0.2 * len(text.split()) for text in completions]


def load(judge: bool = True, broken: bool = False, dtype: str = "float32") -> TextTask:
    """Forty prompts of two tokens a split, six new tokens.

    Args:
        judge: whether there is a gold judge.
        broken: the reward returns NaN.
        dtype: of the reference.
    """
    pairs = [list(pair) for pair in product(range(1, 10), range(1, 10))]
    base = task()
    return task(
        name="fake",
        reference=base.reference.to(getattr(torch, dtype)),
        prompts={"train": pairs[:40], "validation": pairs[40:60], "test": pairs[60:]},
        reward=nothing if broken else count_b_minus_c,
        judge=gold if judge else None,
        kl_coef=0.05,
        description="Say b",
    )


def nothing(prompts, completions, **columns) -> list[float]:
    return [float("nan")] * len(completions)
