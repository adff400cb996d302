"""What ends a run before its budget: a guard against collapse, or a stop rule of the user's.

A collapsed policy has left its reference, or says the same whatever it is asked. Such a run's reward may be the highest
of all, so a table would crown it. Two numbers tell: the KL to the reference per token of the responses, and their share
of different token pairs (distinct-2, Li et al. 2016), against that of the first batch, which the policy sampled as it
started. A run that a stop rule ended has a result like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm_envs.benchmarks.measure.samples import distinct_2
from lm_envs.benchmarks.run.results import number
from lm_envs.benchmarks.run.stop_rules import METRICS, Rule
from lm_envs.benchmarks.run.suites import Guards
from lm_envs.trajectories import Trajectories

RULE = "stop_rule"


class Ended(NamedTuple):
    """Why a run ends early: under ``kind``, "collapsed" or :data:`RULE`, its result has the reason."""

    kind: str
    why: str


class Watch:
    """Tells, record by record of a run's metrics, whether the run has to end.

    Args:
        rules: read at points of the learning curve, and bounds on the KL also at every batch.
        guards: None or another action than "stop" ends nothing.
    """

    def __init__(self, rules: Sequence[Rule] = (), guards: Guards | None = None) -> None:
        self.rules = tuple(rules)
        self.guards = guards if guards is not None and guards.action == "stop" else None
        self._start = math.nan  # distinct-2 of the first batch
        self._best: dict[Rule, float] = {}
        self._since: dict[Rule, int] = {}

    @property
    def idle(self) -> bool:
        return not self.rules and self.guards is None

    def see(self, record: Mapping[str, Any]) -> Ended | None:
        """Take in a record, or the part of one with its batch or its validation; records come in their order."""
        iteration = record["iteration"]
        if self.guards is not None and (why := self._collapse(self.guards, record)) is not None:
            return Ended("collapsed", f"{why}, in iteration {iteration}")
        held = [str(rule) for rule in self.rules if self._holds(rule, record)]
        return Ended(RULE, f"{' and '.join(held)} at iteration {iteration}") if held and iteration else None

    def _collapse(self, guards: Guards, record: Mapping[str, Any]) -> str | None:
        kl, length, distinct = (number(record.get(name)) for name in ("kl", "length", "distinct_2"))
        if math.isnan(self._start) and distinct > 0:
            self._start = distinct
        return guards.collapse(kl, length, distinct, self._start)

    def _holds(self, rule: Rule, record: Mapping[str, Any]) -> bool:
        value = number(record.get(f"validation_{rule.metric}"))
        if rule.sign:
            return rule.beyond(value) or (rule.metric == "kl" and rule.beyond(number(record.get("kl"))))
        if f"validation_{rule.metric}" not in record:
            return False
        value *= METRICS[rule.metric]
        if value > self._best.get(rule, -math.inf):
            self._best[rule], self._since[rule] = value, 0
        else:
            self._since[rule] = self._since.get(rule, 0) + 1
        return self._since[rule] >= rule.patience


def variety(traj: Trajectories) -> float:
    """Return the distinct-2 of a batch of texts, NaN for one without."""
    return math.nan if traj.response is None else distinct_2([row[row >= 0].tolist() for row in traj.response])


def of_result(guards: Guards, measured: Mapping[str, Any]) -> str | None:
    """Return how the final policy has collapsed, against SFT's samples for the same prompts, None if it has not."""
    names = ("kl", "length", "distinct_2", "sft_distinct_2")
    why = guards.collapse(*(number(measured.get(name)) for name in names))
    return None if why is None else f"{why}, on the prompts of the test"
