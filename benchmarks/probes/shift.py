"""Reward shift: a constant is added to all rewards of a prompt, up for half of the prompts and down for the others.

It changes no decision. Methods that compare responses to the same prompt do not notice; a baseline that is shared by
all prompts leaves the constant in the advantage as noise, and so does none at all; a critic has to learn it first;
and methods that keep the best responses of all prompts keep those of the lucky prompts.
"""

from dataclasses import replace

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe, plain


def _case(value: float, seed: int) -> Case:
    found = plain(seed)
    sign = np.where(np.arange(len(found.rewards)) % 2, -1.0, 1.0)
    return replace(found, rewards=found.rewards + value * sign[:, None])


PROBE = Probe(
    "shift", "constant added or taken, by prompt (rewards: 0 to 1)", (0.0, 1.0, 3.0, 10.0, 30.0), _case, __doc__
)
