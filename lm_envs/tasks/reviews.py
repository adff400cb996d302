"""Reviews-v0: a small language model continues movie reviews, as in sentiment continuation on IMDB.

A reward model learned from noisy simulated annotators scores them, and the gold reward of the annotators is known. The
models and data are files in ``reviews_v0/``, made by :mod:`lm_envs.tasks.reviews_build` and the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from lm_envs import files, rng
from lm_envs.tasks import sampling
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.reviews_grammar import gold_reward

FOLDER = Path(__file__).with_name("reviews_v0")


class GoldReview:
    """The gold reward as a :class:`~lm_envs.reward.base.Reward`; see
    :func:`lm_envs.tasks.reviews_grammar.gold_reward`."""

    __name__ = "gold"

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        finish_reasons: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return one score per completion; without ``finish_reasons`` every response counts as stopped."""
        reasons = ["stop"] * len(completions) if finish_reasons is None else finish_reasons
        return [
            gold_reward(prompt.split(), completion.split(), reason == "stop")
            for prompt, completion, reason in zip(prompts, completions, reasons, strict=True)
        ]


def annotate(first: NDArray[np.float64], second: NDArray[np.float64], *, flip: float, seed: int) -> NDArray[np.bool_]:
    """Simulate annotators: ``(N,)`` bool, whether the first of each pair is preferred, from gold rewards ``(N,)`` each.

    Choices follow Bradley-Terry at temperature 1, ``P(first) = sigmoid(gold(first) - gold(second))``, and are reversed
    with probability ``flip``. The choice on pair i depends only on the seed, i and the pair's two gold rewards.
    """
    pair = np.arange(len(first))
    with np.errstate(over="ignore"):  # a gap of hundreds: the probability is 0
        choice = rng.uniform(seed, rng.ANNOTATOR, pair, 0) < 1 / (1 + np.exp(second - first))
    return choice ^ (rng.uniform(seed, rng.ANNOTATOR, pair, 1) < flip)


def ranking_accuracy(gold: NDArray[np.float64], difference: NDArray[np.floating[Any]]) -> float:
    """Return how often score differences ``(N,)`` have the sign of the differences in gold reward ``(N, 2)``, without
    pairs of equal gold; 0.5 if there are no others."""
    margin = gold[:, 0] - gold[:, 1]
    differ = margin != 0
    return float((difference[differ] * margin[differ] > 0).mean()) if differ.any() else 0.5


def load(path: str | Path = FOLDER, task_seed: int = 0, **options: Any) -> TextTask:
    """Load the Reviews task: Reviews-v0, or the variant in a folder that ``lm-envs build reviews`` made.

    Args:
        path: the folder.
        task_seed: 0 takes the folder's models; another number those that its settings give with other random numbers,
            built once into the cache, in about a minute.

    Raises:
        ValueError: another option, or a file that is missing or damaged.
    """
    if options:
        raise ValueError(
            f"reviews has no option {next(iter(options))!r}, because it is one fixed task: build a variant with "
            "`lm-envs build reviews --out DIR --set NAME=VALUE` and load it with path=DIR"
        )
    folder = Path(path)
    if (name := files.damaged(folder)) is not None:
        remedy = "install lm-envs again" if folder == FOLDER else "build it again with `lm-envs build reviews`"
        raise ValueError(f"reviews: {folder / name} is missing or damaged; {remedy}")
    if task_seed:
        folder = _version(folder, task_seed)
    made = json.loads((folder / "task.json").read_text())
    data = load_file(folder / "data.safetensors")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "policy")
    eos = tokenizer.eos_token_id
    prompts = {name: data[name].tolist() for name in ("train", "validation", "test")}
    first, second = (_texts(data["pairs"][:, i], eos) for i in range(2))
    return TextTask(
        name="reviews",
        tokenizer=tokenizer,
        reference=sampling.saved_gpt2(GPT2LMHeadModel, folder / "policy"),
        prompts=prompts,
        reward=sampling.saved_reward(folder, tokenizer, made["normalise"], "review_reward_model"),
        judge=GoldReview(),
        eos_token_id=eos,
        max_new_tokens=made["max_new_tokens"],
        kl_coef=made["kl_coef"],
        description="continue a movie review; a reward model learned from noisy simulated annotators scores it",
        demonstrations=_texts(data["demonstrations"], eos),
        pairs=list(zip(cycle(range(len(prompts["train"]))), first, second)),
        stats=made["stats"],
    )


def _version(folder: Path, task_seed: int) -> Path:
    """The folder in the cache with other models by the same settings."""
    from lm_envs.tasks import reviews_build

    config = json.loads((folder / files.MANIFEST).read_text())["made_from"]["config"]
    code = files.code_hash([__file__, str(reviews_build.__file__), str(sampling.__file__)])
    parts = {"config": config, "task_seed": task_seed, "code": code}
    inner = "task"  # it has a manifest of its own
    return files.cached("reviews", parts, lambda made: reviews_build.build(made / inner, task_seed, **config)) / inner


def _texts(rows: NDArray[np.uint8], eos: int) -> list[list[int]]:
    """Return token ids up to and including each row's first EOS."""
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows.tolist()]
