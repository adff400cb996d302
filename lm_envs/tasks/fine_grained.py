"""Three sentences with a reward for each: a pretrained model is paid per sentence, or the same sum at the end.

A sentence should be about the topic, say what earlier ones did not, and be plausible; a reward model may take the place
of each rule (Wu et al. 2023, arXiv:2306.01693). The judge knows other words of the topic, which no method is rewarded
for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_envs.model.loading import Placement
from lm_envs.reward.base import AnyReward, WeightedSum, said
from lm_envs.reward.building import build_reward
from lm_envs.reward.likelihood import Likelihood, fluency
from lm_envs.reward.sentences import PerSentence, sentences
from lm_envs.reward.specs import parse_reward
from lm_envs.tasks import prompted
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.concepts import covers

WANTED = 3
"""Sentences that are asked for."""
_LEAST = 4  # words of a sentence that can be paid


def load(
    path: str | None = None,
    policy: str = "smollm2",
    dense: bool = True,
    relevance: float | str = 0.3,
    novelty: float | str = 0.3,
    plausibility: float | str = 0.3,
    extra: float = 0.3,
    **options: Any,
) -> TextTask:
    """Make the task for a pretrained policy.

    Args:
        path: rows with ``prompt``, which asks for three sentences, ``topic`` and ``held`` (words of a good answer, for
            the reward and for the judge) and optionally ``split``. None takes the 240 that were written for this
            project.
        policy: a language model, as :mod:`lm_envs.tasks.custom` takes it.
        dense: pay a sentence with its last token; false pays the same sum with the last token of the response.
        relevance, novelty, plausibility: weights of the three rewards of a sentence, 0 for none; or the text of a
            reward that scores a sentence instead of the rule, such as ``model:DIR*0.3``.
        extra: price of each sentence after the third, which earns nothing.
        options: other fields of :class:`lm_envs.tasks.custom.CustomConfig`. A ``reward`` of one's own replaces the sum.
    """
    chosen = {"relevance": relevance, "novelty": novelty, "plausibility": plausibility}
    specs = {name: parse_reward(value) for name, value in chosen.items() if isinstance(value, str)}
    # The reward below needs the loaded model; lengths stand in for it until then.
    here = "lm_envs.tasks.fine_grained"
    defaults: dict[str, Any] = {"reward": "lm_envs.reward.lengths:tokens", "judge": f"{here}:judge"}
    defaults |= {"max_new_tokens": 80, "temperature": 0.7}
    source = path or prompted.SHIPPED / "fine-grained.jsonl"
    description = f"{policy} writes three sentences, paid {'one by one' if dense else 'at the end'}"
    rows = prompted.read(source, _row, options.get("bad", "raise"))
    task = prompted.load("fine-grained", rows, policy, defaults, options, description)
    if options.get("reward") or options.get("reward_model"):
        return task
    placement = Placement(options.get("reward_dtype", "float32"), options.get("device"), options.get("device_map"))
    conversational = "messages" in task.columns["train"]
    rules = {
        "relevance": relevant,
        "novelty": new,
        "plausibility": Plausible(Likelihood(task.reference, task.tokenizer)),
    }
    parts: list[tuple[float, AnyReward]] = []
    for name, value in chosen.items():
        scorer: Any = rules[name]
        if name in specs:
            scorer = build_reward(specs[name], conversational=conversational, placement=placement)
        weight = 1.0 if isinstance(value, str) else value
        if weight:
            parts.append((weight, PerSentence(scorer, task.tokenizer, name, dense=dense, most=WANTED)))
    if not parts:
        raise ValueError("fine-grained: one of relevance, novelty and plausibility must not be 0")
    parts += [(-extra, PerSentence(beyond, task.tokenizer, "extra", dense=dense))] if extra else []
    return replace(task, reward=WeightedSum(parts))


def relevant(
    completions: Sequence[Any], topic: Sequence[Sequence[str]], earlier: Sequence[Sequence[str]], **columns: Any
) -> list[float]:
    """Score a sentence 1 if it has a word of the topic that no earlier one has, else 0."""
    rows = zip(map(said, completions), topic, earlier, strict=True)
    return [
        float(_is_whole(text) and any(covers(text, word) and not covers(" ".join(before), word) for word in words))
        for text, words, before in rows
    ]


def new(completions: Sequence[Any], earlier: Sequence[Sequence[str]], **columns: Any) -> list[float]:
    """Return the share of a sentence's pairs of neighboring words that occur for the first time, in the sentence and in
    the response."""
    found = []
    for text, before in zip(map(said, completions), earlier, strict=True):
        pairs, seen = _pairs(text), {pair for sentence in before for pair in _pairs(sentence)}
        found.append(len(set(pairs) - seen) / len(pairs) if _is_whole(text) else 0.0)
    return found


class Plausible:
    """The :func:`~lm_envs.reward.likelihood.fluency` of a sentence alone, in [0, 1]."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.__name__ = "plausible"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """Score each sentence."""
        texts = list(map(said, completions))
        return [
            float(value) * _is_whole(text) for text, value in zip(texts, fluency(self.likelihood, texts), strict=True)
        ]


def beyond(earlier: Sequence[Sequence[str]], **columns: Any) -> list[float]:
    """Return 1 for each sentence after the last that is wanted, else 0."""
    return [float(len(before) >= WANTED) for before in earlier]


def judge(completions: Sequence[Any], held: Sequence[Sequence[str]], **columns: Any) -> list[float]:
    """Score a response by the words of ``held`` in it, a third of a point for each of three, and half a point for just
    three sentences."""
    rows = zip(map(said, completions), held, strict=True)
    return [
        min(WANTED, sum(covers(text, word) for word in words)) / WANTED + 0.5 * (len(sentences(text)) == WANTED)
        for text, words in rows
    ]


def _is_whole(text: str) -> bool:
    """Whether a sentence is long enough, and was not cut at the length limit."""
    return len(text.split()) >= _LEAST and re.search(r"[.!?][\"')\]]*$", text) is not None


def _pairs(text: str) -> list[tuple[str, str]]:
    return list(itertools.pairwise(re.findall(r"[\w']+", text.lower())))


def _row(row: Mapping[str, Any]) -> prompted.Row:
    return {"prompt": prompted.text(row, "prompt")} | {name: prompted.texts(row, name) for name in ("topic", "held")}
