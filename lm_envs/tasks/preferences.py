"""A learned reward from simulated preferences: pairs of the start's responses, annotators who choose between them, and
a linear probe of the start's hidden states that learns their choices (the simulation after Dubois et al. 2023,
AlpacaFarm).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from lm_envs import files
from lm_envs.feedback import annotators as simulated
from lm_envs.feedback.annotators import Annotator, votes
from lm_envs.feedback.study import Item, Response
from lm_envs.model import text
from lm_envs.model.encoder_decoder import is_encoder_decoder
from lm_envs.model.loading import weights_hash
from lm_envs.reward import likelihood, probe
from lm_envs.reward.likelihood import Likelihood
from lm_envs.reward.probe import LinearProbe, fit_probe
from lm_envs.reward.units import Samples, moments, standardised
from lm_envs.tasks import sampling
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.reviews import ranking_accuracy

_NAME = "preferences"
_CHUNK = 256  # responses that are read between two signs of progress
_HELD_OUT = 4  # pairs a validation prompt
_DEPTH = 2 / 3  # of the layers, after which the states are read


@dataclass(frozen=True)
class _Pairs:
    """N pairs of responses, 2N samples, and the pairs as items."""

    samples: Samples
    rows: list[int]
    """The number of each pair's prompt."""
    items: list[Item]


def with_learned_reward(task: TextTask, count: int, annotators: Sequence[Annotator]) -> TextTask:
    """Return the task with a reward that is learned from simulated choices, once; it is kept in the cache.

    All annotators compare two responses of the task's start to each of ``count`` training prompts, which take turns.
    The pairs and the choices of the majority, or of the first annotator where there is none, become ``pairs`` and
    ``preferred`` of the task; the reward learns from the share of the votes. It has mean 0 and standard deviation 1 on
    responses to the validation prompts.

    Args:
        task: with the columns that the annotators' score reads.
        annotators: of one score.

    Raises:
        ValueError: pairs of one prompt alone, or an encoder-decoder.
    """
    if is_encoder_decoder(task.reference):
        raise ValueError(f"{task.name}: pairs needs a decoder-only policy, whose hidden states the reward reads")
    if min(count, len(task.prompts["train"])) < 2:
        raise ValueError(f"{task.name}: a reward is learned from pairs of two training prompts at least")
    here = {"task": task.name, "prompts": task.prompts, "columns": task.columns, "pairs": count}
    options = {name: getattr(task, name) for name in ("max_new_tokens", "min_new_tokens", "temperature")}
    known = [field.name for field in fields(Annotator) if field.name != "score"]
    score = annotators[0].score
    modules = (simulated, text, sampling, probe, likelihood)
    key = {
        **files.jsonable({**here, **options}),
        "annotators": [{name: getattr(each, name) for name in known} for each in annotators],
        "score": f"{score.__module__}.{score.__qualname__}",
        "weights": weights_hash(task.start.named_parameters()),
        "tokenizer": text.Codec(task.tokenizer, task.start).fingerprint,
        "code": files.code_hash([__file__, *(str(module.__file__) for module in modules)]),
        "versions": {one.__name__: one.__version__ for one in (torch, transformers, np)},
    }

    def build(folder: Path) -> None:
        files.write_atomic(folder / "made.json", json.dumps(_build(task, count, annotators)))

    made = json.loads((files.cached("preferences", key, build) / "made.json").read_text())
    reader = Likelihood(task.reference, task.tokenizer)
    learned = LinearProbe(reader, np.array(made["weights"]), _layer(task), _NAME)
    reward = standardised(learned, *made["normalise"])
    pairs = [(row, first, second) for row, first, second in made["pairs"]]
    return replace(task, reward=reward, pairs=pairs, preferred=made["preferred"], stats={**task.stats, **made["stats"]})


def _build(task: TextTask, count: int, annotators: Sequence[Annotator]) -> dict[str, Any]:
    """Sample, let annotators vote and fit the probe; return everything, as JSON has it."""
    compared = _sampled(task, "train", count)
    held_out = _sampled(task, "validation", _HELD_OUT * len(task.prompts["validation"]))
    gold, held_out_gold = (np.array([annotators[0].score(item) for item in p.items]) for p in (compared, held_out))
    given = votes(annotators, compared.items)
    share = given.mean(axis=0)
    preferred = np.where(share == 0.5, given[0], share) > 0.5
    states = _hidden(task, compared)
    weights = fit_probe(states[:, 0] - states[:, 1], share, np.array(compared.rows))
    scores = _hidden(task, held_out) @ weights
    responses = compared.samples.completion_ids
    return {
        "pairs": [[row, *responses[2 * i : 2 * i + 2]] for i, row in enumerate(compared.rows)],
        "preferred": preferred.tolist(),
        "weights": weights.tolist(),
        "normalise": moments(scores.ravel(), _NAME),
        "stats": {
            "annotator_accuracy": ranking_accuracy(gold, preferred - 0.5),
            "rm_accuracy": ranking_accuracy(held_out_gold, scores[:, 0] - scores[:, 1]),
        },
    }


def _layer(task: TextTask) -> int:
    """The layer after which the probe reads."""
    return round(_DEPTH * task.reference.config.num_hidden_layers)


def _hidden(task: TextTask, pairs: _Pairs) -> NDArray[np.float64]:
    """What the probe reads of each pair's responses, ``(N, 2, d)``."""
    reader, found = Likelihood(task.reference, task.tokenizer), []
    texts, prompts = pairs.samples.completions, pairs.samples.prompts
    with sampling.progress_bar(f"{task.name}: reading pairs", len(texts)) as update:
        for start in range(0, len(texts), _CHUNK):
            some = slice(start, start + _CHUNK)
            found.append(reader.hidden(texts[some], prompts[some], _layer(task)))
            update(min(start + _CHUNK, len(texts)))
    return np.concatenate(found).reshape(len(pairs.items), 2, -1)


def _sampled(task: TextTask, split: str, count: int) -> _Pairs:
    samples = sampling.response_pairs(
        task.start, task, split, count, title=f"{task.name}: sampling pairs to compare, {split}"
    )
    items = []
    for i in range(0, 2 * count, 2):
        responses = tuple(Response(text, "start") for text in samples.completions[i : i + 2])
        row = {name: values[i] for name, values in samples.columns.items()}
        items.append(Item(samples.prompts[i], responses, columns=row))
    return _Pairs(samples, [i % len(task.prompts[split]) for i in range(count)], items)
