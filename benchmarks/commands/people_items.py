"""What people are asked to judge: responses sampled from policies, a finished comparison's, or texts of a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from lm_envs import rng
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.report.series import by_task, gather
from lm_envs.benchmarks.run.results import collect_results
from lm_envs.data.conventions import nested, text_of
from lm_envs.data.dataset import Examples, check_letters
from lm_envs.data.sources import read_rows
from lm_envs.feedback.exchange import Foreign
from lm_envs.feedback.study import Item, Response, dense_ranks
from lm_envs.model import loading
from lm_envs.model.chat import BadExample
from lm_envs.model.encoder_decoder import room_for
from lm_envs.model.text import Codec
from lm_envs.model.tokens import context_of
from lm_envs.settings import short

_AT_ONCE = 64
_READ = frozenset({"prompt", "completions", "sources", "ranks", "split"})  # columns that are not passed on to rewards


def sampled(
    policies: Sequence[str],
    prompts: str,
    count: int,
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    limit: int | None = None,
    first: int = 0,
) -> Iterator[Item]:
    """Items with ``count`` responses each, from the policies and temperatures in turn.

    Args:
        policies: folders of ``save_pretrained`` or hub names.
        prompts: a file, folder or hub name with prompts.
        temperatures: one for all policies or several, of which each policy takes each.
        limit: of prompts.
        first: the number of the first prompt; behind the last one comes the first of all.

    Raises:
        UserError: fewer responses than policies and temperatures.
    """
    writers = [(name, temperature) for temperature in temperatures for name in policies]
    if count < len(writers):
        raise UserError(
            f"{len(policies)} policies at {len(temperatures)} temperatures take at least --responses {len(writers)}"
        )
    rows = list(Examples(prompts, "prompts"))
    rows = [rows[(first + k) % len(rows)] for k in range(min(limit or len(rows), len(rows)))]
    texts: list[list[Response]] = [[] for _ in rows]
    for name, temperature in writers:
        source = name if len(temperatures) == 1 else f"{name} at temperature {temperature:g}"
        places = [place for place in range(count) if writers[place % len(writers)] == (name, temperature)]
        for row, found in zip(
            texts, _write(name, [each.prompt for each in rows], places, temperature, max_new_tokens, seed), strict=True
        ):
            row += [Response(text, source) for text in found]
    for example, responses in zip(rows, texts, strict=True):
        yield Item(example.prompt, tuple(responses), columns=dict(example.columns))


def _write(
    place: str, prompts: Sequence[Any], numbers: Sequence[int], temperature: float, max_new_tokens: int, seed: int
) -> list[list[str]]:
    """Per prompt one response of a policy for each of ``numbers``, which count an item's responses."""
    disable_progress_bar()
    tokenizer = loading.load_tokenizer(place)
    model = loading.load_policy(place)
    loading.check_fits(tokenizer, loading.vocabulary_of(model), "policy")
    codec = Codec(tokenizer, model)
    ids = [codec.encode(prompt, most=context_of(model))[0] for prompt in prompts]
    chat = any(not isinstance(prompt, str) for prompt in prompts)
    width = max(len(row) for row in ids)
    needed, context = room_for(model, width, max_new_tokens)
    if context is not None and needed > context:
        raise UserError(
            f"policy {place!r} reads {context} tokens: prompts of up to {width} and --max-new-tokens {max_new_tokens} "
            f"take {needed}; shorten either"
        )
    policy = LMPolicy(model, codec.ends(chat), width, max_new_tokens, temperature=temperature)
    wanted = [(row, number) for row in range(len(ids)) for number in numbers]
    found: list[list[str]] = [[] for _ in ids]
    for begin in range(0, len(wanted), _AT_ONCE):
        part = wanted[begin : begin + _AT_ONCE]
        padded = torch.full((len(part), width), -1)
        for k, (row, _) in enumerate(part):
            padded[k, width - len(ids[row]) :] = torch.tensor(ids[row])
        episodes = np.array([row * 1000 + number for row, number in part])[:, None]
        uniforms = rng.uniform(seed, rng.TOKEN, episodes, np.arange(max_new_tokens))
        with torch.no_grad():
            responses, _ = policy.respond(padded, torch.from_numpy(uniforms))
        _, texts = codec.decode(
            [ids[row] for row, _ in part], [[t for t in row if t >= 0] for row in responses.tolist()]
        )
        for (row, _), text in zip(part, texts, strict=True):
            found[row].append(text)
    return found


def compared(folder: Path, task: str | None, limit: int | None = None) -> Iterator[Item]:
    """Items of a finished comparison's test samples: a prompt with each method's response, of the first seed.

    Args:
        folder: of the comparison.
        task: one of its tasks; None if it has one.

    Raises:
        UserError: another number of tasks than one, or fewer than two methods with test samples.
    """
    tasks = by_task(gather(folder, collect_results(folder)))
    mine = tasks.get(task or next(iter(tasks)))
    if mine is None or (task is None and len(tasks) > 1):
        raise UserError(f"{folder} has runs of {', '.join(tasks)}: choose one by --task")
    samples = {s.label: found for s in mine if (found := s.test_samples())}
    if len(samples) < 2:
        raise UserError(f"{folder}: needs two or more finished runs with test samples; found {len(samples)}")
    for records in itertools.islice(zip(*samples.values(), strict=False), limit):
        if len({record["prompt"] for record in records}) != 1:
            raise UserError(f"{folder}: the runs have other test prompts; compare them in one suite")
        responses = [Response(record["response"], label) for label, record in zip(samples, records, strict=True)]
        yield Item(records[0]["prompt"], tuple(responses))


def of_file(path: Path, limit: int | None = None) -> Iterator[Item]:
    """Items of a file: rows of ``prompt``, ``completions``, and ``sources`` and ``ranks`` (of gold items) if given;
    other columns are for rewards.

    Raises:
        UserError: a row that is no item; it names file and line.
    """
    for where, row in itertools.islice(read_rows(path), limit):
        try:
            yield _item(row)
        except BadExample as error:
            raise UserError(f"{path}, {where}: {error}; a row needs prompt and completions") from error


def _item(row: dict[str, Any] | str) -> Item:
    if isinstance(row, str):
        raise BadExample(row)
    if missing := [name for name in ("prompt", "completions") if name not in row]:
        raise BadExample(f"there is no column {missing[0]!r}")
    check_letters(row)
    given = _list(row, "completions")
    said = [text if isinstance(text, str) else text_of({"completions": text}, "completions") for text in given]
    texts = [text if isinstance(text, str) else str(text[-1]["content"]) for text in said]
    sources = _list(row, "sources") or [f"completion {k + 1}" for k in range(len(texts))]
    ranks = _list(row, "ranks")
    if len(texts) < 2 or not len(sources) == len(ranks or texts) == len(texts):
        counts = f"{len(texts)} completions, {len(sources)} sources, {len(ranks)} ranks"
        raise BadExample(f"{counts}: there must be at least two, with a source and a rank for each or for none")
    if not all(isinstance(source, str) for source in sources) or not all(type(rank) is int for rank in ranks):
        raise BadExample("sources must be texts and ranks whole numbers")
    responses = tuple(map(Response, texts, sources))
    columns = {name: value for name, value in row.items() if name not in _READ}
    return Item(text_of(row, "prompt"), responses, known=dense_ranks(ranks), columns=columns)


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    found = nested(row, name) or []
    if not isinstance(found, list):
        raise BadExample(f"{name!r} must be a list, not {short(found)}")
    return found


def in_pairs(items: Iterable[Item], against: str | None = None) -> Iterator[Item]:
    """Items of several responses as items of two: each response with that of the source ``against``, or where an item
    has none such with the next one, and the last with the first."""
    for item in items:
        for places in _pairs(item, against):
            yield _of_two(item, places)


def judged_in_pairs(found: Iterable[Foreign]) -> Iterator[Foreign]:
    """Judgments of several responses as judgments of the items that :func:`in_pairs` makes."""
    for item, who, answer in found:
        for places in _pairs(item):
            ranks = dense_ranks([answer.ranks[place] for place in places])
            yield _of_two(item, places), who, replace(answer, ranks=ranks)


def _pairs(item: Item, against: str | None = None) -> list[tuple[int, int]]:
    sources = [response.source for response in item.responses]
    count = len(sources)
    if against in sources:
        return [(k, sources.index(against)) for k in range(count) if sources[k] != against]
    return [(k, (k + 1) % count) for k in range(count if count > 2 else 1)]


def _of_two(item: Item, places: tuple[int, int]) -> Item:
    known = tuple(item.known[place] for place in places) if item.known else ()
    return Item(item.prompt, tuple(item.responses[place] for place in places), known=known, columns=item.columns)
