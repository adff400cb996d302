"""What a study found, as tables: how far people agree, who they are, and what they prefer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_envs.feedback import agreement, ratings
from lm_envs.feedback.agreement import Interval
from lm_envs.feedback.store import Judgment

Rows = list[dict[str, Any]]


def summarize(
    judgments: Sequence[Judgment], against: str | None = None, scores: Sequence[Sequence[float]] | None = None
) -> dict[str, Rows]:
    """Tables of a study's answers, each a list of rows.

    Args:
        against: the source that win-rates are against; None for the one most often compared.
        scores: a reward model's, of each judgment's responses.

    Raises:
        ValueError: no such source.
    """
    answered = [judgment for judgment in judgments if not judgment.answer.skipped]
    said = agreement.comparisons(answered)
    found = ratings.battles(answered)
    counts = Counter(name for battle in found for name in (battle.first, battle.second))
    if against is not None and against not in counts:
        raise ValueError(
            f"nothing was compared with {against!r}; the sources are {', '.join(sorted(counts)) or 'none'}"
        )
    against = against or (min(counts, key=lambda name: (-counts[name], name)) if counts else "")
    return {
        "Agreement between annotators": _agreement(answered, said),
        "Annotators": _annotators(judgments, said),
        "Biases (0.5 is none)": [
            _row({"preferred": "the response shown first"}, agreement.share(agreement.position_bias(answered))),
            _row({"preferred": "the longer response"}, agreement.share(agreement.length_bias(answered))),
        ],
        "Ratings": _ratings(found),
        "Elo": [
            _row({"source": name}, played, "Elo")
            for name, played in sorted(ratings.elo(found).items(), key=lambda each: -each[1].value)
        ],
        f"Preferred to {against}": [
            _row({"source": name}, interval) for name, interval in ratings.win_rates(found, against).items()
        ],
        "Mean rating": _means(answered),
        "Reward model": [] if scores is None else by_margin(agreement.predicted(judgments, scores)),
    }


def by_margin(found: Sequence[tuple[int, float, float]], name: str = "as people") -> Rows:
    """Accuracy of a reward model by the margin of its scores, beside what Bradley and Terry expect of such margins: a
    calibration curve.

    Args:
        found: as from :func:`~lm_envs.feedback.agreement.predicted`.
        name: the accuracy's.

    Returns:
        A row of all comparisons, and one for each fifth of them.
    """
    ordered = sorted(found, key=lambda each: each[1])
    parts = [ordered, *([ordered[len(ordered) * k // 5 : len(ordered) * (k + 1) // 5] for k in range(5)])]
    return [
        _row(
            {
                "margin": f"{part[0][1]:.2f} to {part[-1][1]:.2f}",
                "expected": float(np.mean([1 / (1 + np.exp(-margin)) for _, margin, _ in part])),
            },
            agreement.share([(item, outcome) for item, _, outcome in part]),
            name,
        )
        for part in parts
        if part
    ]


def _row(head: dict[str, Any], interval: Interval, name: str = "share") -> dict[str, Any]:
    return head | {name: interval.value, "low": interval.low, "high": interval.high, "n": interval.count}


def _agreement(judgments: Sequence[Judgment], said: dict[agreement.Unit, dict[str, int]]) -> Rows:
    pairs = sum(len(votes) * (len(votes) - 1) // 2 for votes in said.values())
    if not pairs:
        return []
    raw = agreement.intervals(lambda rows: agreement.raw_agreement(agreement.comparisons(rows)), judgments)
    alpha = agreement.intervals(lambda rows: agreement.alpha(agreement.comparisons(rows), "nominal"), judgments)
    rows = [
        _row({"measure": "raw agreement of two people"}, raw, "value"),
        _row({"measure": "Krippendorff's alpha, nominal"}, alpha, "value"),
    ]
    if rated := agreement.ratings(judgments):
        ordinal = agreement.alpha(rated, "ordinal")
        rows.append({"measure": "Krippendorff's alpha of ratings, ordinal", "value": ordinal, "n": len(rated)})
    sizes = Counter(len(votes) for votes in said.values() if len(votes) > 1)
    most = max(sizes, key=lambda size: sizes[size])
    table = [[list(votes.values()).count(c) for c in (-1, 0, 1)] for votes in said.values() if len(votes) == most]
    rows.append({"measure": f"Fleiss' kappa, {most} people", "value": agreement.fleiss_kappa(table), "n": len(table)})
    for a, b in itertools.combinations(sorted({name for votes in said.values() for name in votes}), 2):
        both = [(votes[a], votes[b]) for votes in said.values() if a in votes and b in votes]
        if both:
            kappa = agreement.cohen_kappa(*zip(*both, strict=True))
            rows.append({"measure": f"Cohen's kappa, {a} and {b}", "value": kappa, "n": len(both)})
    return [{"measure": "", "value": 0.0, "low": float("nan"), "high": float("nan"), "n": 0} | row for row in rows]


def _annotators(judgments: Sequence[Judgment], said: dict[agreement.Unit, dict[str, int]]) -> Rows:
    rows = []
    for name in sorted({judgment.annotator for judgment in judgments}):
        own = [judgment for judgment in judgments if judgment.annotator == name]
        others, gold = agreement.against_others(said, name), agreement.against_known(own, name)
        rows.append(
            {
                "annotator": name,
                "answers": sum(not judgment.answer.skipped for judgment in own),
                "skipped": sum(bool(judgment.answer.skipped) for judgment in own),
                "median seconds": agreement.seconds([judgment for judgment in own if not judgment.answer.skipped]),
                "with the others": float(np.mean(others)) if others else float("nan"),
                "with gold items": float(np.mean(gold)) if gold else float("nan"),
            }
        )
    return rows


def _ratings(found: Sequence[ratings.Battle]) -> Rows:
    rated = ratings.bradley_terry(found)
    circular, complete = ratings.cycles(found)
    rows = [
        _row({"source": name}, rated[name], "Bradley-Terry")
        for name in sorted(rated, key=lambda name: -rated[name].value)
    ]
    if circular:
        rows.append({"source": f"(majorities of {circular} of {complete} triples go in a circle)"})
    return rows


def _means(judgments: Sequence[Judgment]) -> Rows:
    values: dict[str, list[tuple[int, float]]] = {}
    for judgment in judgments:
        for response, rating in zip(judgment.content.responses, judgment.answer.ratings, strict=False):
            values.setdefault(response.source, []).append((judgment.item, float(rating)))
    return [_row({"source": name}, agreement.share(rows), "mean") for name, rows in sorted(values.items())]
