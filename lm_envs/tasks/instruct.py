"""Instructions with constraints that a program checks: length, format, case, language, words to use or avoid.

The reward is the share of constraints that a response meets. The judge wants all of them, and a word of the topic, so
that a text which fits the form and says nothing of what was asked for does not win.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_envs.feedback.annotators import pool
from lm_envs.feedback.study import Item
from lm_envs.reward.base import said
from lm_envs.reward.constraints import all_met, check_constraints, share
from lm_envs.settings import near, short
from lm_envs.tasks import prompted
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.preferences import with_learned_reward

_CODES = {
    **{"ar": "arabic", "bg": "bulgarian", "bn": "bengali", "de": "german", "el": "greek", "en": "english"},
    **{"es": "spanish", "fa": "persian", "fi": "finnish", "fr": "french", "gu": "gujarati", "he": "hebrew"},
    **{"hi": "hindi", "it": "italian", "ja": "japanese", "kn": "kannada", "ko": "korean", "mr": "marathi"},
    **{"ne": "nepali", "nl": "dutch", "pa": "punjabi", "pt": "portuguese", "ru": "russian", "sv": "swedish"},
    **{"sw": "swahili", "ta": "tamil", "te": "telugu", "th": "thai", "uk": "ukrainian", "ur": "urdu"},
    **{"vi": "vietnamese", "zh": "chinese"},
}


JUDGES, TEACHERS = 0, 1  # seeds of the annotators whose votes are reported, and of those whose choices are learned


def load(path: str | None = None, policy: str = "smollm2", pairs: int = 0, **options: Any) -> TextTask:
    """Make the task for a pretrained policy.

    Args:
        path: rows with ``prompt`` and ``constraints`` (see :mod:`lm_envs.reward.constraints`) and optionally ``topic``,
            a list of words, and ``split``; or IFEval's ``prompt``, ``instruction_id_list`` and ``kwargs`` (Zhou et al.
            2023). None takes the 360 instructions that were written for this project.
        policy: a language model, as :mod:`lm_envs.tasks.custom` takes it.
        pairs: pairs of the policy's responses to training prompts between which simulated annotators choose; the reward
            then learns their choices (:mod:`lm_envs.tasks.preferences`). 0 rewards what is checked.
        options: other fields of :class:`lm_envs.tasks.custom.CustomConfig`, such as ``reward`` and ``max_new_tokens``.
    """
    if type(pairs) is not int or pairs < 0:
        raise ValueError(f"pairs must be a whole number from 0 on, not {short(pairs)}")
    if pairs and not options.keys().isdisjoint(("reward", "reward_model")):
        raise ValueError("pairs makes a reward model of its own: give no other reward, or leave pairs out")
    source = path or prompted.SHIPPED / "instruct.jsonl"
    defaults = {"reward": "constraints", "judge": "lm_envs.tasks.instruct:judge", "max_new_tokens": 96}
    defaults |= {"temperature": 0.7, "examples": str(prompted.SHIPPED / "instruct_examples.jsonl")}
    rows = prompted.read(source, _row, options.get("bad", "raise"))
    description = f"{policy} follows instructions whose constraints are checked ({Path(source).name})"
    made = prompted.load("instruct", rows, policy, defaults, options, description)
    made = replace(made, annotators=pool(quality, JUDGES))
    return with_learned_reward(made, pairs, pool(quality, TEACHERS)) if pairs else made


def quality(item: Item) -> list[float]:
    """Score the responses of an item as simulated annotators see them: half for the share of constraints met, half for
    the share of the topic's words that occur; by the constraints alone, where there is no topic."""
    texts = [response.text for response in item.responses]
    met = [value or 0.0 for value in share(texts, [item.columns["constraints"]] * len(texts))]
    topic = item.columns.get("topic")
    if not topic:
        return met
    said_of_it = [sum(_on_topic(text, [word]) for word in topic) / len(topic) for text in texts]
    return [(form + content) / 2 for form, content in zip(met, said_of_it, strict=True)]


def judge(
    completions: Sequence[Any], constraints: Sequence[Any], topic: Sequence[Any] | None = None, **columns: Any
) -> list[float]:
    """Score 1 for a response that meets all constraints and has a word that begins as one of the topic's, if its prompt
    names any; else 0."""
    several = [None] * len(completions) if topic is None else topic
    rows = zip(map(said, completions), all_met(completions, constraints), several, strict=True)
    return [float(bool(met) and (not words or _on_topic(text, words))) for text, met, words in rows]


def _on_topic(text: str, words: Sequence[str]) -> bool:
    return any(found.startswith(word.lower()) for found in re.findall(r"\w+", text.lower()) for word in words)


def _row(row: Mapping[str, Any]) -> prompted.Row:
    prompt = prompted.text(row, "prompt")
    constraints: Any
    if "instruction_id_list" in row:
        constraints, topic = _ifeval(row), None
    else:
        constraints, topic = row.get("constraints"), row.get("topic")
        if topic is not None:
            topic = prompted.texts(row, "topic")
    check_constraints(constraints)
    return {"prompt": prompt, "constraints": constraints, "topic": topic}


def _ifeval(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the constraints of a row of IFEval."""
    ids, settings = row["instruction_id_list"], row.get("kwargs")
    if not isinstance(ids, list) or not isinstance(settings, list) or len(ids) != len(settings):
        raise ValueError(f"'instruction_id_list' and 'kwargs' must be lists of one length, not {short(settings)}")
    return [_translated(name, given) for name, given in zip(ids, settings, strict=True)]


def _band(given: Mapping[str, Any], number: str, relation: str) -> dict[str, Any]:
    """IFEval's relations: "at least" n, or "less than" n."""
    less = given.get(relation) == "less than"
    return {"most": given[number] - 1} if less else {"least": given[number]}


_IFEVAL: Mapping[str, Any] = {
    "keywords:existence": lambda g: {"kind": "use", "words": g["keywords"]},
    "keywords:forbidden_words": lambda g: {"kind": "avoid", "words": g["forbidden_words"]},
    "keywords:frequency": lambda g: {
        "kind": "frequency",
        "word": g["keyword"],
        **_band(g, "frequency", "relation"),
    },
    "keywords:letter_frequency": lambda g: {
        "kind": "letter",
        "letter": g["letter"],
        **_band(g, "let_frequency", "let_relation"),
    },
    "language:response_language": lambda g: {"kind": "language", "name": _CODES.get(g["language"], g["language"])},
    "length_constraints:number_words": lambda g: {"kind": "words", **_band(g, "num_words", "relation")},
    "length_constraints:number_sentences": lambda g: {"kind": "sentences", **_band(g, "num_sentences", "relation")},
    "length_constraints:number_paragraphs": lambda g: {
        "kind": "paragraphs",
        "separator": "***",
        **_exactly(g["num_paragraphs"]),
    },
    "length_constraints:nth_paragraph_first_word": lambda g: {
        "kind": "paragraph_starts",
        "number": g["nth_paragraph"],
        "phrase": g["first_word"],
    },
    "detectable_content:number_placeholders": lambda g: {"kind": "placeholders", "least": g["num_placeholders"]},
    "detectable_content:postscript": lambda g: {"kind": "postscript", "marker": g["postscript_marker"]},
    "detectable_format:number_bullet_lists": lambda g: {"kind": "bullets", **_exactly(g["num_bullets"])},
    "detectable_format:number_highlighted_sections": lambda g: {"kind": "highlights", "least": g["num_highlights"]},
    "detectable_format:multiple_sections": lambda g: {
        "kind": "sections",
        "marker": g["section_spliter"],
        "least": g["num_sections"],
    },
    "detectable_format:json_format": lambda g: {"kind": "json"},
    "detectable_format:title": lambda g: {"kind": "title"},
    "detectable_format:constrained_response": lambda g: {
        "kind": "one_of",
        "answers": [f"My answer is {answer}." for answer in ("yes", "no", "maybe")],
    },
    "combination:two_responses": lambda g: {"kind": "two_answers"},
    "combination:repeat_prompt": lambda g: {"kind": "repeats", "request": g["prompt_to_repeat"]},
    "startend:end_checker": lambda g: {"kind": "ends", "phrase": g["end_phrase"]},
    "startend:quotation": lambda g: {"kind": "quoted"},
    "change_case:capital_word_frequency": lambda g: {
        "kind": "capital_words",
        **_band(g, "capital_frequency", "capital_relation"),
    },
    "change_case:english_capital": lambda g: {"kind": "case", "case": "upper"},
    "change_case:english_lowercase": lambda g: {"kind": "case", "case": "lower"},
    "punctuation:no_comma": lambda g: {"kind": "no_commas"},
}
"""The constraint that an instruction of IFEval with these settings means here."""


def _exactly(number: int) -> dict[str, int]:
    return {"least": number, "most": number}


def _translated(name: str, given: Any) -> dict[str, Any]:
    if name not in _IFEVAL:
        raise ValueError(f"no instruction {short(name)} of IFEval: {near(str(name), _IFEVAL)}")
    try:
        return dict(_IFEVAL[name](given or {}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the settings of {name!r} lack {error}") from None
