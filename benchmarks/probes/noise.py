"""Reward noise: a normal number is added to each reward, a new one each time.

The noise has mean 0 and leaves the optimum where it is. It is averaged out by small steps and large batches; methods
that pick the best of a few samples pick the noise, and methods that divide by the spread of the rewards shrink what
they should learn.
"""

from lm_envs.benchmarks.probes.base import Case, Probe, plain


def _case(value: float, seed: int) -> Case:
    return plain(seed, noise=value)


PROBE = Probe("noise", "standard deviation of the noise (rewards: 0 to 1)", (0, 0.3, 1, 2, 4), _case, __doc__)
