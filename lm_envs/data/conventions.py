"""The column conventions that data for fine-tuning comes in, and what each row of them says.

A convention is known by its columns. Texts are strings, or lists of chat messages: ``{"role": ..., "content": ...}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lm_envs.data.jsonl import short

Kind = Literal["prompts", "demonstrations", "preferences"]
Message = dict[str, Any]
Text = str | list[Message]

ASSISTANT = "\n\nAssistant:"  # what begins the assistant's turns in the dialogues of Bai et al. 2022
_NESTED = ("messages", "completions", "ranks", "summaries", "info")  # columns that a CSV file holds as JSON


class BadRow(ValueError):
    """What is wrong with a row."""


@dataclass(frozen=True)
class Example:
    """What a row says.

    Attributes:
        prompt: a string, or messages of which the last is not the assistant's; empty for a text as a whole.
        completions: none of a prompt alone; one of a demonstration; the ranked ones of a preference. Strings if
            ``prompt`` is one; else lists of one message of the assistant's.
        ranks: one per completion of a preference, 0 the best; equal ranks are ties.
    """

    prompt: Text
    completions: tuple[Text, ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """What tells prompts apart; of a text as a whole, the text."""
        found = self.prompt or self.completions[0]
        return found if isinstance(found, str) else json.dumps(found, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Convention:
    """A way to lay out rows.

    Attributes:
        name: as messages call it.
        kind: what its rows are.
        columns: by which it is known; there may be others.
        read: the row's meaning; raises :class:`BadRow`.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Example]


# ---- texts ----


def _text(row: Mapping[str, Any], name: str) -> Text:
    value = row.get(name)
    if isinstance(value, list):
        return _messages(value, name)
    return _string(value, name, missing=name not in row)


def _string(value: Any, name: str, missing: bool = False) -> str:
    if not isinstance(value, str):
        found = "and there is none" if missing else f"not {short(value)}"
        raise BadRow(f"{name!r} must be a string, {found}")
    if not value.strip():
        raise BadRow("the prompt is empty" if name == "prompt" else f"{name!r} is empty")
    return value


def _messages(value: Any, name: str) -> list[Message]:
    """Messages with a role and a content; further fields that are set go along to the chat template."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name!r} must be a list of messages, not {short(value)}")
    found = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow(f"message {number} of {name!r} must be {{'role': ..., 'content': ...}}, not {short(message)}")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise BadRow(
                    f"message {number} of {name!r}: {field!r} must be a string, not {short(message.get(field))}"
                )
        if not message["content"].strip() and message["role"] == "assistant":
            raise BadRow(f"message {number} of {name!r} is empty")
        found.append({field: said for field, said in message.items() if said is not None})
    return found


def _is_said(message: Message) -> bool:
    return message["role"] == "assistant"


def _aligned(prompt: Text, completions: Sequence[Text]) -> tuple[Text, tuple[Text, ...]]:
    """All strings, or all messages: a lone string becomes the message it stands for. A completion that holds the whole
    conversation loses what all have in common, which then is the prompt.
    """
    if isinstance(prompt, str) and all(isinstance(text, str) for text in completions):
        return prompt, tuple(completions)
    said = [[{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in completions]
    if not _is_said(said[0][0]):
        prompt = _shared(said)
        said = [text[len(prompt) :] for text in said]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt or _is_said(prompt[-1]):
        raise BadRow("the conversation before the completion must end in a message that is not the assistant's")
    for text in said:
        if len(text) != 1 or not _is_said(text[0]):
            roles = ", ".join(str(message["role"]) for message in text)
            raise BadRow(f"a completion must be one message of the assistant's after a shared prompt, not {roles}")
    return prompt, tuple(said)


def _shared(conversations: Sequence[list[Message]]) -> list[Message]:
    """The messages that all begin with, the last of none among them."""
    count = 0
    for together in zip(*(messages[:-1] for messages in conversations), strict=False):
        if any(message != together[0] for message in together):
            break
        count += 1
    return conversations[0][:count]


# ---- conventions ----


def _prompt(row: Mapping[str, Any]) -> Example:
    prompt = _text(row, "prompt")
    if isinstance(prompt, list) and _is_said(prompt[-1]):
        raise BadRow("the prompt ends in a message of the assistant's")
    return Example(prompt)


def _whole(row: Mapping[str, Any]) -> Example:
    return Example("", (_string(row.get("text"), "text", missing="text" not in row),))


def _chat(row: Mapping[str, Any]) -> Example:
    messages = _messages(row.get("messages"), "messages")
    if not _is_said(messages[-1]):
        return Example(messages)
    if len(messages) < 2 or _is_said(messages[-2]):
        raise BadRow("'messages' must have a message that is not the assistant's before its last")
    return Example(messages[:-1], (messages[-1:],))


def _demonstration(row: Mapping[str, Any]) -> Example:
    return Example(*_aligned(_text(row, "prompt"), [_text(row, "completion")]))


def _chosen(row: Mapping[str, Any]) -> Example:
    prompt, pair = _aligned(_text(row, "prompt"), [_text(row, "chosen"), _text(row, "rejected")])
    return Example(prompt, pair, (0, 1))


def _dialogue(row: Mapping[str, Any]) -> Example:
    """Whole dialogues (Bai et al. 2022, the data of Anthropic's HH): what they share up to the assistant's last turn is
    the prompt.
    """
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if isinstance(chosen, list) or isinstance(rejected, list):
        prompt, pair = _aligned("", [chosen, rejected])
        return Example(prompt, pair, (0, 1))
    end = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT)
    if end < 0:
        raise BadRow(
            f"without a column 'prompt', 'chosen' and 'rejected' must be whole dialogues that share a beginning up to "
            f"{ASSISTANT!r}"
        )
    end += len(ASSISTANT)
    pair = (_string(chosen[end:], "chosen"), _string(rejected[end:], "rejected"))
    if any(ASSISTANT in text for text in pair):
        raise BadRow(f"'chosen' and 'rejected' part before their last {ASSISTANT!r}, so they do not answer one prompt")
    return Example(chosen[:end], pair, (0, 1))


def _summaries(row: Mapping[str, Any]) -> Example:
    """Comparisons of summaries (Stiennon et al. 2020; the prompt is laid out as in its appendix)."""
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if not isinstance(info, dict):
        raise BadRow(f"'info' must be an object with 'post', not {short(info)}")
    if not isinstance(summaries, list) or len(summaries) < 2 or not all(isinstance(one, dict) for one in summaries):
        raise BadRow(f"'summaries' must be a list of at least two objects with 'text', not {short(summaries)}")
    if type(choice) is not int or not 0 <= choice < len(summaries):
        raise BadRow(f"'choice' must be the number of a summary, 0 to {len(summaries) - 1}, not {short(choice)}")
    post = _string(info.get("post") or info.get("article"), "info.post")
    parts = [f"POST: {post}", "TL;DR:"]
    for name, title in (("title", "TITLE: "), ("subreddit", "SUBREDDIT: r/")):
        if info.get(name):
            parts.insert(0, title + _string(info[name], f"info.{name}"))
    texts = tuple(_string(one.get("text"), f"summaries[{i}].text") for i, one in enumerate(summaries))
    return Example("\n\n".join(parts), texts, tuple(int(i != choice) for i in range(len(texts))))


def _ranked(row: Mapping[str, Any]) -> Example:
    found, ranks = row.get("completions"), row.get("ranks")
    if not isinstance(found, list) or len(found) < 2:
        raise BadRow(f"'completions' must be a list of at least two texts, not {short(found)}")
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks) or len(ranks) != len(found):
        raise BadRow(f"'ranks' must be {len(found)} whole numbers, the best the lowest, not {short(ranks)}")
    texts = [_text({"completions": text}, "completions") for text in found]
    order = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    prompt, completions = _aligned(_text(row, "prompt"), texts)
    return Example(prompt, completions, tuple(order[rank] for rank in ranks))


CONVENTIONS = (
    Convention("prompt/completions/ranks", "preferences", ("prompt", "completions", "ranks"), _ranked),
    Convention("info/summaries/choice", "preferences", ("info", "summaries", "choice"), _summaries),
    Convention("prompt/chosen/rejected", "preferences", ("prompt", "chosen", "rejected"), _chosen),
    Convention("chosen/rejected", "preferences", ("chosen", "rejected"), _dialogue),
    Convention("prompt/completion", "demonstrations", ("prompt", "completion"), _demonstration),
    Convention("messages", "demonstrations", ("messages",), _chat),
    Convention("prompt", "prompts", ("prompt",), _prompt),
    Convention("text", "demonstrations", ("text",), _whole),
)
"""The more columns a convention asks for, the earlier it is tried."""


def recognise(row: Mapping[str, Any]) -> Convention | None:
    """The convention of a row, by the names of its columns; None for none of them."""
    for convention in CONVENTIONS:
        if all(name in row for name in convention.columns):
            if convention.name == "messages" and _ends_in_a_question(row["messages"]):
                return replace(convention, kind="prompts")
            return convention
    return None


def _ends_in_a_question(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") != "assistant"


def as_kind(example: Example, kind: Kind) -> Example:
    """An example as prompts, demonstrations or preferences: the prompt of any, and the best completion of a preference,
    will do for less.

    Raises:
        BadRow: it holds less than that, or a preference that prefers nothing.
    """
    if kind == "prompts":
        if not example.prompt:
            raise BadRow("a text as a whole has no prompt")
        return Example(example.prompt)
    if not example.completions:
        raise BadRow("there is a prompt and no completion")
    if kind == "preferences":
        _check_preference(example)
    elif example.ranks:
        return Example(example.prompt, (example.completions[example.ranks.index(min(example.ranks))],))
    return example


def _check_preference(example: Example) -> None:
    if len(example.completions) < 2:
        raise BadRow("a preference needs at least two completions")
    if len(set(example.ranks)) == 1:
        raise BadRow("all ranks are equal, so nothing is preferred")
    if len(example.completions) == 2 and example.completions[0] == example.completions[1]:
        raise BadRow("the preferred completion and the other are the same text")


def decode_cells(row: Mapping[str, str]) -> dict[str, Any]:
    """A row of a CSV file, whose cells are strings: lists and objects are JSON there.

    Raises:
        BadRow: a cell that must be JSON is none.
    """
    found: dict[str, Any] = dict(row)
    for name, cell in row.items():
        if name in _NESTED or cell.startswith('[{"'):
            try:
                found[name] = json.loads(cell)
            except (ValueError, RecursionError):
                raise BadRow(f"{name!r} must be JSON in a CSV file, not {short(cell)}") from None
    choice = found.get("choice")
    if isinstance(choice, str) and choice.strip().isdecimal():
        found["choice"] = int(choice)
    return found
