"""Simulated annotators of a study: Bradley-Terry choices with flips, a taste for length and for the first place.

For tests, for teaching, and to learn before people are asked how many judgments a study needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_envs import rng
from lm_envs.feedback.store import Store, Task
from lm_envs.feedback.study import Answer, Item, dense_ranks

Score = Callable[[Item], "list[float]"]  # per response how good it is
# Temperature, flips, per_character and first of the annotators of a pool, for scores between 0 and 1.
_POOL = (
    (0.1, 0.0, 0.0, 0.0),
    (0.2, 0.1, 0.0, 0.0),
    (0.2, 0.0, 0.002, 0.0),
    (0.3, 0.2, 0.001, 0.0),
    (0.2, 0.2, -0.001, 0.0),
    (0.3, 0.1, 0.0, 0.1),
)


@dataclass(frozen=True)
class Annotator:
    """A simulated annotator.

    Attributes:
        score: the quality of an item's responses.
        temperature: of the choice: ``P(a over b) = sigmoid((u_a - u_b) / temperature)``; 0 takes the better one.
        flip: the probability of reversing the whole answer.
        per_character: added to a response's utility for each of its characters.
        first: added to the utility of the response shown first.
        ties: utilities closer than this are a tie.
        seed: of the annotator's choices.
    """

    score: Score
    temperature: float = 1.0
    flip: float = 0.0
    per_character: float = 0.0
    first: float = 0.0
    ties: float = 0.0
    seed: int = 0

    def __call__(self, task: Task, scale: int | None = None) -> Answer:
        """An answer to what is shown; with ``scale`` ratings from 1 to it, else ranks."""
        responses = task.content.responses
        draws = rng.uniform(
            self.seed, rng.ANNOTATOR, np.full(len(responses) + 1, task.item), np.arange(len(responses) + 1)
        )
        utility = np.array(self.score(task.content), dtype=float)
        utility += self.per_character * np.array([len(response.text) for response in responses])
        utility[task.order[0]] += self.first
        # Gumbel noise and sorting is Plackett-Luce; of two responses it is Bradley-Terry.
        noise = -np.log(-np.log(np.clip(draws[1:], 1e-300, 1 - 1e-16)))
        utility = utility + self.temperature * noise
        if draws[0] < self.flip:
            utility = -utility
        values = _merged(utility, self.ties)
        ranks = dense_ranks([-value for value in values])
        if scale is None:
            return Answer(ranks=ranks, flags=((),) * len(ranks), reasons=("",) * len(ranks))
        ratings = tuple(int(round(1 + (scale - 1) / (1 + np.exp(-value)))) for value in values)
        return Answer(
            ranks=dense_ranks([-rating for rating in ratings]),
            ratings=ratings,
            flags=((),) * len(ranks),
            reasons=("",) * len(ranks),
        )


def _merged(utility: np.ndarray, width: float) -> list[float]:
    """Utilities, those within ``width`` of the next higher one made equal to it."""
    values = utility.copy()
    order = np.argsort(-utility)
    for better, worse in zip(order[:-1], order[1:], strict=True):
        if values[better] - utility[worse] < width:
            values[worse] = values[better]
    return [float(value) for value in values]


def work(store: Store, name: str, annotator: Annotator, limit: int | None = None) -> int:
    """Let a simulated annotator answer what a study has for it, at most ``limit`` items; the number of answers."""
    number = store.annotator(name)
    scale = store.settings.scale if store.settings.mode == "rate" else None
    count = 0
    while limit is None or count < limit:
        task = store.next(number)
        if task is None:
            break
        store.answer(number, task.item, annotator(task, scale), task.version)
        count += 1
    return count


def pool(score: Score, seed: int) -> tuple[Annotator, ...]:
    """Return six annotators that differ as people do, in noise, slips and taste (after Dubois et al. 2023, AlpacaFarm,
    section 3.2, where thirteen prompts of language models did); another seed gives others of the same kinds.

    Args:
        score: the quality that all of them see, between 0 and 1.
        seed: below 2**60.
    """
    names = ("temperature", "flip", "per_character", "first")
    kinds = [dict(zip(names, kind, strict=True)) for kind in _POOL]
    return tuple(Annotator(score, **kind, seed=len(_POOL) * seed + i) for i, kind in enumerate(kinds))


def votes(annotators: Sequence[Annotator], items: Sequence[Item], seed: int = 0) -> NDArray[np.float64]:
    """Let each annotator choose between the two responses of each item: ``(A, N)``, 1 where it prefers the first, 0
    where it prefers the second, 1/2 for a tie.

    Which response is shown first is drawn with the seed. A vote depends on the annotator, the item's number and what it
    says alone.
    """
    shown = rng.integers(seed, rng.ORDER, np.arange(len(items)), 2)
    pairs = enumerate(zip(items, shown.tolist(), strict=True))
    tasks = [Task(i, item, (first, 1 - first), 0, None) for i, (item, first) in pairs]
    ranks = [[annotator(task).ranks for task in tasks] for annotator in annotators]
    return np.array([[0.5 + 0.5 * np.sign(theirs - ours) for ours, theirs in row] for row in ranks])
