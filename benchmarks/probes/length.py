"""Length: texts of one length pay most, and each token more or less takes a tenth away.

The tokens themselves do not matter; EOS early or late does. Rewards lie between 0.4 and 1, so a method that averages
a return over the tokens of its text, where it should add up, prefers short texts at any price, and one that charges
the KL penalty by the mean token lets long ones drift. The share of a text in a gradient (a mean over its tokens, or
over those of the batch) changes the speed, and how much is seen here too.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe, texts


def _case(value: float, seed: int) -> Case:
    tokens, horizon, prompts = 2, 6, 2
    length = (texts(tokens, horizon) >= 0).sum(axis=1)
    return Case(np.tile(1 - 0.1 * np.abs(length - value), (prompts, 1)), tokens, horizon, ends=True)


PROBE = Probe("length", "tokens before EOS that pay most", (0, 1, 2, 4, 6), _case, __doc__)
