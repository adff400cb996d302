"""Vocabulary: two tokens of a text, each worth a number between 0 and 1, out of more and more.

The worth is drawn for each prompt and token, and the reward is the mean of both; the more tokens there are, the rarer
each is sampled and the closer the best ones lie together. Methods that compare many responses at once find good tokens
early; the score's last bit is telling the best from the second.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe, texts


def _case(value: float, seed: int) -> Case:
    tokens, horizon, prompts = int(value), 2, 4
    worth = np.random.default_rng(seed).random((prompts, tokens))
    worth = (worth - worth.min(axis=1, keepdims=True)) / np.ptp(worth, axis=1, keepdims=True)
    return Case(worth[:, texts(tokens, horizon)].mean(axis=2), tokens, horizon)


PROBE = Probe("vocabulary", "tokens", (2, 4, 8, 16, 26), _case, __doc__)
