"""Examples of the user's data as token ids: prompt and completion for a policy, whole texts for a reward model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm_envs.data.conventions import BadRow, Example, Text
from lm_envs.data.dataset import Item, Rejected
from lm_envs.model.chat import render_messages, split_answer
from lm_envs.model.tokens import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64  # examples at a time


@dataclass(frozen=True)
class Encoded:
    """An example in token ids.

    Attributes:
        item: what it was made of.
        prompt: as the tokenizer wraps it, without an EOS at its end.
        completions: each ends in the tokenizer's EOS.
    """

    item: Item
    prompt: list[int]
    completions: list[list[int]]


def tokenise(
    items: Iterable[Item], tokenizer: PreTrainedTokenizerBase, rejected: Rejected, max_length: int | None = None
) -> Iterator[Encoded]:
    """Examples in token ids, in a stream and in order.

    A completion's ids are those that follow the prompt's when both are encoded as one text; where they do not begin
    with the prompt's ids (a merge over the border), the completion is encoded by itself, as a policy that was given the
    prompt's ids would have to write it. It ends at its first EOS, which it gets if it has none.

    Args:
        items: as :class:`Data` gives them.
        tokenizer: with an EOS; with a chat template where there are messages.
        rejected: gets what makes no tokens, is too long, or is refused by the chat template.
        max_length: tokens of prompt and completion together; longer ones are bad rows.

    Raises:
        ValueError: a bad row that is to raise, or messages without a chat template.
    """
    for batch in _batched(items):
        yield from _tokenise(batch, tokenizer, rejected, max_length)


def as_read(
    items: Iterable[Item],
    tokenizer: PreTrainedTokenizerBase,
    rejected: Rejected,
    append_eos: bool,
    max_length: int | None = None,
) -> Iterator[Encoded]:
    """Examples as a reward model reads them: each completion is the whole text, prompt and completion in one.

    Just as :class:`~lm_envs.reward.learned.LearnedReward` encodes text while a policy is trained. Messages are written
    out by
    the tokenizer's chat template, without its special tokens, which that reward model does not get to see either.

    Args:
        append_eos: as for :func:`~lm_envs.model.tokens.encode_text`.
    """
    for item in items:
        try:
            texts = [head + tail for head, tail in written(tokenizer, item.example)]
            if not isinstance(item.example.completions[0], str):
                ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            rows = [encode_text(tokenizer, text, True, append_eos=append_eos) for text in texts]
            _check_lengths(rows, max_length)
        except BadRow as error:
            rejected.add(item.where, str(error))
            continue
        yield Encoded(item, [], rows)


def written(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[tuple[str, str]]:
    """Prompt and completion as text, per completion.

    Raises:
        BadRow: the chat template refuses the conversation.
        ValueError: there is no chat template.
    """
    if isinstance(example.completions[0], str):
        return [(str(example.prompt), str(text)) for text in example.completions]
    if not getattr(tokenizer, "chat_template", None):
        render_messages(tokenizer, [], False)  # says so
    assert not isinstance(example.prompt, str)
    try:
        return [split_answer(tokenizer, example.prompt, text) for text in example.completions]  # type: ignore[arg-type]
    except ValueError as error:
        raise BadRow(str(error)) from error


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], *, keep_eos: bool = False
) -> list[list[int]]:
    """Prompts as token ids, with one BOS where there is one: text as the tokenizer wraps it but without an EOS at the
    end, messages as its chat template writes them.

    Args:
        keep_eos: an EOS that the tokenizer puts behind a text stays.

    Raises:
        ValueError: messages without a chat template, or that it refuses.
    """
    plain = [text for text in prompts if isinstance(text, str)]
    chats = [render_messages(tokenizer, text, True) for text in prompts if not isinstance(text, str)]
    rows = tokenizer(plain, verbose=False)["input_ids"] if plain else []
    encoded = iter(rows if keep_eos else [_without_end(row, tokenizer.eos_token_id) for row in rows])
    rendered = iter(tokenizer(chats, add_special_tokens=False, verbose=False)["input_ids"] if chats else [])
    found = (next(encoded if isinstance(text, str) else rendered) for text in prompts)
    return [_one_bos(list(row), tokenizer.bos_token_id) for row in found]


def _one_bos(ids: list[int], bos: int | None) -> list[int]:
    """A text may begin with the BOS that the tokenizer puts before it."""
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _without_end(ids: list[int], eos: int | None) -> list[int]:
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids


def _batched(items: Iterable[Item]) -> Iterator[tuple[Item, ...]]:
    """``itertools.batched``, which Python 3.11 lacks."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, _BATCH)):
        yield batch


def _tokenise(
    batch: Sequence[Item], tokenizer: PreTrainedTokenizerBase, rejected: Rejected, max_length: int | None
) -> Iterator[Encoded]:
    ready: list[tuple[Item, list[tuple[str, str]] | str]] = []
    for item in batch:
        try:
            ready.append((item, written(tokenizer, item.example)))
        except BadRow as error:
            ready.append((item, str(error)))
    texts: list[str] = []
    marks: list[bool] = []  # whether special tokens are still to be added: a chat template has written its own
    for item, pairs in ready:
        if isinstance(pairs, str):
            continue
        own = isinstance(item.example.completions[0], str)
        for head, tail in [(pairs[0][0], ""), *pairs]:
            texts.append(head + tail)
            marks.append(own)
    ids = iter(_encode(tokenizer, texts, marks))
    for item, pairs in ready:
        if isinstance(pairs, str):
            rejected.add(item.where, pairs)
            continue
        prompt = _without_end(next(ids), tokenizer.eos_token_id)
        whole = [next(ids) for _ in pairs]
        try:
            yield _encoded(item, prompt, whole, [tail for _, tail in pairs], tokenizer, max_length)
        except BadRow as error:
            rejected.add(item.where, str(error))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], marks: list[bool]) -> list[list[int]]:
    found: list[list[int]] = [[]] * len(texts)
    for mark in (True, False):
        chosen = [i for i, own in enumerate(marks) if own == mark]
        if chosen:
            rows = tokenizer([texts[i] for i in chosen], add_special_tokens=mark, verbose=False)["input_ids"]
            for i, row in zip(chosen, rows, strict=True):
                found[i] = list(row)
    return found


def _encoded(
    item: Item,
    prompt: list[int],
    whole: list[list[int]],
    tails: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> Encoded:
    eos = tokenizer.eos_token_id
    if not item.example.prompt and not prompt:
        prompt = whole[0][:1]  # a text as a whole: nothing predicts its first token
    if not prompt:
        raise BadRow("the prompt is empty: the tokenizer makes no tokens of it")
    completions = []
    for ids, tail in zip(whole, tails, strict=True):
        if ids[: len(prompt)] == prompt:
            rest = ids[len(prompt) :]
        else:
            rest = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
        if eos in rest:
            rest = rest[: rest.index(eos)]
        if not rest:
            raise BadRow("a completion is empty: the tokenizer makes no tokens of it")
        completions.append([*rest, eos])
    _check_lengths([prompt + ids for ids in completions], max_length)
    return Encoded(item, prompt, completions)


def _check_lengths(rows: Sequence[Sequence[int]], max_length: int | None) -> None:
    longest = max(map(len, rows))
    if max_length is not None and longest > max_length:
        raise BadRow(f"{longest:,} tokens with the completion, more than the {max_length:,} that fit")
    if not min(map(len, rows)):
        raise BadRow("the tokenizer makes no tokens of it")
