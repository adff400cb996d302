"""Reward scale: rewards and the KL coefficient are multiplied by the same number, which leaves the optimum as it is.

Methods that normalize, or whose loss has one scale, do not notice. A learned value has to reach the level of the
rewards, in steps whose size was chosen for another level; a loss of several terms changes their balance; and a loss
with a temperature or a coefficient of its own stops fitting.
"""

from dataclasses import replace

from lm_envs.benchmarks.probes.base import KL_COEF, Case, Probe, plain


def _case(value: float, seed: int) -> Case:
    found = plain(seed, kl_coef=KL_COEF * value)
    return replace(found, rewards=value * found.rewards)


PROBE = Probe("scale", "factor of rewards and KL coefficient", (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3), _case, __doc__)
