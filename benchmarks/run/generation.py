"""What a run left, beside what it started from: models that answer, for ``lm-envs generate`` and ``lm-envs chat``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lm_envs import rng
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.names import base_task, is_control
from lm_envs.benchmarks.run.one_run import settings_of
from lm_envs.model.adapters import base_of, is_adapter, with_adapters
from lm_envs.model.encoder_decoder import room_for
from lm_envs.model.loading import load_policy, load_tokenizer
from lm_envs.model.text import Codec
from lm_envs.model.tokens import left_pad
from lm_envs.tasks import load

_SEED = 1 << 44  # far from the seeds of training and of measuring
_ROWS = 32  # responses that are sampled together
MAX_NEW_TOKENS = 64


@dataclass
class Left:
    """A policy, and what it started from.

    Attributes:
        models: by name: "start", where it is known, and "tuned".
        prompts: token ids of the test prompts of the run's task; empty where there is no task.
        ends: tokens that end a response, of the run's task; None takes the model's.
    """

    tokenizer: PreTrainedTokenizerBase
    models: dict[str, PreTrainedModel]
    prompts: list[list[int]] = field(default_factory=list)
    ends: tuple[int, ...] | None = None
    temperature: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        self.codec = Codec(self.tokenizer, self.models["tuned"])

    def respond(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int = 0,
        ends: tuple[int, ...] | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Return a response of a model to each prompt; a prompt that comes twice gets two. Temperature 0 takes the
        likeliest token each time. ValueError if a prompt leaves no room in the model's context."""
        model, most = self.models[name], max_new_tokens or self.max_new_tokens
        for ids in prompts:
            needed, context = room_for(model, len(ids), most)
            if context is not None and needed > context:
                raise ValueError(
                    f"a prompt has {len(ids)} tokens and responses up to {most}, together more than the model's "
                    f"context of {context}: shorten it, or lower --max-new-tokens"
                )
        rows = torch.as_tensor(left_pad(prompts, max(map(len, prompts))))
        heat = self.temperature if temperature is None else temperature
        policy = LMPolicy(
            model,
            ends or self.ends or self.codec.ends(False),
            rows.shape[1],
            most,
            temperature=heat or 1.0,
            min_new_tokens=min(self.min_new_tokens, most),
        )
        numbers = rng.uniform(_SEED + seed, rng.TOKEN, np.arange(len(rows))[:, None], np.arange(most))
        found: list[list[int]] = []
        with torch.no_grad():
            for part, uniforms in zip(rows.split(_ROWS), torch.as_tensor(numbers).split(_ROWS), strict=True):
                response = policy.respond(part, uniforms)[0] if heat else policy.greedy(part)
                found += [[token for token in row if token >= 0] for row in response.tolist()]
        return self.codec.decode(prompts, found)[1]


def opened(place: str) -> Left:
    """Open the folder of a run or its folder ``model``, or any language model that a policy may start from.

    Raises:
        UserError: the run has left no language model.
        ValueError: it cannot be read, or is no language model.
    """
    disable_progress_bar()
    folder = Path(place).expanduser()
    for run in (folder, folder.parent) if folder.name == "model" else (folder,):
        config = settings_of(run) if _is_run(run) else None
        if config is not None:
            return _of_run(config["run"], run)
    if is_adapter(folder):
        base = load_policy(base_of(folder), "the base of policy")
        return Left(load_tokenizer(place), {"start": base, "tuned": with_adapters(base, folder)})
    return Left(load_tokenizer(place), {"tuned": load_policy(place)})


def _is_run(folder: Path) -> bool:
    """Whether the folder's ``config.json`` is a run's; a model has a file of that name too."""
    try:
        return "run" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _of_run(run: dict[str, Any], folder: Path) -> Left:
    """A comparison's run answers the prompts of its task, one that learned from data those it is given."""
    place = folder / "model"
    if not place.is_dir():
        why = "is not finished, or its policy is no language model of its own"
        raise UserError(f"{folder} holds no folder `model`: the run {why}")
    if "task" not in run:
        return Left(load_tokenizer(place), {"start": load_policy(run["model"]), "tuned": load_policy(place)})
    assert not is_control(run["task"])  # those leave no language model
    task, env = load(base_task(run["task"])[0], **run["options"]), run["env"]
    return Left(
        task.tokenizer,
        {"start": task.start, "tuned": load_policy(place)},
        [list(ids) for ids in task.prompts["test"]],
        task.eos_token_ids,
        **{name: env.get(name, getattr(task, name)) for name in ("temperature", "max_new_tokens", "min_new_tokens")},
    )
