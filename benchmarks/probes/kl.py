"""KL coefficient: normal logits of the reference and a normal reward for each text, at a growing coefficient.

With a small coefficient the optimum is nearly the best text, with a large one nearly the reference. Methods whose
penalty is unbiased follow it all the way; methods without a penalty are right on the left and wrong on the right; a
biased one (clamped, or omitting what an early token does to later ones) is off in the middle. Where the coefficient is
3 the optimum gains so little that any noise in the weights counts.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe
from lm_envs.tasks.enumerable import EnumerableConfig


def _case(value: float, seed: int) -> Case:
    sizes, draws = EnumerableConfig(tokens=3, horizon=3, prompts=4), np.random.default_rng(seed)
    logits = draws.standard_normal((sizes.prompts, sizes.tree.prefixes, sizes.tree.vocab_size))
    rewards = draws.standard_normal((sizes.prompts, sizes.tree.sequences))
    return Case(rewards, sizes.tokens, sizes.horizon, value, ends=True, logits=logits)


PROBE = Probe("kl", "KL coefficient (rewards: standard deviation 1)", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), _case, __doc__)
