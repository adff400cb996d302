"""Changing reward: once, at some moment of training, other texts become the right ones, and these count.

The later, the less is left to learn, and the more there is to unlearn: a policy that has become nearly deterministic
no longer samples what is now right, Adam's second moments are those of larger gradients, and a pool of old responses
or a critic is of the reward before. A KL coefficient of 0.1 leaves the optimum some entropy, so that a method that
heeds it can come back.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe, shares


def _case(value: float, seed: int) -> Case:
    prompts, tokens, horizon = 4, 4, 3
    before, after = (shares(np.random.default_rng((seed, i)), prompts, tokens, horizon) for i in range(2))
    return Case(after, tokens, horizon, 0.1, taught=lambda spent: before if spent < value else after)


PROBE = Probe("change", "share of the budget spent when the reward changes", (0, 0.1, 0.2, 0.3, 0.5), _case, __doc__)
