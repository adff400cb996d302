"""Preferences: groups of ranked texts as Trajectories, their batches, and simulated annotators that rank them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_envs.algos.engine.config import AgentConfig
from lm_envs.model.text import Codec
from lm_envs.settings import Count, Probability
from lm_envs.tasks import sampling
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.reviews import annotate
from lm_envs.trajectories import Trajectories, demonstrations, from_responses, whole_episodes


@dataclass
class PreferenceConfig(AgentConfig):
    """Adds how preferences are made, where they come from a task."""

    pairs: Count = 2048
    """Pairs of the reference's responses to compare, where no preferences are given; at most those that a task has
    choices of."""
    flip: Probability = 0.25
    """Probability that a simulated annotator's choice is recorded the wrong way round; the task's own choices stay."""


class Comparisons:
    """Groups of ranked texts, selected as wholes.

    Args:
        name: the algorithm's, for messages.
        data: Trajectories with ``group`` and ``rank``, 0 the best; or an object that has the two and selects such.

    Raises:
        ValueError: no data, no ranks, or a group in which all ranks are equal.
    """

    def __init__(self, name: str, data: Any) -> None:
        if data is None or data.group is None or data.rank is None:
            raise ValueError(
                f"{name} learns from preferences: pass data=Trajectories with group and rank, see "
                "comparisons.preferences"
            )
        ranks, present = by_group(data.rank, data.group, -1)
        flat = (ranks.amax(dim=1) == ranks.masked_fill(ranks < 0, ranks.max() + 1).amin(dim=1)).nonzero()
        if len(flat):
            number = int(torch.unique(data.group)[flat[0, 0]])
            raise ValueError(f"{name}: group {number} has no two texts of different rank, so no pair to learn")
        self.data, self.ranks = data, ranks
        order = torch.argsort(data.group, stable=True)
        self._order, self._ends = order, present.sum(dim=1).cumsum(0).tolist()

    def __len__(self) -> int:
        """How many groups."""
        return len(self._ends)

    def select(self, index: Tensor) -> Trajectories:
        """The rows of some groups, numbered from 0: one that is drawn twice must not become one of twice the texts."""
        rows = [self._order[self._ends[i - 1] if i else 0 : self._ends[i]] for i in index.tolist()]
        batch = self.data.select(torch.cat(rows))
        batch.group = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(r) for r in rows]))
        return batch


class Labeled:
    """Single responses that are wanted (rank 0) or not, each with a prompt that has another row's response.

    Args:
        name: the algorithm's, for messages.
        data: Trajectories with ``rank``; or packed examples that hold the mismatched rows already, ``mismatched=True``.

    Raises:
        ValueError: no data, or no ranks.
    """

    def __init__(self, name: str, data: Any) -> None:
        if data is None or data.rank is None:
            raise ValueError(f"{name} learns from labeled responses: pass data=Trajectories with rank, 0 where wanted")
        self.data = mismatched(data) if isinstance(data, Trajectories) else data

    def check_both(self, name: str) -> None:
        """Raise ValueError if all responses are wanted, or none is."""
        rank = self.data.rank
        assert rank is not None  # as it was found at the start
        wanted = rank[: len(self)] == 0
        if bool((wanted == wanted[0]).all()):
            which = "wanted" if bool(wanted[0]) else "unwanted"
            raise ValueError(
                f"{name}: all {len(self)} responses are labeled as {which}: there is nothing to tell apart"
            )

    def __len__(self) -> int:
        """How many responses."""
        return len(self.data) // 2

    def select(self, index: Tensor) -> Trajectories:
        """Some responses, and as many mismatched rows, of rank -1."""
        return self.data.select(torch.cat([index, index + len(self)]))


def mismatched(data: Trajectories) -> Trajectories:
    """The rows, and after them each prompt once more with the response of a row half the data away, of rank -1."""
    assert data.prompt is not None and data.response is not None and data.rank is not None
    rows = (torch.arange(len(data)) + len(data) // 2) % len(data)
    more = {"rank": torch.full_like(data.rank, -1), "weight": data.weight}
    others = whole_episodes(data.prompt, data.response[rows], **more)
    return Trajectories.concatenate([data, others])


def by_group(x: Tensor, group: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Rows as a table, one line per group.

    Args:
        x: ``(B,)``.
        group: ``(B,)`` int64.
        fill: for groups smaller than the largest.

    Returns:
        ``(G, K)`` in the order of the groups' numbers and of the rows within each, and where it holds a row, bool.
    """
    counts = torch.unique(group, return_counts=True)[1]
    present = torch.arange(int(counts.max()), device=x.device) < counts[:, None]
    table = x.new_full(present.shape, fill)
    return table.masked_scatter(present, x[torch.argsort(group, stable=True)]), present


def group_weights(traj: Trajectories) -> Tensor | None:
    """``(G,)``, the weight of each group in a loss; None for 1."""
    return None if traj.weight is None or traj.group is None else by_group(traj.weight, traj.group, 0.0)[0][:, 0]


def preferences(
    groups: Sequence[Sequence[Sequence[int]]], rank: Sequence[Sequence[int]], prompt_length: int, max_new_tokens: int
) -> Trajectories:
    """Ranked texts as Trajectories.

    Args:
        groups: per prompt its texts as token ids, prompt and response in one.
        rank: per prompt the rank of each text, 0 the best.
        prompt_length, max_new_tokens: as for :func:`lm_envs.trajectories.demonstrations`.
    """
    texts = [text for group in groups for text in group]
    number = [i for i, group in enumerate(groups) for _ in group]
    traj = demonstrations(texts, prompt_length, max_new_tokens, number)
    traj.rank = torch.as_tensor([place for ranks in rank for place in ranks], dtype=torch.int64)
    if traj.rank.shape != (len(texts),):
        raise ValueError(f"preferences: {len(texts)} texts and {len(traj.rank)} ranks; there must be one rank per text")
    return traj


def annotated_pairs(task: TextTask, pairs: int, flip: float, seed: int) -> Trajectories:
    """Pairs of the reference's responses to training prompts, ranked as the task's own annotators chose; where it has
    none, by simulated annotators that follow its judge, or its reward where it has no judge
    (:func:`lm_envs.tasks.reviews.annotate`).

    Args:
        pairs: how many: the task's first ones, at most all where it has choices; if a task without comes with fewer,
            responses are sampled, the prompts taking turns.
        flip: probability that a choice is recorded the wrong way round.
        seed: of the annotators, and of the responses where they are sampled.
    """
    prompts, columns = task.prompts["train"], task.columns.get("train", {})
    pairs = min(pairs, len(task.preferred)) if task.preferred else pairs
    if pairs <= len(task.pairs):
        index = [row for row, _, _ in task.pairs[:pairs] for _ in range(2)]
        responses = [response for _, *both in task.pairs[:pairs] for response in both]
        codec = Codec(task.tokenizer, task.reference)
        given = {name: [values[i] for i in index] for name, values in columns.items()}
        samples = sampling.as_samples(codec, [prompts[i] for i in index], responses, task.eos_token_ids, given)
    else:
        index = [i // 2 % len(prompts) for i in range(2 * pairs)]
        samples = sampling.response_pairs(task.reference, task, "train", pairs, seed=seed, batch_size=512)
    if task.preferred:
        preferred = np.array(task.preferred[:pairs])
    else:
        gold = samples.score(task.judge or task.reward).reshape(-1, 2)
        preferred = annotate(gold[:, 0], gold[:, 1], flip=flip, seed=seed)
    group = np.repeat(np.arange(pairs), 2).tolist()
    traj = from_responses([prompts[i] for i in index], samples.completion_ids, task.prompt_length, group)
    traj.rank = ranks_of(preferred)
    return traj


def ranks_of(first_is_better: np.ndarray) -> Tensor:
    """``(2N,)`` ranks of N pairs that stand row after row, from ``(N,)`` choices."""
    return torch.from_numpy(np.stack([~first_is_better, first_is_better], axis=1).reshape(-1).astype(np.int64))


def winners(data: Trajectories) -> Trajectories:
    """The rows of rank 0, without groups and ranks: demonstrations."""
    assert data.rank is not None
    best = data.select(data.rank == 0)
    best.group = best.rank = None
    return best
