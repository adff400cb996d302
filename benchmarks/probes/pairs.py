"""Delayed pairs: the first and the last token of a text must both be right.

Neither is worth anything alone, so the first token is credited through what happens at the end, and the last one has
to be learned after every beginning that is still likely. Methods that narrow their sampling early learn it sooner;
methods that spread it over all beginnings see each of them too rarely when the text is long.
"""

import numpy as np

from lm_envs.benchmarks.probes.base import Case, Probe, texts


def _case(value: float, seed: int) -> Case:
    horizon, tokens = int(value), 3
    text = texts(tokens, horizon)
    first, last = np.random.default_rng(seed).integers(tokens, size=(2, 4, 1))
    return Case(((text[:, 0] == first) & (text[:, -1] == last)).astype(float), tokens, horizon)


PROBE = Probe("pairs", "tokens of a text, of which the first and the last matter", (2, 3, 4, 5, 6), _case, __doc__)
