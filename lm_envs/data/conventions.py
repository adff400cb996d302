"""The column conventions of data for fine-tuning, and how each row is read.

Texts are strings, or lists of chat messages: ``{"role": ..., "content": ...}``.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lm_envs.model.chat import BadExample, Message, Text
from lm_envs.settings import short

Kind = Literal["prompts", "demonstrations", "judgments", "preferences", "labelled", "parallel"]
NEEDS: dict[Kind, int] = {"prompts": 0, "demonstrations": 1, "judgments": 2, "preferences": 3}
"""Kinds that a row's columns decide, the more demanding ones last: rows of a kind can be read as any before it."""

ASSISTANT = "\n\nAssistant:"  # begins the assistant's turns in the dialogues of Bai et al. 2022


@dataclass(frozen=True)
class Example:
    """The content of one row of data, compared without its place.

    Attributes:
        prompt: a string, or messages of which the last is not the assistant's; empty for a text as a whole.
        completions: none for a prompt alone; one for a demonstration; ranked ones for a preference; the translations
            of a parallel text. Strings if ``prompt`` is one; else lists of one message of the assistant's.
        ranks: one per completion of a preference, 0 the best; equal ranks are ties.
        label: 1 if the completion is wanted, 0 if it is not, -1 if the row has no label.
        where, source: ``"line 3"``, and the file, folder or hub name.
        split: the row's column ``split``, empty if there is none.
        columns: the row's other columns, for rewards.
    """

    prompt: Text
    completions: tuple[Text, ...] = ()
    ranks: tuple[int, ...] = ()
    label: int = -1
    where: str = field(default="", compare=False)
    split: str = field(default="", compare=False)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    source: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """The first completion."""
        return str(self.completions[0])

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.source}, {self.where}"

    @property
    def key(self) -> str:
        """The prompt as text, or the text as a whole."""
        found = self.prompt or self.completions[0]
        return found if isinstance(found, str) else json.dumps(found, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Convention:
    """A way to lay out rows, named after its columns; rows may have others.

    ``read`` reads a row and raises :class:`~lm_envs.model.chat.BadExample`.
    """

    name: str
    kind: Kind
    read: Callable[[Mapping[str, Any]], Example]

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.name.split("/"))


# ---- texts ----


def text_of(row: Mapping[str, Any], name: str) -> Text:
    """Return a column's text or chat messages; BadExample for other values, or if it is empty."""
    value = _as_messages(row.get(name), name)
    return _messages(value, name) if isinstance(value, list) else _string(value, name)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadExample(f"{name!r} must be a string, not {short(value)}")
    if not value.strip():
        raise BadExample("the prompt is empty" if name == "prompt" else f"{name!r} is empty")
    return value


def _messages(value: Any, name: str) -> list[Message]:
    """Check messages, which have a role and a content; other fields go to the chat template."""
    value = _as_messages(value, name)
    if not isinstance(value, list) or not value:
        raise BadExample(f"{name!r} must be a list of messages, not {short(value)}")
    found = []
    for number, message in enumerate(value):
        which = f"message {number} of {name!r}"
        if not isinstance(message, dict):
            raise BadExample(f"{which} must be {{'role': ..., 'content': ...}}, not {short(message)}")
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                raise BadExample(f"{which}: {part!r} must be a string, not {short(message.get(part))}")
        if not message["content"].strip() and message["role"] == "assistant":
            raise BadExample(f"{which} is empty")
        found.append({part: said for part, said in message.items() if said is not None})
    return found


def _as_messages(value: Any, name: str) -> Any:
    """Parse messages that were written out as text, see :func:`parsed`; return any other value as it is."""
    if isinstance(value, dict) and "role" in value and "content" in value:
        return [value]
    start = value[:100].lstrip(' \t\r\n"\\') if isinstance(value, str) else ""
    if start[:1] not in ("[", "{"):
        return value
    try:
        found = parsed(value)
    except ValueError:
        head = start[1:].lstrip(" \t\r\n[{\\")
        if head[:1] in "\"'" and head[1:].startswith(("role", "content")):
            raise BadExample(f"{name!r} begins like chat messages and is not JSON: {short(value)}") from None
        return value
    first = found[0] if isinstance(found, list) and found else found
    if not isinstance(first, dict) or not {"role", "content"} <= set(first):
        return value
    return found if isinstance(found, list) else [found]


def parsed(value: str) -> Any:
    """Parse a text as JSON, also encoded more than once, or as Python prints it; ValueError if it is neither."""
    found: Any = value
    try:
        while isinstance(found, str):
            found = json.loads(found)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError("neither JSON nor what Python prints") from None
    return found


def nested(row: Mapping[str, Any], name: str) -> Any:
    """Return a list or an object, which CSV files hold as text."""
    value = row.get(name)
    try:
        return parsed(value) if isinstance(value, str) else value
    except ValueError:
        raise BadExample(f"{name!r} must be JSON, not {short(value)}") from None


def _is_said(message: Message) -> bool:
    return message["role"] == "assistant"


def _aligned(prompt: Text, completions: Sequence[Text]) -> tuple[Text, tuple[Text, ...]]:
    """Make all texts strings or all messages, wrapping single strings. If completions hold whole conversations, the
    part that all share becomes the prompt."""
    if isinstance(prompt, str) and all(isinstance(text, str) for text in completions):
        return prompt, tuple(completions)
    said = [[{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in completions]
    if not _is_said(said[0][0]):
        prompt = _shared(said)
        said = [text[len(prompt) :] for text in said]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt or _is_said(prompt[-1]):
        raise BadExample("the conversation before the completion must end in a message that is not the assistant's")
    for text in said:
        if len(text) != 1 or not _is_said(text[0]):
            roles = ", ".join(str(message["role"]) for message in text)
            raise BadExample(f"a completion must be one message of the assistant's after a shared prompt, not {roles}")
    return prompt, tuple(said)


def _shared(conversations: Sequence[list[Message]]) -> list[Message]:
    """Return the messages that all conversations begin with, without any conversation's last one."""
    together = zip(*(messages[:-1] for messages in conversations), strict=False)
    same = itertools.takewhile(lambda messages: all(message == messages[0] for message in messages), together)
    return [messages[0] for messages in same]


# ---- conventions ----


def _prompt(row: Mapping[str, Any]) -> Example:
    prompt = text_of(row, "prompt")
    if isinstance(prompt, list) and _is_said(prompt[-1]):
        raise BadExample("the prompt ends in a message of the assistant's")
    return Example(prompt)


def _whole(row: Mapping[str, Any]) -> Example:
    return Example("", (_string(row["text"], "text"),))


def _chat(row: Mapping[str, Any]) -> Example:
    messages = _messages(row.get("messages"), "messages")
    if not _is_said(messages[-1]):
        return Example(messages)
    if len(messages) < 2 or _is_said(messages[-2]):
        raise BadExample("'messages' must have a message that is not the assistant's before its last")
    return Example(messages[:-1], (messages[-1:],))


def _demonstration(row: Mapping[str, Any]) -> Example:
    return Example(*_aligned(text_of(row, "prompt"), [text_of(row, "completion")]))


def _chosen(row: Mapping[str, Any]) -> Example:
    return Example(*_aligned(text_of(row, "prompt"), [text_of(row, "chosen"), text_of(row, "rejected")]), (0, 1))


def _dialogue(row: Mapping[str, Any]) -> Example:
    """Whole dialogues (Bai et al. 2022, the data of Anthropic's HH); the prompt is their shared beginning up to the
    assistant's last turn."""
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if isinstance(chosen, list) or isinstance(rejected, list):
        return Example(*_aligned("", [chosen, rejected]), (0, 1))
    end = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT)
    if end < 0:
        whole = f"whole dialogues that share a beginning up to {ASSISTANT!r}"
        raise BadExample(f"without a column 'prompt', 'chosen' and 'rejected' must be {whole}")
    end += len(ASSISTANT)
    pair = (_string(chosen[end:], "chosen"), _string(rejected[end:], "rejected"))
    if any(ASSISTANT in text for text in pair):
        raise BadExample(
            f"'chosen' and 'rejected' differ before their last {ASSISTANT!r}: they answer different prompts"
        )
    return Example(chosen[:end], pair, (0, 1))


def compared_summaries(row: Mapping[str, Any]) -> Example:
    """Comparisons of summaries (Stiennon et al. 2020; the prompt is laid out as in its appendix)."""
    info, summaries, choice = nested(row, "info"), nested(row, "summaries"), nested(row, "choice")
    if not isinstance(info, dict):
        raise BadExample(f"'info' must be an object with 'post', not {short(info)}")
    if not isinstance(summaries, list) or len(summaries) < 2 or not all(isinstance(one, dict) for one in summaries):
        raise BadExample(f"'summaries' must be a list of at least two objects with 'text', not {short(summaries)}")
    if type(choice) is not int or not 0 <= choice < len(summaries):
        raise BadExample(f"'choice' must be the number of a summary, 0 to {len(summaries) - 1}, not {short(choice)}")
    post = _string(info.get("post") or info.get("article"), "info.post")
    parts = [f"POST: {post}", "TL;DR:"]
    for name, title in (("title", "TITLE: "), ("subreddit", "SUBREDDIT: r/")):
        if info.get(name):
            parts.insert(0, title + _string(info[name], f"info.{name}"))
    texts = tuple(_string(one.get("text"), f"summaries[{i}].text") for i, one in enumerate(summaries))
    return Example("\n\n".join(parts), texts, tuple(int(i != choice) for i in range(len(texts))))


def _ranked(row: Mapping[str, Any]) -> Example:
    found, ranks = nested(row, "completions"), nested(row, "ranks")
    if not isinstance(found, list) or len(found) < 2:
        raise BadExample(f"'completions' must be a list of at least two texts, not {short(found)}")
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks) or len(ranks) != len(found):
        raise BadExample(f"'ranks' must be {len(found)} whole numbers, the best the lowest, not {short(ranks)}")
    texts = [text_of({"completions": text}, "completions") for text in found]
    order = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    prompt, completions = _aligned(text_of(row, "prompt"), texts)
    return Example(prompt, completions, tuple(order[rank] for rank in ranks))


def _judged(row: Mapping[str, Any]) -> Example:
    """Completions with a thumb up or down (Ethayarajh et al. 2024, KTO)."""
    return replace(_demonstration(row), label=_label(row))


def _labelled(row: Mapping[str, Any]) -> Example:
    return replace(_whole(row), label=_label(row))


def _parallel(row: Mapping[str, Any]) -> Example:
    given = row.get("reference")
    several = given if isinstance(given, list) and given else [given]
    return Example(_string(row.get("prompt"), "prompt"), tuple(_string(text, "reference") for text in several))


def _label(row: Mapping[str, Any]) -> int:
    found = _truth(row.get("label"))
    if found is None:
        raise BadExample(f"'label' must be 0 or 1, or false or true, not {short(row.get('label'))}")
    return found


def _truth(value: Any) -> int | None:
    """Return 0 or 1, None for other values; CSV files hold text."""
    if isinstance(value, str):
        return {"0": 0, "false": 0, "1": 1, "true": 1}.get(value.strip().lower())
    return int(value) if type(value) in (bool, int) and value in (0, 1) else None


CONVENTIONS = (
    Convention("prompt/completions/ranks", "preferences", _ranked),
    Convention("info/summaries/choice", "preferences", compared_summaries),
    Convention("prompt/chosen/rejected", "preferences", _chosen),
    Convention("chosen/rejected", "preferences", _dialogue),
    Convention("prompt/completion/label", "judgments", _judged),
    Convention("prompt/completion", "demonstrations", _demonstration),
    Convention("messages", "demonstrations", _chat),
    Convention("prompt", "prompts", _prompt),
    Convention("text", "demonstrations", _whole),
)
"""Conventions with more columns are tried first."""
ASKED_FOR: dict[Kind, Convention] = {
    "labelled": Convention("text/label", "labelled", _labelled),
    "parallel": Convention("prompt/reference", "parallel", _parallel),
}
"""Conventions that must be asked for, because their rows may also be in another one."""


def recognise(row: Mapping[str, Any]) -> Convention | None:
    """Return the convention of a row, by the names of its columns, or None."""
    for convention in CONVENTIONS:
        if all(name in row for name in convention.columns):
            if convention.read is _judged and _truth(row["label"]) is None:
                continue  # a label of another sort
            if convention.read is _chat:
                with suppress(BadExample):
                    return convention if _chat(row).completions else replace(convention, kind="prompts")
            return convention
    return None


def as_kind(example: Example, kind: Kind) -> Example:
    """Reduce an example to a kind that needs less: any has a prompt, and a preference has a best completion, which is
    wanted where the others are not.

    BadExample if it has less than the kind needs, or is a preference that prefers nothing.
    """
    if kind == "prompts":
        if not example.prompt:
            raise BadExample("a text as a whole has no prompt")
        return Example(example.prompt)
    if not example.completions:
        raise BadExample("there is a prompt and no completion")
    if not example.ranks:
        return example
    if kind == "demonstrations":
        return Example(example.prompt, (example.completions[example.ranks.index(min(example.ranks))],))
    if len(set(example.ranks)) == 1:
        raise BadExample("all ranks are equal, so nothing is preferred")
    if len(example.completions) == 2 and example.completions[0] == example.completions[1]:
        raise BadExample("the preferred completion and the other are the same text")
    return example
