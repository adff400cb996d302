"""Sparse reward: a fraction of all texts is worth 1, the others nothing.

The texts that pay are scattered, so that nothing leads to them. Where one in a thousand pays, a batch of 128 usually
holds none, and a method has to make the most of the few that it meets; where one in ten thousand pays, a run of 4,096
texts probably meets none, and a score above 0 is luck.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe, texts


def _case(value: float, seed: int) -> Case:
    tokens, horizon = 10, 4
    text = texts(tokens, horizon)
    whole = np.flatnonzero(text[:, -1] >= 0)
    paying = np.random.default_rng(seed).choice(whole, max(1, round(value * len(whole))), replace=False)
    rewards = np.zeros((1, len(text)))
    rewards[0, paying] = 1.0
    return Case(rewards, tokens, horizon)


PROBE = Probe("sparse", "fraction of texts that pay", (0.3, 0.1, 0.01, 0.001, 0.0001), _case, __doc__)
