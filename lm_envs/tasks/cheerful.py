"""Cheerful sentences: a pretrained instruction model writes a sentence about an everyday topic.

The reward counts words of good cheer from one list, the judge those of another list that no method sees, as two halves
of the labels do in the Reviews task. Both also want a finished sentence. No model but the policy is needed; the prompts
below were written for this project.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lm_envs.reward.base import said
from lm_envs.tasks import prompted
from lm_envs.tasks.base import TextTask

_ASKED = (
    "Write one short sentence about {}.",
    "In one sentence, describe {}.",
    "Tell me something about {} in a single sentence.",
)
_TOPICS = (
    "a bakery at dawn; the first day of spring; an old wooden boat; a train ride through the hills; a cat on a "
    "window sill; the village library; a market in the rain; my grandmother's garden; a bicycle with a flat tire; "
    "the last bus home; a kite over the beach; a cup of tea; the neighbor's dog; a school play; an empty stadium; "
    "a letter from a friend; the smell of fresh bread; a long queue; a walk in the fog; the town square at noon; "
    "a broken umbrella; a choir practice; the night sky in winter; a picnic by the lake; an attic full of boxes; "
    "a new pair of shoes; the corner shop; a game of chess; a wedding in a barn; the road to the coast; a child "
    "learning to swim; a river after the storm; moving to a new flat; an apple tree; the museum on a Monday; a "
    "birthday without cake; a lighthouse; the office on a Friday; a bowl of soup; a bridge over the canal; an "
    "early alarm; the fire station; a lost glove; a field of sunflowers; the dentist's waiting room; a guitar "
    "with five strings; the ferry to the island; a snowy street; a rented car; the harvest; a puzzle with a "
    "missing piece; a phone call at midnight; the playground; a crowded elevator; a farm in July; the oldest "
    "house in town; a pot of paint; the lake in autumn; a marathon; a campfire; the post office; a pair of twins; "
    "an airport at night; the weather today; a carpenter at work; a goldfish; the mountain hut; a traffic jam; a "
    "secret recipe; the football match; a new teacher; a quiet Sunday; the harbor; a photo album; a power cut; "
    "the choir next door; a broken elevator; a hospital corridor; the summer camp; a chess club; a walk to work; "
    "the local newspaper; a thunderstorm; a jar of honey; the zoo on a cold day; a desk by the window; an old "
    "radio; the tailor's shop; a tent in the wind; a plate of pancakes; the swimming pool; a parcel at the door; "
    "a garden gate; the evening news; a row of lemon trees; a blanket on the sofa"
).split("; ")
_SPLITS = ("train", "train", "test", "train", "test", "validation", "train", "test")
# Words of two lists, none in both; each in all the forms that are counted.
REWARDED = set(
    (
        "happy happily joy joyful wonderful bright brightly beautiful love lovely loved delight delightful warm "
        "warmth smile smiling sweet perfect peaceful magical friendly vibrant cheerful"
    ).split()
)
JUDGED = set(
    (
        "glad pleasant great good charming charm laugh laughter laughing fun kind kindness golden sunny cozy gentle "
        "fresh serene enchanting amazing hope hopeful lively radiant comfort comforting tranquil picturesque inviting"
    ).split()
)
_MOST = 3  # words that count
_ENDS = (".", "!", "?")


def load(policy: str = "smollm2", **options: Any) -> TextTask:
    """Make the task for a pretrained policy.

    Args:
        policy: a language model with a chat template, as :mod:`lm_envs.tasks.custom` takes it.
        options: other fields of :class:`lm_envs.tasks.custom.CustomConfig`, such as ``max_new_tokens``.
    """
    here = "lm_envs.tasks.cheerful"
    defaults = {"reward": f"{here}:reward", "judge": f"{here}:judge", "max_new_tokens": 32}
    description = f"{policy} writes a cheerful sentence about an everyday topic"
    return prompted.load("cheerful", prompts(), policy, defaults, options, description)


def prompts() -> list[dict[str, Any]]:
    """Return the rows: requests for a sentence, and the split. A topic is in one split."""
    return [
        {"prompt": asked.format(topic), "split": _SPLITS[i % len(_SPLITS)]}
        for i, topic in enumerate(_TOPICS)
        for asked in _ASKED
    ]


def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Score texts by different words of :data:`REWARDED`, up to three, and half a point for a finished sentence."""
    return [_score(text, REWARDED) for text in map(said, completions)]


def judge(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Score texts as :func:`reward` does, by words of :data:`JUDGED`."""
    return [_score(text, JUDGED) for text in map(said, completions)]


def _score(text: str, words: set[str]) -> float:
    found = words.intersection(re.findall("[a-z]+", text.lower()))
    return min(len(found), _MOST) + 0.5 * text.rstrip().endswith(_ENDS)
