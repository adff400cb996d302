"""Guards against collapse: a policy that has left its reference, or says the same whatever it is asked.

Such a run's reward may be the highest of all, so a table would crown it. Two numbers tell: the KL to the reference per
token of the responses, and their share of different token pairs (distinct-2, Li et al. 2016), against that of the first
batch, which the policy sampled as it started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lm_envs.algos.engine.settings_by_size import SMALL
from lm_envs.benchmarks.measure.samples import distinct_2
from lm_envs.benchmarks.run.results import number
from lm_envs.settings import NonNegative, Positive, Settings
from lm_envs.trajectories import Trajectories

Action = Literal["stop", "tell", "off"]


@dataclass(frozen=True)
class Guards(Settings):
    """The band that a policy has to stay in, and what is done when it leaves it.

    The methods of the embedded Reviews task end at 0.1 to 0.8 nats per token and 0.46 to 1 of SFT's distinct-2; those
    that collapse there (GRPO without a whole KL term, online DPO) at 1.2 to 3 nats or 0.16 to 0.28.

    Attributes:
        kl_per_token: most nats of KL per token of a response, the mean over a batch.
        distinct_2: least share of different token pairs in a batch, as a part of the first batch's.
        action: "stop" ends the run there, "tell" lets it go on and says so in its result, "off" does neither. None
            stops language models of 20 million parameters and more, and tells of smaller ones.
    """

    kl_per_token: Positive = 1.5
    distinct_2: NonNegative = 0.25
    action: Action | None = None

    def acts(self, parameters: int) -> Action:
        """Return the action for a model of this many parameters."""
        return self.action or ("stop" if parameters >= SMALL else "tell")

    def collapse(self, kl: float, length: float, distinct: float, start: float) -> str | None:
        """Return how a policy has collapsed, None if it has not; NaN is unknown and no collapse.

        Args:
            kl: nats per response.
            length: tokens per response.
            distinct: distinct-2 of the responses.
            start: distinct-2 of as many responses of the policy as it started.
        """
        if length > 0 and kl / length > self.kl_per_token:
            return f"KL of {kl / length:.1f} nats per token, above {self.kl_per_token:g}"
        if distinct < self.distinct_2 * start:
            share = f"{distinct / start:.2f} of the start's share of different token pairs"
            return f"{share}, below {self.distinct_2:g}"
        return None


def variety(traj: Trajectories) -> float:
    """Return the distinct-2 of a batch of texts, NaN for one without."""
    return math.nan if traj.response is None else distinct_2([row[row >= 0].tolist() for row in traj.response])


def of_records(guards: Guards, records: Sequence[Mapping[str, Any]]) -> str | None:
    """Return how the policy of the last iteration has collapsed by the metrics of a run, None if it has not."""
    if not records:
        return None
    start = next((record["distinct_2"] for record in records if record.get("distinct_2")), math.nan)
    found = (number(records[-1].get(name)) for name in ("kl", "length", "distinct_2"))
    why = guards.collapse(*found, start)
    return None if why is None else f"{why}, in iteration {records[-1]['iteration']}"


def of_result(guards: Guards, measured: Mapping[str, Any]) -> str | None:
    """The same by the measures of the final policy, against SFT's samples for the same prompts."""
    names = ("kl", "length", "distinct_2", "sft_distinct_2")
    why = guards.collapse(*(number(measured.get(name)) for name in names))
    return None if why is None else f"{why}, on the prompts of the test"
