"""Questions with one right answer: word problems, the generators of reasoning-gym, and files in GSM8K's columns.

``reasoning`` takes 320 word problems that were written for this project; ``reasoning:chain_sum?max_terms=3`` questions
of a generator of the package reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760) with its settings, scored by its
verifier. The reward is 1 for a right final answer; results have pass@k.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lm_envs.reward.base import said
from lm_envs.settings import near
from lm_envs.tasks import prompted
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.custom import CustomConfig

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
# How a final answer may be marked; the last of the first kind that occurs counts.
_MARKED = tuple(
    re.compile(pattern, re.DOTALL | re.IGNORECASE)
    for pattern in (
        r"<answer>(.*?)</answer>",
        r"####\s*([^\n]+)",
        r"\\boxed\{([^{}]*)\}",
        r"\banswer(?:\s+is)?\s*:\s*([^\n]+)",
        r"\banswer\s+is\s+([^\n]+)",
    )
)
_ASK = 'Work it out step by step. End with a line "Answer: " and the answer alone.'


def load(
    dataset: str | None = None,
    path: str | None = None,
    policy: str = "smollm2",
    size: int = 640,
    attempts: int = 8,
    **options: Any,
) -> TextTask:
    """Make the task for a pretrained policy.

    Args:
        dataset: a generator of reasoning-gym, such as chain_sum.
        path: rows with ``question`` and ``answer``, which ends in ``#### 12`` (GSM8K; Cobbe et al. 2021), and
            optionally ``split``. Without either, the word problems that were written for this project.
        policy: a language model, as :mod:`lm_envs.tasks.custom` takes it.
        size: questions drawn from the generator; of the different ones 70 % are for training and 20 % for tests.
        attempts: responses to each test prompt, for pass@k; 0 for none.
        options: settings of the generator; other fields of :class:`lm_envs.tasks.custom.CustomConfig`. Its ``seed`` is
            the generator's too.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: no such generator or setting of it, or a bad row.
    """
    if dataset and path:
        raise ValueError("reasoning: give a dataset of reasoning-gym or a path, not both")
    known = {field.name for field in fields(CustomConfig)}
    settings = {name: value for name, value in options.items() if name not in known}
    if settings and not dataset:
        hint = near(next(iter(settings)), known)
        raise ValueError(f"reasoning has no option {next(iter(settings))!r} without a dataset of reasoning-gym: {hint}")
    if dataset:
        rows, source = generated(dataset, {"size": size, "seed": options.get("seed", 0), **settings}), dataset
    else:
        rows, source = (
            prompted.read(path or prompted.SHIPPED / "reasoning.jsonl", _row, options.get("bad", "raise")),
            Path(path or "word problems").name,
        )
    score = "lm_envs.tasks.reasoning"
    defaults = {"reward": f"{score}:verified", "judge": f"{score}:solved", "max_new_tokens": 128, "temperature": 0.7}
    rest = {name: value for name, value in options.items() if name in known}
    task = prompted.load("reasoning", rows, policy, defaults, rest, f"{policy} answers questions ({source})")
    return replace(task, attempts=attempts)


def generated(dataset: str, settings: Mapping[str, Any]) -> list[prompted.Row]:
    """Return the different questions of a generator as rows; ``verify`` says how their answers are checked.

    A question that comes again is left out, so the shares of the splits hold for a generator with few of them.
    """
    source = _generator(dataset, json.dumps(settings, sort_keys=True))
    rows: dict[str, prompted.Row] = {}
    for i in range(len(source)):
        entry, place = source[i], len(rows) % 10
        prompt = f"{entry['question'].strip()}\n{_ASK}"
        verify = {"dataset": dataset, "settings": json.dumps(settings, sort_keys=True), "index": i}
        split = "validation" if place == 5 else "test" if place in (2, 8) else "train"
        rows.setdefault(prompt, {"prompt": prompt, "answer": str(entry["answer"]), "verify": verify, "split": split})
    return prompted.divided(list(rows.values()), f"reasoning-gym {dataset}")


def verified(
    completions: Sequence[Any],
    answer: Sequence[str],
    verify: Sequence[Mapping[str, Any] | None] | None = None,
    **columns: Any,
) -> list[float]:
    """Score final answers in [0, 1]: by the generator's verifier if ``verify`` names it, which may give part of the
    points, else 1 for the right number or text."""
    how = [None] * len(completions) if verify is None else verify
    return [_score(said(text), right, by) for text, right, by in zip(completions, answer, how, strict=True)]


def solved(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 for an answer that :func:`verified` scores 1, else 0."""
    return [float(score >= 1) for score in verified(completions, answer, **columns)]


def answer_of(text: str) -> str:
    """Extract the final answer: the last that is marked (``<answer>``, ``####``, ``\\boxed``, "answer is"), else the
    last number, else the last line."""
    for pattern in _MARKED:
        if found := pattern.findall(text):
            return found[-1].strip().rstrip(".").strip("*$` ")
    if numbers := re.findall(_NUMBER, text):
        return numbers[-1]
    return (text.strip().splitlines() or [""])[-1].strip()


def _score(text: str, right: str, verify: Mapping[str, Any] | None) -> float:
    given = answer_of(text)
    if verify is not None:
        source = _generator(verify["dataset"], verify["settings"])
        return float(source.score_answer(given, source[verify["index"]]))
    return float(_plain(given) == _plain(right))


def _plain(answer: str) -> float | str:
    """A number, with its unit and separators left out, or a text in lower case."""
    found = re.fullmatch(rf"[^\w-]*({_NUMBER})[^\d]*", answer.strip())
    return float(re.sub(r"[$,]", "", found[1])) if found else " ".join(answer.lower().split()).rstrip(".")


@functools.lru_cache(maxsize=8)
def _generator(dataset: str, settings: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        cure = "pip install 'lm-envs[reasoning]'"
        raise ImportError(f"questions by generators need reasoning-gym: {cure} ({error})") from None
    if dataset not in DATASETS:
        raise ValueError(f"reasoning-gym has no dataset {dataset!r}: {near(dataset, DATASETS)}")
    try:
        return reasoning_gym.create_dataset(dataset, **json.loads(settings))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning:{dataset}: its settings: {error}") from error


def _row(row: Mapping[str, Any]) -> prompted.Row:
    question, worked = prompted.text(row, "question"), prompted.text(row, "answer")
    if "####" not in worked:
        raise ValueError("'answer' must end in '####' and the final answer")
    answer = worked.rpartition("####")[2].strip()
    return {"prompt": f"{question}\n{_ASK}", "answer": answer, "verify": None}
