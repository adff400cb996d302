"""Stop rules: what a run's measurements must show to end it before its budget, as ``kl > 20``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from lm_envs.benchmarks.errors import UserError
from lm_envs.settings import near, short

Direction = Literal[-1, 0, 1]
METRICS: dict[str, Direction] = {
    **dict.fromkeys(("gold", "proxy", "win_rate", "return"), 1),
    **dict.fromkeys(("regret", "frontier_gap"), -1),
    **dict.fromkeys(("kl", "length"), 0),
}
"""What a learning curve may have, and which way is better: up, down, or neither."""
_RULE = re.compile(r"\s*([\w-]+)\s*(?:([<>])\s*(\S+)|\s+no\s+better\s+for\s+(\S+))\s*")
_FORMS = '"kl > 20", "gold < 0.5" or "gold no better for 10" (measurements of the learning curve)'


@dataclass(frozen=True)
class Rule:
    """One condition: a bound, or a number of measurements without a new best.

    Attributes:
        metric: a key of :data:`METRICS`.
        sign: ">" or "<"; empty for a rule about the best.
        bound: ends the run when the metric lies beyond it.
        patience: ends the run after this many measurements that are no better than the best before them.
    """

    metric: str
    sign: str = ""
    bound: float = math.nan
    patience: int = 0

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.sign} {self.bound:g}" if self.sign else f"{self.metric} no better for {self.patience}"
        )

    def beyond(self, value: float) -> bool:
        """Return whether a value lies beyond the bound; never for NaN or a rule without one."""
        return value > self.bound if self.sign == ">" else self.sign == "<" and value < self.bound


def parse_rule(text: str, where: str = "--stop") -> Rule:
    """Read a rule; raise UserError, which names the metrics or shows the forms, for what is none."""
    found = _RULE.fullmatch(text)
    if found is None:
        raise UserError(f"{where}: {short(text)} is no stop rule, which reads {_FORMS}")
    name, sign, bound, patience = found.groups()
    metric = name.lower().replace("-", "_")
    if metric not in METRICS:
        known = ", ".join(METRICS)
        raise UserError(f"{where}: no metric {name!r} in {short(text)}: {near(metric, METRICS, '')} there are {known}")
    if sign:
        try:
            value = float(bound)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{where}: {short(bound)} in {short(text)} is no number; a rule reads {_FORMS}")
        return Rule(metric, sign, value)
    if not (patience.isdecimal() and 0 < int(patience[:9]) and len(patience) < 10):
        raise UserError(f"{where}: {short(patience)} in {short(text)} is no number of measurements, 1 or more")
    if METRICS[metric] == 0:
        raise UserError(f'{where}: neither more nor less {metric} is better: give it a bound, as in "{metric} > 20"')
    return Rule(metric, patience=int(patience))


def check_measured(rules: Sequence[Rule], measured: Collection[str], batches: bool, curve: bool, where: str) -> None:
    """Raise UserError for a rule that nothing will ever be known of.

    Args:
        measured: the metrics of the run's learning curve.
        batches: the KL of every batch is known.
        curve: there is a learning curve.
        where: the run, for the message.
    """
    for rule in rules:
        if rule.metric not in measured:
            raise UserError(
                f'{where}: stop rule "{rule}": this run measures {", ".join(measured)}, and no {rule.metric}'
            )
        if not curve and not (batches and rule.metric == "kl"):
            raise UserError(f'{where}: stop rule "{rule}" is read at measurements, and there are none (every = 0)')
