"""Changing reward: the right texts are replaced by others several times during training, and the last ones count.

Each time as many iterations are left. A policy that has become nearly deterministic no longer samples what is now
right; a pool of old responses teaches what was; momentum and a critic are of the reward before. A KL
coefficient of 0.1 leaves the optimum some entropy, and a method that heeds it can come back.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Array, Case, Probe, shares


def _case(value: float, seed: int) -> Case:
    prompts, tokens, horizon = 4, 4, 3
    tables = [shares(np.random.default_rng((seed, i)), prompts, tokens, horizon) for i in range(int(value) + 1)]

    def taught(spent: float) -> Array:
        return tables[min(int(spent * len(tables)), len(tables) - 1)]

    return Case(tables[-1], tokens, horizon, kl_coef=0.1, taught=taught)


PROBE = Probe("changes", "changes of the reward during training", (0, 1, 2, 4, 8), _case, __doc__)
