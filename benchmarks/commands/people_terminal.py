"""A study in the terminal: the same items and answers as on the page, without flags and reasons."""

from __future__ import annotations

import time
from typing import Any

from lm_envs.feedback.store import Store, Task
from lm_envs.feedback.study import Answer, BadAnswer, read_answer
from lm_envs.printable import printable

_HELP = {
    "pair": "a or b (better), t (equally good), x (both bad)",
    "rank": "letters from best to worst, ties in brackets: b(ac)d",
    "rate": "a rating for each, in order: 5 2 7",
}


def ask_all(store: Store, name: str) -> None:
    """Ask until nothing is left, the annotator quits or the input ends; every answer is saved when given."""
    annotator = store.annotator(name)
    extra = "s REASON (skip), u (back), q (quit)"
    print(f"{printable(store.settings.question)}\n{_HELP[store.settings.mode]}; {extra}")
    task = store.next(annotator)
    while task is not None:
        shown_at = time.monotonic()
        _show(task, *store.progress(annotator))
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "q":
            return
        if line == "u":
            task = store.last(annotator, task.item) or task
            continue
        try:
            answer = _read(line, task, store, time.monotonic() - shown_at)
        except BadAnswer as error:
            print(f"{error}: {_HELP[store.settings.mode]}")
            continue
        store.answer(annotator, task.item, answer, task.version)
        task = store.next(annotator)
    print("All done; every answer is saved.")


def _show(task: Task, done: int, left: int) -> None:
    print(f"\n---- {done} answered, {left} left ----")
    prompt = task.content.prompt
    turns = [("", prompt)] if isinstance(prompt, str) else [(f"{turn['role']}: ", turn["content"]) for turn in prompt]
    for role, text in turns:
        print(printable(f"{role}{text}"))
    for place, number in enumerate(task.order):
        print(f"\n[{chr(97 + place)}] {printable(task.content.responses[number].text)}")


def _read(line: str, task: Task, store: Store, seconds: float) -> Answer:
    count = len(task.order)
    body: dict[str, Any] = {"seconds": seconds}
    if line == "s" or line.startswith("s "):
        body["skipped"] = line[2:].strip() or "no reason given"
    elif store.settings.mode == "pair":
        shown = {"a": [0, 1], "b": [1, 0], "t": [0, 0], "x": [0, 0]}.get(line.lower())
        if shown is None:
            raise BadAnswer(f"{line!r} is no answer")
        body |= {"ranks": _stored(shown, task)}
        body |= {"both_bad": True} if line.lower() == "x" else {}
    elif store.settings.mode == "rank":
        body["ranks"] = _stored(_ranks(line.lower(), count), task)
    else:
        numbers = line.split()
        if len(numbers) != count or not all(number.isascii() and number.isdigit() for number in numbers):
            raise BadAnswer(f"{line!r} is not {count} ratings")
        body["ratings"] = _stored([int(number) for number in numbers], task)
    return read_answer(body, store.settings, count)


def _ranks(line: str, count: int) -> list[int]:
    ranks: dict[str, int] = {}
    place, tied = 0, False
    for letter in line.replace(" ", ""):
        if letter == "(" and not tied:
            tied = True
        elif letter == ")" and tied:
            tied, place = False, place + 1
        elif "a" <= letter < chr(97 + count) and letter not in ranks:
            ranks[letter] = place
            place += not tied
        else:
            raise BadAnswer(f"{line!r} is no ranking of {count} responses")
    if len(ranks) != count or tied:
        raise BadAnswer(f"{line!r} is no ranking of {count} responses")
    values = [ranks[chr(97 + k)] for k in range(count)]
    return [sorted(set(values)).index(value) for value in values]


def _stored(shown: list[int], task: Task) -> list[int]:
    return [shown[task.order.index(place)] for place in range(len(shown))]
