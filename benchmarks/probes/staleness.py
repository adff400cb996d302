"""Staleness: responses are sampled by the weights of some iterations ago.

The sampler gets the trained weights once in several iterations, as in systems that sample and train side by side.
Methods that learn by imitation or from fixed data do not depend on who sampled; policy gradients without importance
weights take a direction that was right for other weights, and overshoot: the KL penalty they are charged is that of the
old weights.
The rewards are those of the probe "kl" at a coefficient of 0.3, where the optimum is well inside.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lm_envs.benchmarks.probes import kl
from lm_envs.benchmarks.probes.base import Case, Probe


class _Held:
    """The logits at the first call, from then on."""

    kept: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = logits.detach().clone()
        return self.kept


def _case(value: float, seed: int) -> Case:
    def hold(policy: Any, iteration: int) -> None:
        if iteration % int(value) == 0:
            policy.sampler = _Held()

    return replace(kl.PROBE.case(0.3, seed), before=hold)


PROBE = Probe("staleness", "iterations between two refreshes of the sampler", (1, 2, 4, 8, 16, 32), _case, __doc__)
