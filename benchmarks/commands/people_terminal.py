"""A study in the terminal: the same items and answers as on the page."""

from __future__ import annotations

import re
import time
from typing import Any, Literal

from lm_envs.feedback.store import StaleAnswer, Store, Task
from lm_envs.feedback.study import Answer, BadAnswer, StudySettings, read_answer
from lm_envs.printable import printable

_HELP = {
    "pair": "a or b (better), t (equally good), x (both bad)",
    "rank": "letters from best to worst, ties in brackets: b(ac)d",
    "rate": "a rating for each, in order: 5 2 7",
}


def ask_all(store: Store, name: str) -> None:
    """Ask until nothing is left, the annotator quits or the input ends; every answer is saved when given."""
    annotator, settings = store.annotator(name), store.settings
    _introduce(settings)
    task = store.next(annotator)
    while task is not None:
        _show(task, *store.progress(annotator))
        said = _ask(task, settings)
        if said is None:
            return
        if said == "back":
            task = store.last(annotator, task.item) or task
            continue
        try:
            store.answer(annotator, task.item, said, task.version)
        except StaleAnswer:
            print("this item was answered in another window meanwhile: that answer stays, u goes back to it")
        task = store.next(annotator)
    print("All done; every answer is saved.")


def _introduce(settings: StudySettings) -> None:
    if settings.instructions:
        print(printable(settings.instructions), end="\n\n")
    print(f"{printable(settings.question)}\n{_HELP[settings.mode]}; s REASON (skip), u (back), q (quit)")
    before = ["flag a NAME, NAME"] if settings.flags else []
    before += ["reason a TEXT"] if settings.reasons else []
    print(f"before the answer, if you like: {', '.join([*before, 'note TEXT'])}")
    for name, definition in settings.flags.items():
        print(printable(f"flag {name}: {definition}"))


def _ask(task: Task, settings: StudySettings) -> Answer | Literal["back"] | None:
    """One annotator's answer to an item; "back", or None to quit."""
    begun, count = time.monotonic(), len(task.order)
    old = task.answer or Answer()
    flags = [list(names) for names in old.flags] or [[] for _ in task.order]
    body: dict[str, Any] = {"flags": flags, "reasons": list(old.reasons) or [""] * count, "notes": old.notes}
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        if line in ("q", "u"):
            return "back" if line == "u" else None
        try:
            word, _, rest = line.partition(" ")
            if word == "note":
                body["notes"] = rest
            elif word in ("flag", "reason"):
                letter, _, text = rest.strip().partition(" ")
                place = _place(letter, task)
                given: Any = [name.strip() for name in text.split(",") if name.strip()] if word == "flag" else text
                read_answer(
                    {**body, f"{word}s": _with(body[f"{word}s"], place, given), "skipped": "-"}, settings, count
                )
                body[f"{word}s"][place] = given
            else:
                said = _read(line, task, settings.mode)
                return read_answer({**body, **said, "seconds": time.monotonic() - begun}, settings, count)
        except BadAnswer as error:
            print(f"{error}: {_HELP[settings.mode]}")


def _place(letter: str, task: Task) -> int:
    shown = ord(letter.lower()) - 97 if len(letter) == 1 else -1
    if not 0 <= shown < len(task.order):
        raise BadAnswer(f"{letter!r} is no response")
    return task.order[shown]


def _with(values: list[Any], place: int, value: Any) -> list[Any]:
    return [*values[:place], value, *values[place + 1 :]]


def _show(task: Task, done: int, left: int) -> None:
    print(f"\n---- {done} answered, {left} left ----")
    prompt = task.content.prompt
    turns = [("", prompt)] if isinstance(prompt, str) else [(f"{turn['role']}: ", turn["content"]) for turn in prompt]
    for role, text in turns:
        print(printable(f"{role}{text}"))
    for place, number in enumerate(task.order):
        print(f"\n[{chr(97 + place)}] {printable(task.content.responses[number].text)}")


def _read(line: str, task: Task, mode: str) -> dict[str, Any]:
    """The fields of an answer that a line holds."""
    count = len(task.order)
    if line == "s" or line.startswith("s "):
        return {"skipped": line[2:].strip() or "no reason given"}
    if mode == "pair":
        shown = {"a": [0, 1], "b": [1, 0], "t": [0, 0], "x": [0, 0]}.get(line.lower())
        if shown is None:
            raise BadAnswer(f"{line!r} is no answer")
        return {"ranks": _stored(shown, task), "both_bad": line.lower() == "x"}
    if mode == "rank":
        return {"ranks": _stored(_ranks(line.lower(), count), task)}
    numbers = line.split()
    if len(numbers) != count or not all(re.fullmatch("[0-9]{1,3}", number) for number in numbers):
        raise BadAnswer(f"{line!r} is not {count} ratings")
    return {"ratings": _stored([int(number) for number in numbers], task)}


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
