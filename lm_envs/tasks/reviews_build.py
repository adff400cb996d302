"""Build the models and data of the Reviews task: ``lm-envs build reviews``.

A grammar makes the corpus (:mod:`lm_envs.tasks.reviews_grammar`), supervised fine-tuning on it makes the reference,
simulated annotators compare pairs of its samples, and a reward model is trained on their choices.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, normalizers
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lm_envs import files, training
from lm_envs.model.tokens import model_inputs, right_pad
from lm_envs.reward.learned import LearnedReward, initialise_reward_head
from lm_envs.reward.units import Samples, in_units_of
from lm_envs.settings import NonNegative, Probability, Rate, Seed, Settings, Size, make
from lm_envs.tasks import sampling
from lm_envs.tasks.reviews import GoldReview, annotate, ranking_accuracy
from lm_envs.tasks.reviews_grammar import EOS, MAX_TOKENS, UNKNOWN, WORDS, corpus

PROMPT_LENGTH = 8
CONTEXT = 64  # positions of both models


@dataclass(frozen=True)
class ReviewsConfig(Settings):
    """Everything that determines what is built.

    Attributes:
        seed: of the corpus, the initial weights, the samples and the annotators.
        reviews: size of the corpus.
        train_prompts, validation_prompts, test_prompts: distinct openings of each split.
        sft_steps, sft_batch, sft_learning_rate: supervised fine-tuning, a batch in reviews.
        pairs: compared pairs to train the reward model on.
        held_out_pairs: pairs of samples for validation prompts, which measure and normalise the reward model.
        flip: probability that an annotator's choice is reversed.
        rm_hidden, rm_layers, rm_heads: size of the reward model, which starts from random weights: at 25 % flips, a
            copy of the language model learns little more than noise (ranking accuracy 0.57).
        rm_steps, rm_batch, rm_learning_rate, rm_weight_decay: training of the reward model, a batch in pairs.
    """

    seed: Seed = 0
    reviews: Size = 8192
    train_prompts: Size = 4096
    validation_prompts: Size = 256
    test_prompts: Size = 512
    max_new_tokens: Size = 24
    hidden: Size = 128
    layers: Size = 3
    heads: Size = 4
    sft_steps: Size = 240
    sft_batch: Size = 32
    sft_learning_rate: Rate = 4e-3
    pairs: Size = 8192
    held_out_pairs: Size = 1024
    flip: Probability = 0.25
    rm_hidden: Size = 64
    rm_layers: Size = 2
    rm_heads: Size = 4
    rm_steps: Size = 192
    rm_batch: Size = 128
    rm_learning_rate: Rate = 2e-3
    rm_weight_decay: NonNegative = 0.1
    kl_coef: NonNegative = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if PROMPT_LENGTH + self.max_new_tokens > CONTEXT:
            left = f"what a prompt of {PROMPT_LENGTH} leaves of the model's context of {CONTEXT}"
            raise ValueError(
                f"max_new_tokens must be at most {CONTEXT - PROMPT_LENGTH}, {left}, got {self.max_new_tokens}"
            )
        for part in ("", "rm_"):
            hidden, heads = getattr(self, f"{part}hidden"), getattr(self, f"{part}heads")
            if hidden % heads:
                raise ValueError(f"{part}hidden={hidden} must be a multiple of {part}heads={heads}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer whose words carry the space before them, so that texts join and round-trip.

    The pad token is EOS, the only special token; the unknown word is an ordinary token.
    """
    vocabulary = {f" {word}": i for i, word in enumerate([*WORDS, UNKNOWN])}
    vocabulary[EOS] = len(vocabulary)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=f" {UNKNOWN}"))
    spaces = [(Regex(r"\s+"), " "), (Regex(r"^(?=\S)"), " ")]
    steps = [normalizers.Strip(), *(normalizers.Replace(*each) for each in spaces)]
    model.normalizer = normalizers.Sequence(steps)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_next")
    model.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build(folder: Path, task_seed: int = 0, **options: Any) -> None:
    """Build the task's models and data in a new or empty folder, with progress bars on standard error.

    ``task_seed`` makes other models of the same corpus: its prompts are the same, the initial weights, the samples and
    the annotators are drawn again.

    The folder then holds ``policy/`` and ``reward_model/`` with the tokenizer, ``task.json``, ``manifest.json`` and
    ``data.safetensors``: token ids as uint8 (rows end at their first EOS) of the prompts ``train``, ``validation`` and
    ``test``, ``(N, 8)``; of ``demonstrations``, ``(N, 34)``; and of ``pairs``, ``(N, 2, T)``, two responses of the
    reference to training prompt ``i % len(train)``; and ``preferred``, ``(N,)``, 1 where the annotators chose the
    first. Weights differ slightly between kinds of processors. ``options`` are fields of :class:`ReviewsConfig`.

    Raises:
        ValueError: a wrong option, or the corpus has too few distinct openings.
    """
    given = make(ReviewsConfig, options, "reviews")
    tokenizer = make_tokenizer()
    prompts, demonstrations, held_out_reviews = split(given, tokenizer)
    config = replace(given, seed=given.seed + task_seed)
    folder.mkdir(parents=True, exist_ok=True)  # if it cannot be written, say so before training
    sizes = (config.hidden, config.layers, config.heads)
    policy = sampling.small_gpt2(GPT2LMHeadModel, tokenizer, CONTEXT, sizes, config.seed)
    sampling.fit(
        "reviews: fine-tuning the language model",
        training.fit_language_model,
        policy,
        demonstrations,
        steps=config.sft_steps,
        batch_size=config.sft_batch,
        learning_rate=config.sft_learning_rate,
        seed=config.seed,
    )
    compared = sample_pairs(config, policy, tokenizer, prompts["train"], config.pairs, 0)
    held_out = sample_pairs(config, policy, tokenizer, prompts["validation"], config.held_out_pairs, config.pairs)
    gold, held_out_gold = (samples.score(GoldReview()).reshape(-1, 2) for samples in (compared, held_out))
    preferred = annotate(gold[:, 0], gold[:, 1], flip=config.flip, seed=config.seed)
    sizes = (config.rm_hidden, config.rm_layers, config.rm_heads)
    model = sampling.small_gpt2(GPT2ForSequenceClassification, tokenizer, CONTEXT, sizes, config.seed)
    initialise_reward_head(model.score, torch.Generator().manual_seed(config.seed))
    texts = [[*prompts["train"][i // 2 % config.train_prompts], *ids] for i, ids in enumerate(compared.completion_ids)]
    sampling.fit(
        "reviews: training the reward model",
        training.fit_reward_model,
        model,
        [texts[i : i + 2] for i in range(0, len(texts), 2)],
        np.stack([~preferred, preferred], axis=1).astype(np.int64),
        steps=config.rm_steps,
        batch_size=config.rm_batch,
        learning_rate=config.rm_learning_rate,
        weight_decay=config.rm_weight_decay,
        seed=config.seed,
    )
    reward = in_units_of(LearnedReward(model, tokenizer, batch_size=256), held_out)
    scores = held_out.score(reward).reshape(-1, 2)
    made = {
        "max_new_tokens": config.max_new_tokens,
        "kl_coef": config.kl_coef,
        "normalise": reward.normalise,
        "stats": {
            "sft_perplexity": perplexity(policy, held_out_reviews),
            "sft_gold": float(held_out_gold.mean()),
            "sft_gold_std": float(held_out_gold.std()),
            "annotator_accuracy": ranking_accuracy(gold, preferred - 0.5),
            "rm_accuracy": ranking_accuracy(held_out_gold, scores[:, 0] - scores[:, 1]),
            "rm_gold_correlation": float(np.corrcoef(held_out_gold.ravel(), scores.ravel())[0, 1]),
        },
    }
    sampling.save(folder, tokenizer, policy=policy, reward_model=model)
    eos = tokenizer.eos_token_id
    data = {name: _table(rows, eos, PROMPT_LENGTH) for name, rows in prompts.items()}
    data["demonstrations"] = _table(demonstrations, eos, MAX_TOKENS)
    responses = _table(compared.completion_ids, eos, config.max_new_tokens)
    data["pairs"] = responses.view(config.pairs, 2, config.max_new_tokens)
    data["preferred"] = torch.from_numpy(preferred.astype(np.uint8))
    save_file(data, folder / "data.safetensors")
    (folder / "task.json").write_text(json.dumps(made, indent=1))
    files.write_manifest(
        folder,
        {
            "config": asdict(given),
            "task_seed": task_seed,
            "versions": {one.__name__: one.__version__ for one in (torch, transformers, tokenizers, np)},
            "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "date": date.today().isoformat(),
        },
    )


def _table(rows: Sequence[Sequence[int]], eos: int, width: int) -> torch.Tensor:
    """Return ``(N, width)`` uint8, filled up with EOS."""
    return torch.tensor([[*row, *[eos] * (width - len(row))] for row in rows], dtype=torch.uint8)


@torch.no_grad()
def perplexity(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> float:
    """Return the perplexity per token of texts, without their first tokens."""
    ids = right_pad(texts)
    logits = model(**model_inputs(ids[:, :-1]), use_cache=False).logits
    return math.exp(float(training.next_token_loss(logits, ids[:, 1:])))


def split(
    config: ReviewsConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, list[list[int]]], list[list[int]], list[list[int]]]:
    """Return prompts by split, the reviews to fine-tune on, and the held-out reviews, as token ids.

    An opening (the first eight words) belongs to one split only; reviews that begin like a validation or test prompt
    are held out. ValueError if the corpus has too few distinct openings.
    """
    texts = [
        tokenizer.convert_tokens_to_ids([*(f" {word}" for word in words[:-1]), EOS])
        for words in corpus(config.seed, config.reviews)
    ]
    openings = list(dict.fromkeys(tuple(text[:PROMPT_LENGTH]) for text in texts))
    sizes = {"test": config.test_prompts, "validation": config.validation_prompts, "train": config.train_prompts}
    if sum(sizes.values()) > len(openings):
        raise ValueError(
            f"reviews: {config.reviews} reviews have {len(openings)} distinct openings, fewer than the "
            f"{sum(sizes.values())} prompts asked for: raise reviews or lower the prompts"
        )
    prompts, start = {}, 0
    for name, size in sizes.items():
        prompts[name] = [list(opening) for opening in openings[start : start + size]]
        start += size
    held_out = {tuple(prompt) for name in ("test", "validation") for prompt in prompts[name]}
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    for text in texts:
        parts[tuple(text[:PROMPT_LENGTH]) in held_out].append(text)
    return prompts, *parts


def sample_pairs(
    config: ReviewsConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    count: int,
    first: int,
) -> Samples:
    """Sample ``count`` pairs of adjacent responses, numbered from ``first``; the prompts take turns."""
    return sampling.sample(
        policy,
        tokenizer,
        prompts,
        2 * count,
        repeats=2,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        first=2 * first,
        batch_size=1024,
        title="reviews: sampling pairs to compare",
    )
