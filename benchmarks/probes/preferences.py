"""Noisy preferences: annotators choose between two responses, and record the wrong one more and more often.

They choose by Bradley-Terry, from rewards of 0 to 8, so that they rarely err of themselves, and then a share of the
choices is flipped. For methods that learn from such choices alone, by
pairs or by each response's label; at a share of one half nothing is left to learn. A loss that knows of flips, or
that gives each pair a bounded weight, should fall later than one that fits every pair.
"""

from dataclasses import replace

from lm_envs.benchmarks.probes.base import KL_COEF, Case, Probe, plain


def _case(value: float, seed: int) -> Case:
    found = plain(seed, kl_coef=8 * KL_COEF, settings={"flip": value}, needs="flip")
    return replace(found, rewards=8 * found.rewards)


PROBE = Probe("preferences", "share of choices recorded the wrong way round", (0, 0.1, 0.2, 0.3, 0.4), _case, __doc__)
