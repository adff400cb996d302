"""What throughput is wanted, and which of it a result reaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# way, column, at least, by shape; of_generate and of_peer are ratios of speeds within a round.
SPEEDS: list[tuple[str, str, dict[str, float]]] = [
    ("step", "of_generate", {"small": 0.9, "larger": 0.9}),
    ("step + reference", "of_generate", {"small": 0.6, "larger": 0.6}),
    ("bulk + reference + reward", "of_generate", {"small": 1.2, "larger": 1.2}),
    ("bulk + reference + reward, compiled", "of_generate", {"small": 1.2, "larger": 1.2}),
    ("ppo 1 epoch, own critic", "of_peer", {"small": 1.9, "larger": 1.4}),
    ("ppo 4 epochs, own critic", "of_peer", {"small": 1.5, "larger": 1.1}),
    ("ppo 1 epoch", "of_peer", {"small": 3.0, "larger": 2.0}),
    ("ppo 4 epochs", "of_peer", {"small": 2.5, "larger": 1.8}),
    ("ppo 1 epoch, compiled", "of_peer", {"small": 3.0, "larger": 2.0}),
    ("grpo", "of_peer", {"small": 1.35, "larger": 1.35}),
    ("grpo, compiled", "of_peer", {"small": 1.6, "larger": 1.6}),
]
FLOOR = 1.3  # a PPO iteration over bare forwards and forwards with backward of the same tokens, at most
FLAT = 1.5  # the step path's own time per token at the longest response over that at the shortest, at most
WITHIN = {  # which takes no more memory than which
    "bulk + reference + reward": "generate",
    "ppo 1 epoch, own critic": "trl-1.12 ppo 1 epoch",
    "grpo": "trl-1.16 grpo",
}


@dataclass(frozen=True)
class Verdict:
    """One target: ``value`` is to be at least, or at most, ``bound``."""

    what: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def reached(self) -> bool:
        """Whether it is."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def verdicts(lines: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """The targets that a result's lines tell of, lines of the benchmark's CSV."""
    lines = list(lines)
    found: list[Verdict] = []
    for shape in dict.fromkeys(line["shape"] for line in lines):
        fixed = {line["way"]: line for line in lines if line["table"] == "fixed work" and line["shape"] == shape}

        def number(way: str, column: str, fixed: dict[str, Mapping[str, Any]] = fixed) -> float | None:
            value = fixed.get(way, {}).get(column)
            return None if value in ("", None) else float(value)

        for way, column, wanted in SPEEDS:
            value = number(way, column)
            if shape in wanted and value is not None:
                against = "generate" if column == "of_generate" else "TRL"
                found.append(Verdict(f"{shape}: {way}, times {against}", value, wanted[shape]))
        if (value := number("ppo 1 epoch", "times_floor")) is not None:
            found.append(Verdict(f"{shape}: ppo 1 epoch, times its floor", value, FLOOR, False))
        for way, other in WITHIN.items():
            value, limit = number(way, "peak_MB"), number(other, "peak_MB")
            if value is not None and limit is not None:
                found.append(Verdict(f"{shape}: {way}, MB, and {other}", value, limit, False))
    own = step_overhead(lines)
    if len(own) > 1:
        what = f"step path's own time a step, {max(own)} new tokens over {min(own)}"
        found.append(Verdict(what, own[max(own)] / own[min(own)], FLAT, False))
    return found


def step_overhead(lines: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """By response length: milliseconds of a step beyond the policy's forward."""
    seconds: dict[int, dict[str, float]] = {}
    for line in lines:
        if line["table"] == "response length":
            seconds.setdefault(int(line["new_tokens"]), {})[line["way"]] = float(line["seconds"])
    return {
        length: 1e3 * (of["step"] - of["our forwards"]) / length
        for length, of in sorted(seconds.items())
        if "step" in of and "our forwards" in of
    }


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """The verdicts in Markdown."""
    rows = [
        f"| {v.what} | {v.value:.2f} | {'at least' if v.at_least else 'at most'} {v.bound:g} "
        f"| {'yes' if v.reached else '**no**'} |"
        for v in verdicts(lines)
    ]
    return "\n".join(["| | measured | wanted | reached |", "|---|---|---|---|", *rows])
