"""Sampler mismatch: responses are sampled by other probabilities than the policy's.

A fixed normal number is added to each logit of the sampler, as another precision or another kernel would, but larger.
The log-probabilities that come with the responses are the sampler's. Without a correction (`correction`, truncated
importance weights) an on-policy gradient is that of another policy: what the sampler rarely shows is learned late, and
the KL penalty is charged for the wrong policy.
"""

from typing import Any

import torch
from torch import Tensor

from lm_envs.benchmarks.probes.base import Case, Probe, plain


def _case(value: float, seed: int) -> Case:
    def off(logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return logits + value * torch.randn(logits.shape, dtype=logits.dtype, generator=generator)

    def plant(policy: Any, iteration: int) -> None:
        policy.sampler = off

    return plain(seed, before=plant)


PROBE = Probe("mismatch", "standard deviation between both logits", (0, 0.5, 1, 2, 4), _case, __doc__)
