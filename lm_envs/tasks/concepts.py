"""Sentences that use given words: a pretrained model writes an everyday sentence with three to five concepts.

The reward is coverage times fluency, a text's plausibility under the reference; the judge compares with reference
sentences, which no method sees (CommonGen: Lin et al. 2020, arXiv:1911.03705).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_envs.reward.base import said
from lm_envs.reward.likelihood import Likelihood, fluency
from lm_envs.settings import short
from lm_envs.tasks import prompted
from lm_envs.tasks.base import TextTask

_IRREGULAR: Mapping[str, frozenset[str]] = {
    line.split()[0]: frozenset(line.split())
    for line in (
        "be is are was were been|begin began begun|bend bent|bite bit bitten|blow blew blown|"
        "break broke broken|bring brought|build built|buy bought|catch caught|child children|"
        "choose chose chosen|come came|dig dug|do did done|draw drew drawn|drink drank drunk|"
        "drive drove driven|eat ate eaten|fall fell fallen|feed fed|feel felt|fight fought|find found|"
        "fly flew flown|foot feet|get got gotten|give gave given|go went gone|goose geese|grind ground|"
        "grow grew grown|hang hung|have has had|hear heard|hide hid hidden|hold held|keep kept|kneel knelt|"
        "know knew known|lay laid|lead led|lean leant|leap leapt|leave left|lie lay lain lying|light lit|"
        "lose lost|make made|man men|meet met|mouse mice|pay paid|person people|ride rode ridden|"
        "ring rang rung|rise rose risen|run ran|say said|see saw seen|sell sold|send sent|sew sewn|"
        "shake shook shaken|shine shone|shoot shot|show shown|sing sang sung|sit sat|sleep slept|slide slid|"
        "speak spoke spoken|spend spent|spin spun|stand stood|steal stole stolen|stick stuck|strike struck|"
        "sweep swept|swim swam swum|swing swung|take took taken|teach taught|tear tore torn|tell told|"
        "think thought|throw threw thrown|tie tying|tooth teeth|wake woke woken|wear wore worn|win won|"
        "wind wound|woman women|write wrote written"
    ).split("|")
}


def load(path: str | None = None, policy: str = "smollm2", **options: Any) -> TextTask:
    """Make the task for a pretrained policy.

    Args:
        path: rows with ``concepts``, a list of words, and ``reference`` (or CommonGen's ``target``), a sentence or
            several, and optionally ``split``; rows with the same concepts are one prompt. None takes the 240 sets that
            were written for this project.
        policy: a language model, as :mod:`lm_envs.tasks.custom` takes it.
        options: other fields of :class:`lm_envs.tasks.custom.CustomConfig`. A ``reward`` of one's own replaces coverage
            times fluency.
    """
    source = path or prompted.SHIPPED / "concepts.jsonl"
    rows: dict[str, prompted.Row] = {}
    for row in prompted.read(source, _row, options.get("bad", "raise")):
        rows.setdefault(row["prompt"], {**row, "reference": []})["reference"].extend(row["reference"])
    defaults = {
        "reward": "lm_envs.tasks.concepts:coverage",
        "judge": "bleu*0.5 + rougeL*0.5",
        "max_new_tokens": 32,
    }
    description = f"{policy} writes a sentence with given words ({Path(source).name})"
    task = prompted.load("concepts", list(rows.values()), policy, defaults, options, description)
    if options.get("reward") or options.get("reward_model"):
        return task
    reward: Any = CoveredAndFluent(Likelihood(task.reference, task.tokenizer))
    return replace(task, reward=reward)


class CoveredAndFluent:
    """The reward ``coverage * fluency``, in [0, 1]; see :func:`~lm_envs.reward.likelihood.fluency`: likely tokens are
    fluent, whatever was asked for."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.__name__ = "coverage*fluency"

    def __call__(self, completions: Sequence[Any], concepts: Sequence[Sequence[str]], **columns: Any) -> list[float]:
        """Score each text; 0 for one with less than two tokens."""
        texts = list(map(said, completions))
        return (np.array(coverage(texts, concepts)) * fluency(self.likelihood, texts)).tolist()


def coverage(completions: Sequence[Any], concepts: Sequence[Sequence[str]], **columns: Any) -> list[float]:
    """Return the share of the concepts of which a text has a form, inflected regularly or as a frequent irregular
    word."""
    rows = zip(map(said, completions), concepts, strict=True)
    return [sum(covers(text, word) for word in several) / len(several) for text, several in rows]


def covers(text: str, concept: str) -> bool:
    """Whether a text has a form of a word."""
    return not forms(concept).isdisjoint(re.findall(r"[^\W\d_]+", text.lower()))


def forms(word: str) -> set[str]:
    """Return a word's inflections: plural, past, participles, agent and comparison, right or not."""
    word = word.lower()
    stems = {word}
    if word.endswith("e"):
        stems.add(word[:-1])
    if word.endswith("y"):
        stems.add(word[:-1] + "i")
    if word.endswith("f"):
        stems.add(word[:-1] + "v")
    if word.endswith("fe"):
        stems.add(word[:-2] + "v")
    if re.fullmatch(r".*[^aeiou][aeiou][^aeiouwxy]", word):
        stems.add(word + word[-1])
    return {word, *_IRREGULAR.get(word, ())} | {
        stem + end for stem in stems for end in ("s", "es", "d", "ed", "ing", "er", "ers", "est")
    }


def _row(row: Mapping[str, Any]) -> prompted.Row:
    words = prompted.texts(row, "concepts")
    given = row.get("reference", row.get("target"))
    several = [given] if isinstance(given, str) else given
    if not isinstance(several, list) or not several or not all(isinstance(one, str) and one.strip() for one in several):
        raise ValueError(f"'reference' must be a sentence or a list of sentences, not {short(given)}")
    listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return {"prompt": f"Write one short sentence with the words {listed}.", "concepts": words, "reference": several}
