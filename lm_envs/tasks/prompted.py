"""Tasks for a pretrained policy: prompts of this package or the user's, and rewards that read their columns."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lm_envs.data.dataset import OnBad, Rejected, check_letters
from lm_envs.data.sources import format_of, read_rows
from lm_envs.data.splits import SPLIT_NAMES, divide
from lm_envs.files import cached, write_atomic
from lm_envs.model.loading import load_tokenizer
from lm_envs.settings import near, short
from lm_envs.tasks import custom
from lm_envs.tasks.base import TextTask

SHIPPED = Path(__file__).with_name("prompts")
"""The folder of prompts that were written for this project, a file for each task."""
Row = dict[str, Any]
"""``prompt``, a text or chat messages; ``split``; and columns for rewards."""


def read(path: str | Path, convert: Callable[[Mapping[str, Any]], Row], bad: OnBad = "raise") -> list[Row]:
    """Read rows of a source and divide them into splits, by their column ``split`` if they have one.

    Args:
        path: as for :func:`~lm_envs.data.sources.read_rows`.
        convert: makes ``prompt`` and the columns of a row; ValueError for a bad row.
        bad: "raise" stops at a bad row; "skip" leaves it out, with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a bad row, with file and line, or too few rows.
    """
    format_of(path)
    rejected = Rejected(path, bad)
    rows: list[Row] = []
    for where, row in read_rows(path):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            check_letters(row)
            split = row.get("split") or ""
            if split and split not in SPLIT_NAMES:
                raise ValueError(f"'split' must be one of {', '.join(SPLIT_NAMES)}, not {short(split)}")
            rows.append({**convert(row), "split": SPLIT_NAMES.get(split, "")})
        except ValueError as error:
            rejected.add(where, str(error))
    if rejected.count:
        warnings.warn(f"{path}: {custom.passed_over(rejected)}", stacklevel=2)
    return divided(rows, path)


def divided(rows: Sequence[Row], source: object) -> list[Row]:
    """Return the rows with a split each, see :func:`~lm_envs.data.splits.divide`; an empty split is to be chosen."""
    splits = divide([(_key(row), row["split"]) for row in rows], source)
    return [{**row, "split": splits[_key(row)]} for row in rows]


def text(row: Mapping[str, Any], name: str) -> str:
    """Return a column's text; ValueError if there is none."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} must be a text, not {short(value)}")
    return value


def texts(row: Mapping[str, Any], name: str) -> list[str]:
    """Return a column's list of texts; ValueError if there is none, or an empty one."""
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
        raise ValueError(f"{name!r} must be a list of texts, not {short(value)}")
    return value


def load(
    name: str,
    rows: Sequence[Row],
    policy: str,
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    description: str,
) -> TextTask:
    """Make the task of these rows, by :mod:`lm_envs.tasks.custom`.

    Prompts are chat messages for a policy with a chat template, and lines of text for one without.

    Args:
        rows: all splits.
        policy: a language model as ``custom`` takes it.
        defaults: fields of :class:`~lm_envs.tasks.custom.CustomConfig`.
        options: the user's, which replace them; a reward model replaces the reward.
    """
    if "prompts" in options:
        raise ValueError(f"{name} has prompts of its own: others are given as path")
    known = [field.name for field in fields(custom.CustomConfig)]
    for option in options:  # before a model is read
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}: {near(option, known)}")
    chat = bool(getattr(load_tokenizer(policy), "chat_template", None))
    written = [{**row, "prompt": _messages(row["prompt"]) if chat else _lines(row["prompt"])} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in written)
    folder = cached(name, {"rows": written}, lambda folder: write_atomic(folder / "prompts.jsonl", lines))
    given = {option: value for option, value in defaults.items() if option != "reward" or "reward_model" not in options}
    made = custom.load(**{**given, **options, "policy": policy, "prompts": str(folder / "prompts.jsonl")})
    return replace(made, name=name, description=description)


def _messages(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _lines(prompt: Any) -> str:
    said = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return "".join(line + "\n" for line in said)


def _key(row: Row) -> str:
    return row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"])
