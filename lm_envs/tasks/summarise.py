"""Summaries of posts: a pretrained model says in one sentence what somebody wrote in many.

The reward is the share of the post's facts that a summary mentions, times fluency, less a price for words beyond a
limit; the judge is ROUGE against a reference summary, which no method sees (TL;DR: Völske et al. 2017; Stiennon et al.
2020, arXiv:2009.01325).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_envs.data.conventions import compared_summaries, nested
from lm_envs.reward.base import WeightedSum, said
from lm_envs.reward.likelihood import Likelihood, fluency
from lm_envs.settings import short
from lm_envs.tasks import prompted, summarise_posts
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.concepts import covers

_KEYWORDS = 6  # that stand for the facts of a post without any
_COMMON = set(
    (
        "about after again ago also always another any anyone around away back because been before being both cannot "
        "come could didn does doesn doing done don down each else even ever every feel felt first from getting give "
        "goes going good have having here herself himself http https into isn just know like little long made make "
        "many maybe more most much myself need never next nothing once only other over people post quite really same "
        "says seem should since some someone something still such take tell than thank thanks that their them then "
        "there these they thing things think this those though through time told took very want wanted wants wasn "
        "well went were what when where which while will with without won would year years your"
    ).split()
)


def load(
    path: str | None = None, policy: str = "smollm2", limit: int = 25, over: float = 0.02, **options: Any
) -> TextTask:
    """Make the task for a pretrained policy.

    Args:
        path: rows with ``post`` (or ``prompt``) and ``summary`` (or ``label`` or ``completion``), and optionally
            ``title``, ``facts`` and ``split``; or the comparisons of Stiennon et al. with ``info`` (or ``post``),
            ``summaries`` and ``choice``, whose better summary is the reference. Rows with the same post are one prompt.
            None takes the 240 posts that were written for this project.
        policy: a language model, as :mod:`lm_envs.tasks.custom` takes it.
        limit: words of a summary that are asked for at most.
        over: price of each word beyond the limit, in facts' full share.
        options: other fields of :class:`lm_envs.tasks.custom.CustomConfig`. A ``reward`` of one's own replaces the sum.
    """
    rows: dict[str, prompted.Row] = {}
    if path:
        given = prompted.read(path, _row, options.get("bad", "raise"))
    else:
        given = [{**_row(row), "split": row["split"]} for row in summarise_posts.rows()]
    for row in given:
        rows.setdefault(row["prompt"], {**row, "reference": []})["reference"].extend(row["reference"])
    asked = [{**row, "prompt": request(row["prompt"], limit)} for row in rows.values()]
    # The reward below needs the loaded model; lengths stand in for it until then.
    defaults = {"reward": "lm_envs.reward.lengths:tokens", "judge": "rougeL", "max_new_tokens": 48, "temperature": 0.7}
    description = f"{policy} summarizes posts ({Path(path).name if path else 'those of the project'})"
    task = prompted.load("summarise", asked, policy, defaults, options, description)
    if options.get("reward") or options.get("reward_model"):
        return task
    return replace(task, reward=covering(Likelihood(task.reference, task.tokenizer), limit, over))


def request(post: str, limit: int = 25) -> str:
    """Return what a policy is asked."""
    return f"{post}\n\nSummarize this post in one sentence of at most {limit} words."


def covering(likelihood: Likelihood, limit: int, over: float) -> WeightedSum:
    """Return the default reward: ``coverage * fluency - over * words beyond the limit``."""
    if limit < 1:
        raise ValueError(f"summarise: limit must be at least 1 word, not {limit}")
    return WeightedSum([(1.0, Covering(likelihood)), (-over, Beyond(limit))])


class Covering:
    """Coverage times :func:`~lm_envs.reward.likelihood.fluency`, in [0, 1]: a list of words is worth less
    than a sentence."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.__name__ = "facts*fluency"

    def __call__(
        self, completions: Sequence[Any], facts: Sequence[Sequence[Sequence[str]]], **columns: Any
    ) -> list[float]:
        """Score each summary; 0 for one with less than two tokens."""
        texts = list(map(said, completions))
        return (np.array(coverage(texts, facts)) * fluency(self.likelihood, texts)).tolist()


class Beyond:
    """The number of words beyond a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.__name__ = "over"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """Count them in each summary."""
        return [float(max(0, len(said(text).split()) - self.limit)) for text in completions]


def coverage(completions: Sequence[Any], facts: Sequence[Sequence[Sequence[str]]], **columns: Any) -> list[float]:
    """Return the share of the facts that a text mentions: all words of one of a fact's phrases, in some form."""
    rows = zip(map(said, completions), facts, strict=True)
    return [
        sum(any(_mentions(text, phrase) for phrase in fact) for fact in several) / len(several)
        for text, several in rows
    ]


def keywords(title: str, post: str) -> list[list[str]]:
    """Return what stands for the facts of a post without any: the rarer words of its title, then those that the post
    says most often."""
    found = [word for word in re.findall(r"[^\W\d_]{4,}", f"{title} {post}".lower()) if word not in _COMMON]
    heads, counts = set(re.findall(r"\w+", title.lower())), Counter(found)
    ranked = sorted(counts, key=lambda word: (word not in heads, -counts[word]))  # stable: in the order of the text
    return [[word] for word in ranked[:_KEYWORDS]]


def _mentions(text: str, phrase: str) -> bool:
    return all(covers(text, word) for word in phrase.split())


def _row(row: Mapping[str, Any]) -> prompted.Row:
    source, reference = _compared(row) if "summaries" in row else _plain(row)
    title = source.get("title") or ""
    if not isinstance(title, str):
        raise ValueError(f"'title' must be a text, not {short(title)}")
    post = prompted.text(source, next((name for name in ("post", "article", "prompt") if source.get(name)), "post"))
    post = re.sub(r"\s*TL;?DR:?\s*$", "", post)
    facts = row.get("facts") or keywords(title, post)
    if not isinstance(facts, list) or not all(_is_fact(fact) for fact in facts):
        raise ValueError(f"'facts' must be a list of lists of words, not {short(facts)}")
    if not facts:
        raise ValueError("the post has no word to go by, and no 'facts'")
    whole = f"{title}\n\n{post}" if title else post
    return {"prompt": whole, "reference": [reference], "facts": facts}


def _plain(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    names = ("summary", "label", "completion")
    return row, prompted.text(row, next((name for name in names if name in row), "summary"))


def _compared(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The post and the better summary of a comparison, which :mod:`lm_envs.data.conventions` checks."""
    info = nested(row, "info") if "info" in row else {name: row.get(name) for name in ("title", "post", "subreddit")}
    example = compared_summaries({**row, "info": info})
    return info, str(example.completions[example.ranks.index(0)])


def _is_fact(fact: Any) -> bool:
    return isinstance(fact, list) and bool(fact) and all(isinstance(word, str) and word.strip() for word in fact)
