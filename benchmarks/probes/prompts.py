"""Many prompts of unlike difficulty: the same budget for more and more prompts.

For a third of the prompts one token of three must be right, for a third two, for the last third all; nothing else
pays. A method sees each prompt more rarely the more there are. Comparing the responses to one prompt wastes groups in
which all fail or all succeed; comparing across prompts favors the easy ones.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe, texts


def _case(value: float, seed: int) -> Case:
    prompts, tokens, horizon = int(value), 4, 3
    right = np.random.default_rng(seed).integers(tokens, size=(prompts, 1, horizon))
    needed = 1 + np.arange(prompts)[:, None] % horizon
    same = np.cumprod(texts(tokens, horizon) == right, axis=2).sum(axis=2)
    return Case((same >= needed).astype(float), tokens, horizon)


PROBE = Probe("prompts", "prompts", (3, 6, 12, 24, 48), _case, __doc__)
