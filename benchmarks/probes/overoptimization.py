"""Over-optimization: training sees a proxy whose correlation with the gold reward falls, and gold decides.

Each text has a gold reward and a proxy, normal numbers with this correlation; training sees the best guess of gold
given the proxy, ``rho proxy``. The score's 1 is the optimum for that guess, measured by gold. A method that goes
further from the reference than the guess is worth (because it has no penalty, or only picks winners) gains proxy and
loses here.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe
from lm_envs.tasks.enumerable import EnumerableConfig


def _case(value: float, seed: int) -> Case:
    sizes = EnumerableConfig(tokens=4, horizon=3, prompts=16)
    gold, noise = np.random.default_rng(seed).standard_normal((2, sizes.prompts, sizes.tree.sequences))
    guess = value * (value * gold + np.sqrt(1 - value**2) * noise)
    return Case(gold, sizes.tokens, sizes.horizon, 0.3, taught=lambda spent: guess)


PROBE = Probe("overoptimization", "correlation of proxy and gold", (1.0, 0.9, 0.7, 0.5, 0.3), _case, __doc__)
