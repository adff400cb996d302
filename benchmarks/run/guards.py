"""Guards against collapse: a policy that has left its reference, or says the same whatever it is asked.

Such a run's reward may be the highest of all, so a table would crown it. Two numbers tell: the KL to the reference per
token of the responses, and their share of different token pairs (distinct-2, Li et al. 2016), against that of the first
batch, which the policy sampled as it started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_envs.benchmarks.measure.samples import distinct_2
from lm_envs.benchmarks.run.results import number
from lm_envs.benchmarks.run.suites import Guards
from lm_envs.trajectories import Trajectories


def variety(traj: Trajectories) -> float:
    """Return the distinct-2 of a batch of texts, NaN for one without."""
    return math.nan if traj.response is None else distinct_2([row[row >= 0].tolist() for row in traj.response])


def of_records(guards: Guards, records: Sequence[Mapping[str, Any]]) -> str | None:
    """Return how the policy of the last iteration has collapsed by the metrics of a run, None if it has not."""
    if not records:
        return None
    start = next((record["distinct_2"] for record in records if record.get("distinct_2")), math.nan)
    kl, length, distinct = (number(records[-1].get(name)) for name in ("kl", "length", "distinct_2"))
    why = guards.collapse(kl, length, distinct, start)
    return None if why is None else f"{why}, in iteration {records[-1]['iteration']}"


def of_result(guards: Guards, measured: Mapping[str, Any]) -> str | None:
    """The same by the measures of the final policy, against SFT's samples for the same prompts."""
    names = ("kl", "length", "distinct_2", "sft_distinct_2")
    why = guards.collapse(*(number(measured.get(name)) for name in names))
    return None if why is None else f"{why}, on the prompts of the test"
