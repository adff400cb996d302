"""Rewards of a response's length, for sums with weights: ``model:DIR + lm_envs.reward.lengths:tokens*-0.01``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tokens(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Return each response's number of tokens, EOS included."""
    return [float(len(ids)) for ids in completion_ids]


def unfinished(finish_reasons: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 for a response that was cut at the length limit, else 0."""
    return [float(reason == "length") for reason in finish_reasons]
