"""The embedded task, Reviews: a small language model continues movie reviews, and a reward model learned from noisy simulated
annotators says how good they are, while the gold reward that the annotators follow stays known.

It mirrors sentiment continuation on IMDB and needs no download: a grammar makes the corpus
(:mod:`lm_envs.tasks.review_grammar`), supervised fine-tuning on it makes the reference, annotators compare pairs of its samples, and a
reward model is trained on their choices. All of it happens on first use and is cached.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lm_envs import cache, counted, decoding, observations, rewards, supervised
from lm_envs.kernels import logprob_kl
from lm_envs.rewards import LearnedReward
from lm_envs.tasks import review_grammar
from lm_envs.tasks.review_grammar import EOS, UNKNOWN, WORDS, corpus, gold_reward
from lm_envs.tasks.task import TextTask

PROMPT_LENGTH = 8
# Pair samples take their random numbers from episodes that no training run reaches.
_PAIR_EPISODES = 2**40


@dataclass(frozen=True)
class ReviewsConfig:
    """Everything that determines the task; changing a field makes another cache entry.

    Attributes:
        seed: of the corpus, the initial weights, the samples and the annotators.
        reviews: size of the corpus.
        train_prompts, validation_prompts, test_prompts: distinct openings of each split.
        max_new_tokens: the horizon.
        hidden, layers, heads: size of the language model, and of the reward model, which starts from it.
        sft_steps, sft_batch, sft_learning_rate: supervised fine-tuning, a batch in reviews.
        pairs: compared pairs to train the reward model on.
        held_out_pairs: pairs of samples for validation prompts; they measure and normalise the reward model.
        flip: probability that an annotator's choice is recorded the wrong way round.
        rm_steps, rm_batch, rm_learning_rate: training of the reward model, a batch in pairs.
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
    sft_steps: int = 100
    sft_batch: int = 64
    sft_learning_rate: float = 5e-3
    pairs: int = 8192
    held_out_pairs: int = 1024
    flip: float = 0.25
    rm_steps: int = 128
    rm_batch: int = 64
    rm_learning_rate: float = 1e-3
    kl_coef: float = 0.03

    def __post_init__(self) -> None:
        """Raise ValueError where a field is out of range."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("seed", "flip", "kl_coef") and not value > 0:
                raise ValueError(f"reviews: {field.name} must be positive, got {value}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"reviews: flip must lie in [0, 1], got {self.flip}")
        if self.hidden % self.heads:
            raise ValueError(f"reviews: hidden={self.hidden} must be a multiple of heads={self.heads}")


class GoldReview:
    """The gold reward as a :class:`~lm_envs.rewards.Reward`; see :func:`lm_envs.tasks.review_grammar.gold_reward`."""

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

    Bradley-Terry at temperature 1, ``P(first) = sigmoid(gold(first) - gold(second))``; then each choice is turned round with
    probability ``flip``. The numbers are counted: the choice on pair i depends on the seed, i and its two gold rewards alone.

    Args:
        first, second: ``(N,)`` gold rewards.

    Returns:
        ``(N,)`` bool.
    """
    pair = np.arange(len(first))
    choice = counted.uniform(seed, counted.ANNOTATOR, pair, 0) < 1 / (1 + np.exp(second - first))
    return choice ^ (counted.uniform(seed, counted.ANNOTATOR, pair, 1) < flip)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose words carry the space before them, so that texts join and round-trip as they are.

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
        lm_envs.cache.CacheError: the cache folder cannot be written.
    """
    known = [field.name for field in fields(ReviewsConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known
            raise ValueError(f"reviews has no option {name!r}: did you mean {', '.join(near)}?")
    config = ReviewsConfig(**options)
    modules = [review_grammar, supervised, rewards, decoding, observations, counted, logprob_kl]
    sources = [__file__, *(str(module.__file__) for module in modules)]
    parts = {
        "config": asdict(config),
        "code": cache.code_hash(sources),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)},
    }
    folder = cache.cached("reviews", parts, lambda folder: build(config, folder))
    return read(folder, config)


def read(folder: Path, config: ReviewsConfig) -> TextTask:
    """The task that :func:`build` left in a folder."""
    made = json.loads((folder / "task.json").read_text())
    tokenizer = make_tokenizer()
    return TextTask(
        name="reviews",
        tokenizer=tokenizer,
        reference=GPT2LMHeadModel.from_pretrained(folder / "policy", dtype=torch.float32),
        prompts=made["prompts"],
        reward=LearnedReward(
            GPT2ForSequenceClassification.from_pretrained(folder / "reward_model", dtype=torch.float32),
            tokenizer,
            normalise=(made["normalise"]["mean"], made["normalise"]["std"]),
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
    with _progress() as bar:
        policy = _initial(GPT2LMHeadModel, config, tokenizer)
        sft_losses = supervised.fit_language_model(
            policy,
            demonstrations,
            steps=config.sft_steps,
            batch_size=config.sft_batch,
            learning_rate=config.sft_learning_rate,
            seed=config.seed,
            progress=_advance(bar, "reviews: fine-tuning the language model", config.sft_steps),
        )
        judged = _advance(bar, "reviews: sampling pairs to compare", config.pairs + config.held_out_pairs)
        train = Pairs.sample(config, policy, tokenizer, prompts["train"], config.pairs, 0, judged)
        held_out = Pairs.sample(
            config, policy, tokenizer, prompts["validation"], config.held_out_pairs, config.pairs, judged
        )
        preferred = annotate(train.gold[:, 0], train.gold[:, 1], flip=config.flip, seed=config.seed)
        reward_model = _initial(GPT2ForSequenceClassification, config, tokenizer)
        reward_model.transformer.load_state_dict(policy.transformer.state_dict())
        supervised.initialise_reward_head(reward_model.score, torch.Generator().manual_seed(config.seed))
        rm_losses = supervised.fit_reward_model(
            reward_model,
            train.texts,
            np.stack([~preferred, preferred], axis=1).astype(np.int64),
            steps=config.rm_steps,
            batch_size=config.rm_batch,
            learning_rate=config.rm_learning_rate,
            seed=config.seed,
            progress=_advance(bar, "reviews: training the reward model", config.rm_steps),
        )
    scores = held_out.scores(reward_model)
    tail = slice(-max(1, config.sft_steps // 10), None)
    rm_tail = slice(-max(1, config.rm_steps // 4), None)
    stats = {
        "sft_loss": float(np.mean(sft_losses[tail])),
        "sft_gold": float(held_out.gold.mean()),
        "sft_gold_std": float(held_out.gold.std()),
        "annotator_accuracy": ranking_accuracy(train.gold, preferred * 1.0 - 0.5),
        "rm_loss": float(np.mean(rm_losses[rm_tail])),
        "rm_accuracy": ranking_accuracy(held_out.gold, scores[:, 0] - scores[:, 1]),
        "rm_gold_correlation": float(np.corrcoef(held_out.gold.ravel(), scores.ravel())[0, 1]),
    }
    policy.save_pretrained(folder / "policy")
    reward_model.save_pretrained(folder / "reward_model")
    tokenizer.save_pretrained(folder / "tokenizer")
    normalise = {"mean": float(scores.mean()), "std": float(scores.std())}
    made = {"prompts": prompts, "demonstrations": demonstrations, "stats": stats, "normalise": normalise}
    (folder / "task.json").write_text(json.dumps(made))


def split(
    config: ReviewsConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, list[list[int]]], list[list[int]]]:
    """Prompts by split, and the reviews to fine-tune on, as token ids.

    An opening (the first eight words) belongs to one split only, and a review that begins like a validation or test prompt is not
    trained on.

    Raises:
        ValueError: the corpus has too few distinct openings.
    """
    texts = [tokenizer.convert_tokens_to_ids([f" {word}" for word in words[:-1]] + [EOS]) for words in corpus(config.seed, config.reviews)]
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
        texts: N pairs of prompt and response as token ids, EOS included where the response stopped.
        gold: ``(N, 2)`` float64.
    """

    texts: list[list[list[int]]]
    gold: NDArray[np.float64]

    @staticmethod
    def sample(
        config: ReviewsConfig,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        count: int,
        first: int,
        progress: Callable[[int, float], None],
        chunk: int = 512,
    ) -> Pairs:
        """``count`` pairs from the policy, numbered from ``first``; the prompts take turns."""
        texts: list[list[list[int]]] = []
        gold: list[list[float]] = []
        eos, judge = tokenizer.eos_token_id, GoldReview()
        for start in range(0, count, chunk):
            number = np.repeat(np.arange(start, min(start + chunk, count)), 2)
            prompt = torch.tensor([prompts[i % len(prompts)] for i in number])
            episode = _PAIR_EPISODES + 2 * first + 2 * start + np.arange(len(number))
            uniforms = counted.uniform(config.seed, counted.TOKEN, episode[:, None], np.arange(config.max_new_tokens))
            response, _ = decoding.generate(
                policy, prompt, torch.from_numpy(uniforms), eos, max_new_tokens=config.max_new_tokens
            )
            rows = [row[row >= 0].tolist() for row in response]
            scores = judge(
                tokenizer.batch_decode(prompt),
                tokenizer.batch_decode(rows, skip_special_tokens=True),
                ["stop" if row[-1] == eos else "length" for row in rows],
            )
            full = [[*p, *row] for p, row in zip(prompt.tolist(), rows, strict=True)]
            texts += [full[i : i + 2] for i in range(0, len(full), 2)]
            gold += [scores[i : i + 2] for i in range(0, len(scores), 2)]
            progress(first + len(texts), 0.0)
        return Pairs(texts, np.array(gold))

    @torch.no_grad()
    def scores(self, model: PreTrainedModel) -> NDArray[np.float64]:
        """``(N, 2)`` raw scores of a reward model."""
        parts: list[Tensor] = []
        flat = [text for pair in self.texts for text in pair]
        for start in range(0, len(flat), 256):
            parts.append(rewards.raw_scores(model, rewards.right_pad(flat[start : start + 256])))
        return torch.cat(parts).double().numpy().reshape(-1, 2)


def ranking_accuracy(gold: NDArray[np.float64], difference: NDArray[np.float64]) -> float:
    """How often a difference of two scores has the sign of the difference in gold reward; pairs of equal gold do not count.

    Args:
        gold: ``(N, 2)``.
        difference: ``(N,)``, the first's score minus the second's.
    """
    margin = gold[:, 0] - gold[:, 1]
    differ = margin != 0
    return float((difference[differ] * margin[differ] > 0).mean()) if differ.any() else 0.5


def _initial(kind: type[Any], config: ReviewsConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A model with weights drawn from the seed; the caller's global generator is left as it was."""
    architecture = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=PROMPT_LENGTH + max(config.max_new_tokens, review_grammar.MAX_TOKENS),
        n_embd=config.hidden,
        n_layer=config.layers,
        n_head=config.heads,
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
        torch.manual_seed(config.seed)
        return kind(architecture).eval()


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _advance(bar: Progress, description: str, total: int) -> Callable[[int, float], None]:
    task = bar.add_task(description, total=total)
    return lambda done, loss: bar.update(task, completed=done)
