"""Replies in a dialogue, with the three rewards of Li et al. 2016 (arXiv:1606.01541), alone or together.

Their likelihoods and hidden states are those of the reference, not of models trained on dialogues. The judge compares
with people's replies, which no method sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.reward.base import AnyReward, WeightedSum, said
from lm_envs.reward.likelihood import Likelihood
from lm_envs.tasks import prompted
from lm_envs.tasks.base import TextTask

DULL = (
    "I don't know.",
    "I don't know what you mean.",
    "I have no idea.",
    "I'm not sure.",
    "You know what I mean.",
    "I don't think so.",
    "That's right.",
    "Oh, okay.",
)
"""Replies that say nothing."""
_LEAST = 1e-3  # of a similarity, before its logarithm
_WORST = -20.0  # nats a token, of a reply with no token


def load(
    path: str | None = None,
    policy: str = "smollm2",
    ease: float = 0.25,
    flow: float = 0.25,
    coherence: float = 0.5,
    **options: Any,
) -> TextTask:
    """Make the task for a pretrained policy.

    Args:
        path: rows with ``context``, the turns so far, and ``good``, people's replies, and optionally ``bad`` and
            ``split`` (DailyDialog++; Sai et al. 2020). None takes the 164 dialogues that were written for this project.
        policy: a language model, as :mod:`lm_envs.tasks.custom` takes it.
        ease, flow, coherence: weights of :class:`Ease`, :class:`Flow` and :class:`Coherence`, those of the paper; 0
            leaves a reward out.
        options: other fields of :class:`lm_envs.tasks.custom.CustomConfig`. A ``reward`` of one's own replaces the sum.
    """
    source = path or prompted.SHIPPED / "dialogue.jsonl"
    rows = prompted.read(source, _row, options.get("bad", "raise"))
    # The reward below needs the loaded model; lengths stand in for it until then.
    defaults = {"reward": "lm_envs.reward.lengths:tokens", "judge": "chrf[column=good]", "max_new_tokens": 32}
    description = f"{policy} replies in a dialogue ({Path(source).name})"
    task = prompted.load("dialogue", rows, policy, defaults, options, description)
    if options.get("reward") or options.get("reward_model"):
        return task
    return replace(task, reward=engineered(Likelihood(task.reference, task.tokenizer), ease, flow, coherence))


def engineered(likelihood: Likelihood, ease: float, flow: float, coherence: float) -> WeightedSum:
    """Return the weighted sum of the three rewards, without those of weight 0; ValueError if all are."""
    kinds: list[tuple[float, Callable[[Likelihood], AnyReward]]] = [(ease, Ease), (flow, Flow), (coherence, Coherence)]
    parts = [(weight, kind(likelihood)) for weight, kind in kinds if weight]
    if not parts:
        raise ValueError("dialogue: one of ease, flow and coherence must not be 0")
    return WeightedSum(parts)


class Ease:
    """Ease of answering: ``-mean_s log p(s | reply) / |s|`` over the dull replies s, equation 1 of the paper. A reply
    after which nobody would say those is easy to answer."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.__name__ = "ease"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """Score each reply, in nats a token."""
        replies = [_line(said(text)) for text in completions]
        found = self.likelihood.mean(list(DULL) * len(replies), [reply for reply in replies for _ in DULL])
        return (-found.reshape(len(replies), len(DULL)).mean(axis=1)).tolist()


class Flow:
    """Information flow: ``-log max(cos(h, h'), 0.001)`` of the mean hidden states of the reply and of the same
    speaker's turn before it, equation 2. It does not apply to a speaker's first turn."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.__name__ = "flow"

    def __call__(
        self, completions: Sequence[Any], context: Sequence[Sequence[str]], **columns: Any
    ) -> list[float | None]:
        """Score each reply; 0 for an empty one."""
        replies = list(map(said, completions))
        known = [i for i, turns in enumerate(context) if len(turns) > 1]
        found: list[float | None] = [None] * len(replies)
        if known:
            now = self.likelihood.hidden([replies[i] for i in known])
            earlier = self.likelihood.hidden([context[i][-2] for i in known])
            for i, value in zip(known, -np.log(np.maximum(_cosine(now, earlier), _LEAST)), strict=True):
                found[i] = float(value) if replies[i].strip() else 0.0
        return found


class Coherence:
    """Semantic coherence: ``log p(reply | context) / |reply| + log p(last turn | reply) / |last turn|``, the mutual
    information of equation 3. One model gives both directions."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.__name__ = "coherence"

    def __call__(self, completions: Sequence[Any], context: Sequence[Sequence[str]], **columns: Any) -> list[float]:
        """Score each reply, in nats a token."""
        replies = list(map(said, completions))
        forward = self.likelihood.mean(replies, ["".join(map(_line, turns)) for turns in context])
        backward = self.likelihood.mean([turns[-1] for turns in context], list(map(_line, replies)))
        return np.nan_to_num(forward + backward, nan=2 * _WORST).tolist()


def _line(turn: str) -> str:
    return turn.strip() + "\n"


def _cosine(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.where(norms > 0, (x * y).sum(axis=1) / np.where(norms > 0, norms, 1.0), 1.0)


def _row(row: Mapping[str, Any]) -> prompted.Row:
    turns = prompted.texts(row, "context")
    said_by = ("user", "assistant")  # the last turn is the user's
    messages = [{"role": said_by[(len(turns) - 1 - i) % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"prompt": messages, "context": turns, "good": prompted.texts(row, "good")}
