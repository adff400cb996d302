"""The prompts of a task of one's own: read from any source, divided, and made token ids of; bad rows are refused with
their line, or passed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Examples, Rejected
from lm_envs.data.splits import SPLITS, divide
from lm_envs.model.chat import BadExample
from lm_envs.model.encoder_decoder import room_for
from lm_envs.model.text import Codec
from lm_envs.reward.base import RESERVED, leaves
from lm_envs.reward.metrics import TextMetric

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMED = 3  # bad rows in the warning about them


def read_prompts(source: str | Path, rejected: Rejected | None = None) -> list[Example]:
    """Read prompts, and their column ``split`` if they have one; divided as :func:`~lm_envs.data.splits.divide` says.

    Rows with the same prompt and the same columns count once.

    Args:
        source: a file, a folder or a name on the hub, in any convention that has prompts; see
            :class:`~lm_envs.data.dataset.Examples`.
        rejected: gets malformed rows and empty prompts; without it they raise.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a bad row that is to raise (the message names file and line), or a split without prompts.
    """
    rows: dict[tuple[str, str], Example] = {}  # equal prompts may stand beside different references
    found: list[tuple[str, str]] = []
    data = Examples(source, "prompts")
    data.rejected = rejected = rejected or data.rejected
    for prompt in data:
        found.append((prompt.key, prompt.split))
        rows.setdefault((prompt.key, repr(prompt.columns)), prompt)
    divided = divide(found, source, f"; {passed_over(rejected)}" if rejected.count else "")
    return [replace(row, split=divided[key]) for (key, _), row in rows.items()]


def check_references(reward: Any, prompts: Sequence[Example]) -> None:
    """Raise ValueError, with file and line, where a text metric would find no reference to compare with."""
    parts = [] if reward is None else list(leaves(reward))
    for metric in (part for part in parts if isinstance(part, TextMetric)):
        if not any(metric.column in prompt.columns for prompt in prompts):
            continue  # the metric itself says that there is no such column
        for prompt in prompts:
            given = prompt.columns.get(metric.column)
            texts = [given] if isinstance(given, str) else given
            if given is None and len(parts) > 1:
                continue  # the other parts are the reward there
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"{prompt.place}: {metric.column!r}, which {metric.__name__!r} compares with, must be a text or a "
                    f"list of texts, not {given!r}"
                )


def encode_prompts(
    prompts: Sequence[Example],
    codec: Codec,
    max_new_tokens: int,
    readers: Sequence[PreTrainedModel],
    rejected: Rejected,
) -> list[tuple[Example, list[int]]]:
    """Return prompts with their token ids, as :meth:`~lm_envs.model.text.Codec.encode` makes them.

    Args:
        codec: of the policy.
        max_new_tokens: for which there must be room.
        readers: the models that read the prompts.
        rejected: gets prompts that have no tokens, leave no room for the response in the model's context, or are
            refused by the chat template.

    Raises:
        ValueError: a bad prompt that is to raise, with file and line; messages without a chat template; or no prompt is
            left for a split.
    """
    found: list[tuple[Example, list[int]]] = []
    for prompt in prompts:
        try:
            ids, _ = codec.encode(prompt.prompt)
        except BadExample as error:
            rejected.add(prompt.where, str(error))
            continue
        except ValueError as error:
            raise ValueError(f"{prompt.place}: {error}") from error
        needed = [room_for(model, len(ids), max_new_tokens) for model in readers]
        context = min((has for wants, has in needed if has is not None and wants > has), default=None)
        if context is None:
            found.append((prompt, ids))
        else:
            rejected.add(
                prompt.where,
                f"the prompt has {len(ids)} tokens and responses up to {max_new_tokens}, together more than the "
                f"model's context of {context}: shorten it or lower max_new_tokens",
            )
    for name in SPLITS:
        if rejected.count and not any(prompt.split == name for prompt, _ in found):
            raise ValueError(f"{rejected.source}: no prompt is left for {name}; {passed_over(rejected)}")
    return found


def passed_over(rejected: Rejected) -> str:
    """How many rows were bad, and the first of them."""
    first = "; ".join(f"{bad.where}: {bad.reason}" for bad in rejected.rows[:_NAMED])
    rows = "1 bad row was" if rejected.count == 1 else f"{rejected.count:,} bad rows were"
    more = "; ..." if rejected.count > _NAMED else ""
    return f"{rows} passed over ({first}{more})"


def by_split(encoded: Sequence[tuple[Example, list[int]]]) -> dict[str, list[list[int]]]:
    """Token ids by split."""
    return {name: [ids for prompt, ids in encoded if prompt.split == name] for name in SPLITS}


def columns_of(encoded: Sequence[tuple[Example, list[int]]]) -> dict[str, dict[str, list[Any]]]:
    """The columns that the prompts' rows hold beside them, by split and name, in the order of :func:`by_split`; None
    where a row lacks one. Of chat prompts the column ``messages`` holds the messages.

    Raises:
        ValueError: a column is called as something else that rewards get; with file and line.
    """
    prompts = [prompt for prompt, _ in encoded]
    names = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    for name in RESERVED:
        if name in names:
            where = next(prompt.place for prompt in prompts if name in prompt.columns)
            raise ValueError(f"{where}: rewards get something else as {name!r}: rename that column")
    rows = [{name: prompt.columns.get(name) for name in names} for prompt in prompts]
    if any(not isinstance(prompt.prompt, str) for prompt in prompts):
        names.append("messages")
        for row, prompt in zip(rows, prompts, strict=True):
            text = prompt.prompt
            row["messages"] = [{"role": "user", "content": text}] if isinstance(text, str) else text
    if not names:
        return {}
    found: dict[str, dict[str, list[Any]]] = {split: {name: [] for name in names} for split in SPLITS}
    for row, prompt in zip(rows, prompts, strict=True):
        for name in names:
            found[prompt.split][name].append(row[name])
    return found
