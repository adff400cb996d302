"""Credit over the horizon: only the first token of a text matters, and more and more tokens follow it.

The reward comes after the last token. A method that passes it back to the first one does not care how many follow. A
discount, a critic that has to carry the reward back state by state, or noise that the other tokens add to the
estimated gradient show as a score that falls with the horizon.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe, texts


def _case(value: float, seed: int) -> Case:
    horizon, tokens = int(value), 2
    right = np.random.default_rng(seed).integers(tokens, size=(4, 1))
    return Case((texts(tokens, horizon)[:, 0] == right).astype(float), tokens, horizon)


PROBE = Probe("horizon", "tokens of a text, of which the first matters", (2, 4, 6, 8, 10), _case, __doc__)
