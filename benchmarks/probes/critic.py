"""Wrong critic: the learned value starts wrong by a number, up in half of the states and down in the others.

The advantages are wrong until the value has been unlearned. An actor-critic loses the time that takes, and what it
learned from the first batches; how much tells how far the policy trusts the critic and how fast that is corrected.
Methods without a critic do not notice.
"""

from typing import Any

import torch

from lm_envs.benchmarks.probes.base import Case, Probe, plain


def _case(value: float, seed: int) -> Case:
    def spoil(policy: Any, iteration: int) -> None:
        if iteration == 0:
            sign = torch.randint(2, policy.value.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
            with torch.no_grad():
                policy.value += value * sign / policy.value_scale

    return plain(seed, before=spoil)


PROBE = Probe("critic", "error of the first values (rewards: 0 to 1)", (0, 1, 3, 10, 30), _case, __doc__)
