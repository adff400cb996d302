"""Rewards as text, for command lines and suite files: ``bleu*0.5``, ``clip(model:DIR, -2, 2)``, ...

The grammar, where ``...`` repeats:

.. code-block:: text

    reward    = part + part ...                     the weighted sum, with spaces around the plus
    part      = source | part * weight | weight * part | (reward)
              | clip(reward, low, high) | standardise(reward) | standardise(reward, mean, std) | chat(reward)
    source    = model:PLACE                         a sequence classifier: a folder or a hub name
              | judge:URL#MODEL | judge:FILE.toml   a language model behind an OpenAI-compatible endpoint
              | FILE.py:NAME | MODULE:NAME          your function, or a class that makes one; its file is run
              | NAME                                an entry point of an installed package, group lm_envs.rewards
              | bleu | chrf | chrf++ | rouge1 | rouge2 | rougeL | rougeLsum
              | constraints                     short for a function of this package, see :data:`OWN`
    source may be followed by its settings, as in bleu[column=german, lowercase=true]

``standardise`` without numbers uses the moments of samples of the reference; ``chat`` passes messages to its reward.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType
from typing import Any

from lm_envs.plugins import TEXT, installed
from lm_envs.reward.metrics import METRICS
from lm_envs.settings import near

__all__ = ["Combined", "Source", "Spec", "is_spec", "parse_reward"]

OWN: Mapping[str, str] = MappingProxyType({"constraints": "lm_envs.reward.constraints:share"})
"""Short names of functions of this package."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_TIMES = re.compile(rf"(?P<part>.*\S)\s*\*\s*(?P<weight>{_NUMBER})", re.DOTALL)
_WEIGHTED = re.compile(rf"(?P<weight>{_NUMBER})\s*\*\s*(?P<part>.*)", re.DOTALL)
_CALL = re.compile(r"(?P<name>clip|standardise|chat)\s*\((?P<inside>.*)\)", re.DOTALL)
_SETTINGS = re.compile(r"(?P<place>.*?)\s*\[(?P<settings>[^\[\]]*=[^\[\]]*)\]", re.DOTALL)
# The number of numbers behind the reward.
_CALLS = {"clip": ((2,), "low, high"), "standardise": ((0, 2), "mean, std (or neither)"), "chat": ((0,), "nothing")}
_LONGEST = 10_000  # characters
_ALONE = "a + needs a reward on both sides, as in 'bleu + chrf'"
_EXPECTED = "expected model:DIR, judge:URL#MODEL, judge:FILE.toml, FILE.py:function, module:function or one of "


@dataclass(frozen=True)
class Source:
    """A single reward.

    Attributes:
        kind: ``"model"``, ``"judge"``, ``"function"`` or ``"metric"``.
        place: the folder, address, file or module of a function, or metric.
        name: of the function, or of the judge's model.
        settings: from the brackets.
    """

    kind: str
    place: str
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Combined:
    """A combination: ``clip``, ``standardise`` or ``chat`` of one reward with its numbers, or a ``sum`` of several with
    weights."""

    how: str
    parts: tuple[Source | Combined, ...]
    numbers: tuple[float, ...] = ()


Spec = Source | Combined


def is_spec(text: str) -> bool:
    """Whether a text is a reward, not the name of a model."""
    if not text or os.path.isdir(text):
        return False
    return bool(
        text.startswith(("model:", "judge:", "("))
        or _CALL.fullmatch(text)
        or "*" in text
        or " + " in text
        or re.search(r":[A-Za-z_]\w*(\[.*\])?$", text)
        or any(re.sub(r"\[.*", "", part).strip() in _names() for part in (text, *text.split("+")))
    )


def _names() -> list[str]:
    return [*METRICS, *OWN, *installed("reward")]


def parse_reward(texts: str | Sequence[str]) -> Spec:
    """Parse a reward's text, or the sum of several, without reading a model or running a file.

    ValueError if it does not follow the grammar or names a missing file or folder; the message names the part.
    """
    rows = [texts] if isinstance(texts, str) else list(texts)
    if not rows or not all(isinstance(row, str) for row in rows):
        raise ValueError(f"reward: expected a text or several, as in 'bleu*0.5', not {texts!r}")
    for row in rows:
        if len(row) > _LONGEST:
            raise ValueError(f"reward {row[:60]!r}...: expected at most {_LONGEST:,} characters")
    try:
        return _sum([part for row in rows for part in _terms(row)])
    except RecursionError:
        raise ValueError(f"reward {rows[0][:60]!r}...: too many brackets or weights inside each other") from None


def _terms(text: str) -> list[tuple[float, Spec]]:
    parts = [part.strip() for part in _split(text, " + ")]
    if len(parts) > 1 and not all(parts):
        raise ValueError(f"reward {text!r}: {_ALONE}")
    return [_term(part) for part in parts]


def _term(text: str) -> tuple[float, Spec]:
    text = text.strip()
    match = _TIMES.fullmatch(text) or _WEIGHTED.fullmatch(text)
    if match is None:
        return 1.0, _part(text)
    weight, part = _term(match["part"])
    weight *= float(match["weight"])
    if not isfinite(weight):
        raise ValueError(f"reward {text!r}: the weight must be finite")
    return weight, part


def _part(text: str) -> Spec:
    if text.startswith("(") and text.endswith(")") and len(_split(text, ")")) == 2:
        return _sum(_terms(text[1:-1]))
    call = _CALL.fullmatch(text)
    if call is None:
        return _source(text)
    name, (inside, *words) = call["name"], _split(call["inside"], ",")
    counts, wanted = _CALLS[name]
    if len(words) not in counts or not all(map(_is_number, words)):
        raise ValueError(f"reward {text!r}: behind its reward {name} takes {wanted}, as numbers")
    return Combined(name, (_sum(_terms(inside)),), tuple(map(float, words)))


def _sum(found: list[tuple[float, Spec]]) -> Spec:
    if len(found) == 1 and found[0][0] == 1.0:
        return found[0][1]
    return Combined("sum", tuple(part for _, part in found), tuple(weight for weight, _ in found))


def _is_number(text: str) -> bool:
    return re.fullmatch(_NUMBER, text.strip()) is not None


def _split(text: str, at: str) -> list[str]:
    """Split a text at a separator outside brackets."""
    depth, start, parts = 0, 0, []
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            raise ValueError(f"reward {text!r}: a bracket is closed that was not opened")
        if depth == 0 and text.startswith(at, i) and i >= start:
            parts.append(text[start:i])
            start = i + len(at)
    if depth:
        raise ValueError(f"reward {text!r}: a bracket is not closed")
    return [*parts, text[start:]]


def _source(text: str) -> Source:
    bracketed = _SETTINGS.fullmatch(text)
    place, settings = (bracketed["place"], _settings(bracketed["settings"], text)) if bracketed else (text, {})
    if place in METRICS:
        return Source("metric", place, settings=settings)
    if place.startswith("model:"):
        if not place[6:]:
            raise ValueError(f"reward {text!r}: name the model's folder, as in model:DIR")
        suspicious = ("*" in place or "+" in place) and not os.path.exists(os.path.expanduser(place[6:]))
        if suspicious and (why := _slip(text)):
            raise ValueError(f"reward {text!r}: {why}")
        return Source("model", place[6:], settings=settings)
    if place.startswith("judge:"):
        return _judge(place[6:], settings, text)
    if function := TEXT.fullmatch({**installed("reward"), **OWN}.get(place, place)):
        if function["place"].endswith(".py"):
            _must_exist(function["place"], text)
        return Source("function", function["place"], function["name"], settings)
    if why := _slip(text):
        raise ValueError(f"reward {text!r}: {why}")
    if place.endswith(".py"):
        raise ValueError(f"reward {text!r}: say which function of the file, as in {place + ':function'!r}")
    if place and os.path.isdir(place):
        raise ValueError(f"reward {text!r}: a model's folder is written {'model:' + place!r}")
    raise ValueError(f"reward {text!r}: {near(place, _names(), _EXPECTED + ', '.join(_names()))}")


def _slip(text: str) -> str | None:
    """Explain a sum or a product that could not be parsed."""
    terms = [term.strip().replace("\0", "+") for term in _split(text.replace("chrf++", "chrf\0\0"), "+")]
    if len(terms) > 1:
        if not all(terms):
            return _ALONE
        return f"the + of a sum needs spaces around it: {' + '.join(terms)!r}"
    words = [word.strip() for word in _split(text, "*")]
    if len(words) > 1:
        if not all(words):
            where = "behind" if not words[-1] else "before"
            return f"the * has nothing {where} it; write a weight as in 'bleu*0.5'"
        wrong = [word for word in words if not _is_number(word) and not is_spec(word)] or words[-1:]
        return f"{wrong[0]!r} is not a number; write a weight as in 'bleu*0.5'"
    before, minus, after = text.partition(" - ")
    if minus:
        added = f"{before.strip()} + {after.strip()}*-1"
        return f"rewards are only added; give a penalty a negative weight: {added!r}"
    call = re.match(r"(\w+)\s*\(", text)
    if call and call[1] not in _CALLS:
        return f"there is no {call[1]!r}: {near(call[1], _CALLS)}"
    return None


def _judge(place: str, settings: dict[str, Any], text: str) -> Source:
    if place.endswith(".toml"):
        if settings:
            raise ValueError(f"reward {text!r}: the settings of that judge belong in its file")
        _must_exist(place, text)
        return Source("judge", place)
    url, _, model = place.partition("#")
    if not url or not model:
        raise ValueError(f"reward {text!r}: a judge is judge:URL#MODEL or judge:FILE.toml")
    return Source("judge", url, model, settings)


def _must_exist(place: str, text: str) -> None:
    if not os.path.isfile(os.path.expanduser(place)):
        raise ValueError(f"reward {text!r}: there is no file {place!r}")


def _settings(inside: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in inside.split(","):
        name, equals, value = (word.strip() for word in item.partition("="))
        if not equals or not name.isidentifier():
            raise ValueError(f"reward {text!r}: settings are name=value, not {item.strip()!r}")
        if name in found:
            raise ValueError(f"reward {text!r} gives {name!r} twice")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found
