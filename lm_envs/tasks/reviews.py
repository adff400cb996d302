"""The embedded task, Reviews: a small language model continues movie reviews.

A reward model learned from noisy simulated annotators scores them; the gold reward that they follow stays known. It
mirrors sentiment continuation on IMDB and needs no download: a grammar makes the corpus
(:mod:`lm_envs.tasks.reviews_grammar`), supervised fine-tuning on it makes the reference, annotators compare pairs of
its samples, and a reward model is trained on their choices. All of it happens on first use and is cached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_model
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lm_envs import files, rng, training
from lm_envs.kernels import logprob_kl
from lm_envs.model import decoding, tokens
from lm_envs.reward import base, learned
from lm_envs.reward.learned import LearnedReward, initialise_reward_head
from lm_envs.reward.units import Samples, in_units_of
from lm_envs.tasks import reviews_grammar, sampling
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.reviews_grammar import EOS, UNKNOWN, WORDS, corpus, gold_reward
from lm_envs.tasks.sampling import check_options, line_of, progress_bar

PROMPT_LENGTH = 8
CONTEXT = 64  # positions of both models
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class ReviewsConfig:
    """Everything that determines the task; changing a field makes another cache entry.

    Attributes:
        seed: of the corpus, the initial weights, the samples and the annotators.
        reviews: size of the corpus.
        train_prompts, validation_prompts, test_prompts: distinct openings of each split.
        max_new_tokens: the horizon.
        hidden, layers, heads: size of the language model.
        sft_steps, sft_batch, sft_learning_rate: supervised fine-tuning, a batch in reviews.
        pairs: compared pairs to train the reward model on.
        held_out_pairs: pairs of samples for validation prompts; they measure and normalise the reward model.
        flip: probability that an annotator's choice is recorded the wrong way round.
        rm_hidden, rm_layers, rm_heads: size of the reward model. It starts from random weights: at 25 %
            flips, one of the language model's size that starts from its weights learns little more than
            noise (ranking accuracy 0.57).
        rm_steps, rm_batch, rm_learning_rate, rm_weight_decay: training of the reward model, a batch in pairs.
        kl_coef: the environment's default KL coefficient.
    """

    seed: int = 0
    reviews: int = 8192
    train_prompts: int = 4096
    validation_prompts: int = 256
    test_prompts: int = 512
    max_new_tokens: int = 24
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    sft_steps: int = 240
    sft_batch: int = 32
    sft_learning_rate: float = 4e-3
    pairs: int = 8192
    held_out_pairs: int = 1024
    flip: float = 0.25
    rm_hidden: int = 64
    rm_layers: int = 2
    rm_heads: int = 4
    rm_steps: int = 192
    rm_batch: int = 128
    rm_learning_rate: float = 2e-3
    rm_weight_decay: float = 0.1
    kl_coef: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError where a field is out of range."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("seed", "flip", "kl_coef", "rm_weight_decay"):
                if not value >= 0:
                    raise ValueError(f"reviews: {field.name} must not be negative, got {value}")
            elif not value > 0:
                raise ValueError(f"reviews: {field.name} must be positive, got {value}")
        if self.flip > 1:
            raise ValueError(f"reviews: flip must lie in [0, 1], got {self.flip}")
        if PROMPT_LENGTH + self.max_new_tokens > CONTEXT:
            raise ValueError(
                f"reviews: max_new_tokens must be at most {CONTEXT - PROMPT_LENGTH}, what a prompt of "
                f"{PROMPT_LENGTH} leaves of the model's context of {CONTEXT}, got {self.max_new_tokens}"
            )
        for hidden, heads in (("hidden", "heads"), ("rm_hidden", "rm_heads")):
            if getattr(self, hidden) % getattr(self, heads):
                raise ValueError(
                    f"reviews: {hidden}={getattr(self, hidden)} must be a multiple of {heads}={getattr(self, heads)}"
                )


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
        """One score per completion; without ``finish_reasons`` every response counts as stopped."""
        reasons = ["stop"] * len(completions) if finish_reasons is None else finish_reasons
        return [
            gold_reward(prompt.split(), completion.split(), reason == "stop")
            for prompt, completion, reason in zip(prompts, completions, reasons, strict=True)
        ]


def annotate(first: NDArray[np.float64], second: NDArray[np.float64], *, flip: float, seed: int) -> NDArray[np.bool_]:
    """Whether simulated annotators prefer the first of each pair.

    Bradley-Terry at temperature 1, ``P(first) = sigmoid(gold(first) - gold(second))``; then each choice is
    turned round with probability ``flip``. The numbers are counted: the choice on pair i depends on the
    seed, i and its two gold rewards alone.

    Args:
        first, second: ``(N,)`` gold rewards.

    Returns:
        ``(N,)`` bool.
    """
    pair = np.arange(len(first))
    choice = rng.uniform(seed, rng.ANNOTATOR, pair, 0) < 1 / (1 + np.exp(second - first))
    return choice ^ (rng.uniform(seed, rng.ANNOTATOR, pair, 1) < flip)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose words carry the space before them, so that texts join and round-trip as
    they are.

    Pad is EOS, the only special token; an unknown word is an ordinary token.
    """
    vocabulary = {f" {word}": i for i, word in enumerate([*WORDS, UNKNOWN])}
    vocabulary[EOS] = len(vocabulary)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=f" {UNKNOWN}"))
    model.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Strip(),
            tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            tokenizers.normalizers.Replace(tokenizers.Regex(r"^(?=\S)"), " "),
        ]
    )
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


def load(**options: Any) -> TextTask:
    """The Reviews task; made on first use, which shows a progress bar, and read from the cache afterwards.

    Args:
        options: fields of :class:`ReviewsConfig`.

    Raises:
        ValueError: an option that does not exist (the message names the near ones) or is out of range.
        lm_envs.files.CacheError: the cache folder cannot be written.
    """
    check_options("reviews", ReviewsConfig, options)
    config = ReviewsConfig(**options)
    modules = [reviews_grammar, sampling, training, base, learned, decoding, tokens, rng, logprob_kl]
    sources = [__file__, *(str(module.__file__) for module in modules)]
    parts = {
        "config": asdict(config),
        "code": files.code_hash(sources),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)},
    }
    folder = files.cached("reviews", parts, lambda folder: build(config, folder))
    return read(folder, config)


def read(folder: Path, config: ReviewsConfig) -> TextTask:
    """The task that :func:`build` left in a folder."""
    made = json.loads((folder / "task.json").read_text())
    tokenizer = make_tokenizer()
    return TextTask(
        name="reviews",
        tokenizer=tokenizer,
        reference=_saved(GPT2LMHeadModel, folder / "policy"),
        prompts=made["prompts"],
        reward=LearnedReward(
            _saved(GPT2ForSequenceClassification, folder / "reward_model"),
            tokenizer,
            normalise=tuple(made["normalise"]),
            batch_size=256,
            name="review_reward_model",
        ),
        judge=GoldReview(),
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=config.max_new_tokens,
        kl_coef=config.kl_coef,
        description="continue a movie review; a reward model learned from noisy simulated annotators scores it",
        demonstrations=made["demonstrations"],
        stats=made["stats"],
    )


def build(config: ReviewsConfig, folder: Path) -> None:
    """Make the corpus, the SFT model, the comparisons and the reward model, and save them in a folder."""
    tokenizer = make_tokenizer()
    prompts, demonstrations = split(config, tokenizer)
    with progress_bar() as bar:
        policy = initial(GPT2LMHeadModel, tokenizer, config.hidden, config.layers, config.heads, config.seed)
        sft_losses = training.fit_language_model(
            policy,
            demonstrations,
            steps=config.sft_steps,
            batch_size=config.sft_batch,
            learning_rate=config.sft_learning_rate,
            seed=config.seed,
            progress=line_of(bar, "reviews: fine-tuning the language model", config.sft_steps),
        )
        total = 2 * (config.pairs + config.held_out_pairs)
        sampled = line_of(bar, "reviews: sampling pairs to compare", total)
        compared = Pairs.of(config, policy, tokenizer, prompts["train"], config.pairs, 0, sampled)
        held_out = Pairs.of(
            config, policy, tokenizer, prompts["validation"], config.held_out_pairs, config.pairs, sampled
        )
        preferred = annotate(compared.gold[:, 0], compared.gold[:, 1], flip=config.flip, seed=config.seed)
        model = initial(
            GPT2ForSequenceClassification, tokenizer, config.rm_hidden, config.rm_layers, config.rm_heads, config.seed
        )
        initialise_reward_head(model.score, torch.Generator().manual_seed(config.seed))
        rm_losses = training.fit_reward_model(
            model,
            compared.texts,
            np.stack([~preferred, preferred], axis=1).astype(np.int64),
            steps=config.rm_steps,
            batch_size=config.rm_batch,
            learning_rate=config.rm_learning_rate,
            weight_decay=config.rm_weight_decay,
            seed=config.seed,
            progress=line_of(bar, "reviews: training the reward model", config.rm_steps),
        )
    reward = in_units_of(LearnedReward(model, tokenizer, batch_size=256), held_out.samples)
    scores = held_out.samples.score(reward).reshape(-1, 2)
    stats = {
        "sft_loss": _mean_of_last(sft_losses, 0.1),
        "sft_gold": float(held_out.gold.mean()),
        "sft_gold_std": float(held_out.gold.std()),
        "annotator_accuracy": ranking_accuracy(compared.gold, preferred - 0.5),
        "rm_loss": _mean_of_last(rm_losses, 0.25),
        "rm_accuracy": ranking_accuracy(held_out.gold, scores[:, 0] - scores[:, 1]),
        "rm_gold_correlation": float(np.corrcoef(held_out.gold.ravel(), scores.ravel())[0, 1]),
    }
    policy.save_pretrained(folder / "policy")
    model.save_pretrained(folder / "reward_model")
    for name in ("policy", "reward_model"):
        tokenizer.save_pretrained(folder / name)
    made = {"prompts": prompts, "demonstrations": demonstrations, "stats": stats, "normalise": reward.normalise}
    (folder / "task.json").write_text(json.dumps(made))


def _mean_of_last(values: Sequence[float], share: float) -> float:
    return float(np.mean(values[-max(1, round(share * len(values))) :]))


def split(
    config: ReviewsConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, list[list[int]]], list[list[int]]]:
    """Prompts by split, and the reviews to fine-tune on, as token ids.

    An opening (the first eight words) belongs to one split only, and a review that begins like a validation
    or test prompt is not trained on.

    Raises:
        ValueError: the corpus has too few distinct openings.
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
    return (
        {name: prompts[name] for name in ("train", "validation", "test")},
        [text for text in texts if tuple(text[:PROMPT_LENGTH]) not in held_out],
    )


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses to a prompt.

    Attributes:
        samples: 2N responses, those of a pair next to each other.
        texts: N pairs of prompt and response as token ids, EOS included where the response stopped.
        gold: ``(N, 2)`` float64.
    """

    samples: Samples
    texts: list[list[list[int]]]
    gold: NDArray[np.float64]

    @staticmethod
    def of(
        config: ReviewsConfig,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        count: int,
        first: int,
        progress: Callable[[int, float], None],
    ) -> Pairs:
        """``count`` pairs from the policy, numbered from ``first``; the prompts take turns."""
        chosen = [prompts[i // 2 % len(prompts)] for i in range(2 * count)]
        samples = sampling.sample(
            policy,
            tokenizer,
            chosen,
            len(chosen),
            eos_token_id=tokenizer.eos_token_id,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            first=2 * first,
            batch_size=1024,
            progress=lambda done: progress(2 * first + done, 0.0),
        )
        full = [[*prompt, *ids] for prompt, ids in zip(chosen, samples.completion_ids, strict=True)]
        pairs = [full[i : i + 2] for i in range(0, len(full), 2)]
        return Pairs(samples, pairs, samples.score(GoldReview()).reshape(-1, 2))


def ranking_accuracy(gold: NDArray[np.float64], difference: NDArray[np.floating[Any]]) -> float:
    """How often a difference of two scores has the sign of the difference in gold reward; pairs of equal
    gold do not count.

    Args:
        gold: ``(N, 2)``.
        difference: ``(N,)``, the first's score minus the second's.
    """
    margin = gold[:, 0] - gold[:, 1]
    differ = margin != 0
    return float((difference[differ] * margin[differ] > 0).mean()) if differ.any() else 0.5


def initial(
    kind: type[Model], tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int, heads: int, seed: int
) -> Model:
    """A GPT-2 with weights drawn from the seed; the caller's global generator is left as it was."""
    architecture = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        activation_function="relu",  # the cheapest on a CPU
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        num_labels=1,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(architecture).eval()


def _saved(kind: type[Model], folder: Path) -> Model:
    """What ``from_pretrained`` gives, without the second it spends on the layouts of other models' checkpoints."""
    model = kind(GPT2Config.from_pretrained(folder))
    load_model(model, folder / "model.safetensors")
    return model.eval()
