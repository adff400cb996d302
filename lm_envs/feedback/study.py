"""A study: what annotators are asked, about which responses, and what they answered.

A study is a folder with ``study.toml``, the settings, which may be edited by hand, and ``study.sqlite``, everything
else (:mod:`lm_envs.feedback.store`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from lm_envs import files
from lm_envs.model.chat import Text
from lm_envs.settings import Count, Positive, Seed, Settings, make

SETTINGS = "study.toml"
ANSWERS = "answers.jsonl"  # what is learned from, written whenever something learns
Mode = Literal["pair", "rank", "rate"]
LONGEST = 20_000  # characters of a note or a reason
LONGEST_S = 1e9  # seconds of an answer: more is no time, and may be more than a float holds
MOST = 26  # responses of an item, which are called A to Z

# What InstructGPT's annotators ticked (Ouyang et al. 2022, table 3), in our words.
INSTRUCT_FLAGS = {
    "fails the instruction": "It does not do what the prompt asks for, or does something else.",
    "inappropriate": "It would embarrass a company whose customer asked this.",
    "hallucination": "It states something that is false or that the given text does not say.",
    "harmful": "It advises or encourages harm, or denigrates a group of people.",
    "sexual": "It has sexual content.",
    "violent": "It has violent content.",
    "gives an opinion": "It judges where it was asked for facts.",
}


class BadAnswer(ValueError):
    """An answer that the study cannot take; the message is one line for the annotator."""


@dataclass(frozen=True)
class StudySettings(Settings):
    """What ``study.toml`` holds.

    Attributes:
        name: shown at the head of the page.
        mode: ``pair``: the better of two, a tie, or both bad; ``rank``: all responses in order, ties allowed; ``rate``:
            each response on a scale from 1 to ``scale``.
        question: stands above the responses.
        instructions: markdown, beside each item.
        overlap: how many annotators answer each item.
        scale: the highest rating of mode ``rate``.
        flags: yes/no questions about each response: a name and its definition.
        reasons: ask for a reason per response.
        markdown: show prompts and responses as markdown; else as they are.
        read_first: answers open only after every response was scrolled through.
        hold_minutes: how long an item that was shown and not answered is kept for its annotator.
        seed: of the order in which responses are shown.
    """

    name: str
    mode: Mode = "pair"
    question: str = "Which response is better?"
    instructions: str = ""
    overlap: Count = 1
    scale: Annotated[int, Interval(ge=2, le=10)] = 7
    flags: dict[str, str] = field(default_factory=dict)
    reasons: bool = False
    markdown: bool = True
    read_first: bool = False
    hold_minutes: Positive = 60.0
    seed: Seed = 0


@dataclass(frozen=True)
class Response:
    """A text to be judged, and which policy wrote it: annotators see the first and never the second."""

    text: str
    source: str


@dataclass(frozen=True)
class Item:
    """A prompt with its responses.

    Attributes:
        prompt: a string or chat messages.
        responses: two in mode ``pair``, else two or more.
        known: the known ranks of a gold item, by which new annotators are checked, 0 the best; empty where not known.
        columns: the prompt's row, for rewards.
    """

    prompt: Text
    responses: tuple[Response, ...]
    known: tuple[int, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one annotator said about one item, responses in the order of :class:`Item`.

    Attributes:
        ranks: 0 the best, equal ranks are ties; of mode ``rate`` the order of the ratings; empty if skipped.
        ratings: of mode ``rate``, else empty.
        both_bad: of mode ``pair``: neither is acceptable; ``ranks`` is then a tie.
        flags: per response the names that were ticked.
        reasons: per response.
        notes: about the item.
        skipped: why there is no judgment, else empty.
        seconds: from the item's display to the answer.
    """

    ranks: tuple[int, ...] = ()
    ratings: tuple[int, ...] = ()
    both_bad: bool = False
    flags: tuple[tuple[str, ...], ...] = ()
    reasons: tuple[str, ...] = ()
    notes: str = ""
    skipped: str = ""
    seconds: float = 0.0


def read_settings(folder: Path) -> StudySettings:
    """The settings of a study's folder.

    Raises:
        ValueError: there are none, or they are broken; one line that names the file.
    """
    path = folder / SETTINGS
    try:
        return make(StudySettings, files.read_toml(path), str(path), "setting")
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no study: it has no {SETTINGS}; `lm-envs people new` makes one") from error


def write_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Write settings as TOML in one step: tables behind the rest, without those that are None."""
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    plain = {name: value for name, value in values.items() if name not in tables and value is not None}
    lines = []
    for title, found in {"": plain, **tables}.items():
        lines += [f"\n[{title}]"] if title else []
        # JSON's texts, numbers and lists are TOML's too.
        lines += [f"{_json(name) if title else name} = {_json(value)}" for name, value in found.items()]
    files.write_atomic(path, "\n".join(lines) + "\n")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def dense_ranks(values: Sequence[float]) -> tuple[int, ...]:
    """Ranks of values, the lowest 0, equal values equal, none left out: ``(5, 2, 2) -> (1, 0, 0)``."""
    places = {value: place for place, value in enumerate(sorted(set(values)))}
    return tuple(places[value] for value in values)


def read_answer(body: Any, settings: StudySettings, count: int) -> Answer:
    """Check what a page, a terminal or a simulated annotator sent about an item of ``count`` responses.

    Args:
        body: JSON with any of ``ranks``, ``ratings``, ``both_bad``, ``flags``, ``reasons``, ``notes``, ``skipped``,
            ``seconds``; per response in the order of the item.

    Raises:
        BadAnswer: something is missing, of another type, or out of range.
    """
    if not isinstance(body, dict):
        raise BadAnswer("an answer must be a JSON object")
    unknown = set(body) - set(Answer.__dataclass_fields__)
    if unknown:
        raise BadAnswer(f"an answer has no field {min(unknown)!r}")
    seconds = body.get("seconds", 0.0)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < LONGEST_S:
        raise BadAnswer("seconds must be a number that is not negative")
    notes, skipped = _text(body.get("notes", ""), "notes"), _text(body.get("skipped", ""), "skipped")
    flags, reasons = body.get("flags") or [[]] * count, body.get("reasons") or [""] * count
    _per_response(flags, count, "flags")
    _per_response(reasons, count, "reasons")
    for ticked in flags:
        if not isinstance(ticked, list) or not all(name in settings.flags for name in ticked if isinstance(name, str)):
            raise BadAnswer(f"flags are lists of {', '.join(settings.flags) or 'nothing: this study has no flags'}")
        if not all(isinstance(name, str) for name in ticked):
            raise BadAnswer("flags are names")
    common: dict[str, Any] = {
        "flags": tuple(tuple(dict.fromkeys(ticked)) for ticked in flags),
        "reasons": tuple(_text(reason, "a reason") for reason in reasons),
        "notes": notes,
        "seconds": float(seconds),
    }
    if skipped:
        return Answer(skipped=skipped, **common)
    both_bad = body.get("both_bad", False)
    if not isinstance(both_bad, bool) or (both_bad and settings.mode != "pair"):
        raise BadAnswer("both_bad is true or false, and of pairs only")
    if settings.mode == "rate":
        ratings = _whole(body.get("ratings"), count, "ratings", 1, settings.scale)
        return Answer(ranks=dense_ranks([-rating for rating in ratings]), ratings=ratings, **common)
    ranks = (0,) * count if both_bad else _whole(body.get("ranks"), count, "ranks", 0, count - 1)
    return Answer(ranks=dense_ranks(ranks), both_bad=both_bad, **common)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST:
        raise BadAnswer(f"{name} must be a text of at most {LONGEST} characters")
    # A lone surrogate is JSON, and no database takes it.
    return value.encode("utf-8", "replace").decode()


def _per_response(values: Any, count: int, name: str) -> None:
    if not isinstance(values, list) or len(values) != count:
        raise BadAnswer(f"{name} must be a list with one entry for each of the {count} responses")


def _whole(values: Any, count: int, name: str, low: int, high: int) -> tuple[int, ...]:
    _per_response(values, count, name)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadAnswer(f"{name} are whole numbers from {low} to {high}: every response needs one")
    return tuple(values)
