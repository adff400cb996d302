"""A reward model from simulated preferences: pairs of the start's responses, annotators who choose between them, and a
copy of the policy that learns their choices (Ouyang et al. 2022; the simulation after Dubois et al. 2023, AlpacaFarm).
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
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from lm_envs import files, training
from lm_envs.feedback import annotators as simulated
from lm_envs.feedback.annotators import Annotator, votes
from lm_envs.feedback.study import Item, Response
from lm_envs.model import text
from lm_envs.model.layers import recomputable
from lm_envs.model.loading import weights_hash
from lm_envs.reward import learned
from lm_envs.reward.learned import LearnedReward, reward_start
from lm_envs.reward.units import Samples, in_units_of
from lm_envs.tasks import sampling
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.reviews import ranking_accuracy

_BATCH, _PASSES = 8, 2  # pairs a step, and passes over them
_HELD_OUT = 2  # pairs a validation prompt
_LAYERS, _RATE = 8, 5e-5  # the upper layers that are trained: a third of the time, and a file of a tenth the size
_WEIGHTS = "reward_model.safetensors"


@dataclass(frozen=True)
class _Pairs:
    """N pairs of responses, 2N samples, and the pairs as items."""

    samples: Samples
    rows: list[int]
    """The number of each pair's prompt."""
    items: list[Item]


def with_learned_reward(task: TextTask, policy: str, count: int, annotators: Sequence[Annotator]) -> TextTask:
    """Return the task with a reward model that is trained on simulated choices, once; it is kept in the cache.

    Two responses of the task's start to each of ``count`` training prompts, which take turns, are compared by one of
    the annotators, in turn. The pairs and the choices become ``pairs`` and ``preferred`` of the task. The reward has
    mean 0 and standard deviation 1 on responses to the validation prompts.

    Args:
        task: with the columns that the annotators' score reads.
        policy: the place of the language model that the reward model starts from.
        annotators: of one score.
    """
    here = {"task": task.name, "prompts": task.prompts, "columns": task.columns, "pairs": count, "policy": policy}
    options = {name: getattr(task, name) for name in ("max_new_tokens", "min_new_tokens", "temperature")}
    known = [field.name for field in fields(Annotator) if field.name != "score"]
    score = annotators[0].score
    key = {
        **files.jsonable({**here, **options}),
        "annotators": [{name: getattr(each, name) for name in known} for each in annotators],
        "score": f"{score.__module__}.{score.__qualname__}",
        "weights": weights_hash(task.start.named_parameters()),
        "tokenizer": text.Codec(task.tokenizer, task.start).fingerprint,
        "code": files.code_hash([__file__, *(str(m.__file__) for m in (simulated, text, sampling, training, learned))]),
        "versions": {one.__name__: one.__version__ for one in (torch, transformers, np)},
    }

    def build(folder: Path) -> None:
        files.write_atomic(folder / "made.json", json.dumps(_build(task, policy, count, annotators, folder)))

    folder = files.cached("preferences", key, build)
    made = json.loads((folder / "made.json").read_text())
    model, tokenizer = reward_start(policy)
    model.load_state_dict(load_file(folder / _WEIGHTS), strict=False)
    options = {"normalise": tuple(made["normalise"]), "template": _template(task), "name": "preferences"}
    reward = LearnedReward(model.requires_grad_(False), tokenizer, **options)
    pairs = [(row, first, second) for row, first, second in made["pairs"]]
    return replace(task, reward=reward, pairs=pairs, preferred=made["preferred"], stats={**task.stats, **made["stats"]})


def _build(task: TextTask, policy: str, count: int, annotators: Sequence[Annotator], folder: Path) -> dict[str, Any]:
    """Train the reward model and save it; return everything else, as JSON has it."""
    disable_progress_bar()
    compared = _sampled(task, "train", count)
    held_out = _sampled(task, "validation", _HELD_OUT * len(task.prompts["validation"]))
    gold, held_out_gold = (np.array([annotators[0].score(item) for item in p.items]) for p in (compared, held_out))
    one_each = np.arange(count) % len(annotators), np.arange(count)
    preferred = votes(annotators, compared.items)[one_each] > 0.5
    model, tokenizer = reward_start(policy)
    if len(layers := recomputable(model)) > _LAYERS:
        frozen = {id(p) for part in (model.get_input_embeddings(), *layers[:-_LAYERS]) for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)
    reward = LearnedReward(model, tokenizer, template=_template(task))
    read = _read(compared.samples, reward)
    sampling.fit(
        f"{task.name}: training the reward model",
        training.fit_reward_model,
        model,
        [read[i : i + 2] for i in range(0, len(read), 2)],
        np.stack([~preferred, preferred], axis=1).astype(np.int64),
        steps=max(1, _PASSES * count // _BATCH),
        batch_size=_BATCH,
        learning_rate=_RATE,
    )
    reward = in_units_of(reward, held_out.samples)
    scores = held_out.samples.score(reward).reshape(-1, 2)
    save_file({name: p for name, p in model.named_parameters() if p.requires_grad}, folder / _WEIGHTS)
    responses = compared.samples.completion_ids
    return {
        "pairs": [[row, *responses[2 * i : 2 * i + 2]] for i, row in enumerate(compared.rows)],
        "preferred": preferred.tolist(),
        "normalise": reward.normalise,
        "stats": {
            "annotator_accuracy": ranking_accuracy(gold, preferred - 0.5),
            "rm_accuracy": ranking_accuracy(held_out_gold, scores[:, 0] - scores[:, 1]),
        },
    }


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


def _template(task: TextTask) -> learned.Template:
    """How the reward model reads: prompts are chat messages where the tokenizer has a template."""
    return "chat" if "messages" in task.columns.get("train", {}) else "text"


def _read(samples: Samples, reward: LearnedReward) -> list[list[int]]:
    """The samples as token ids that a reward model reads."""
    stopped = [reason == "stop" for reason in samples.finish_reasons]
    if reward.template == "text":
        pairs = zip(samples.prompts, samples.completions, stopped, strict=True)
        return [reward.encode(prompt + completion, end) for prompt, completion, end in pairs]
    chats = zip(samples.columns["messages"], samples.completions, stopped, strict=True)
    return [reward.encode_chat(messages, completion, end) for messages, completion, end in chats]
