"""A task made from a user's labeled text, by the pipeline that built Reviews with people's labels for simulated ones.

A byte-level tokenizer and a language model are trained on the texts. The labels of half of the training texts train a
reward model, those of the other half a judge of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from lm_envs import rng, training
from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Examples
from lm_envs.data.splits import SPLITS, divide, share
from lm_envs.kernels import logprob_kl
from lm_envs.model import decoding
from lm_envs.model import tokens as observations
from lm_envs.model.tokens import right_pad
from lm_envs.reward import base, learned
from lm_envs.reward.learned import LearnedReward, initialise_reward_head, raw_scores
from lm_envs.reward.units import Samples, in_units_of
from lm_envs.settings import NonNegative, Positive, Rate, Several, Size, Whole, make
from lm_envs.tasks import sampling
from lm_envs.tasks.base import TextTask


@dataclass(frozen=True)
class CorpusConfig(sampling.OwnTextConfig):
    """Everything but the file that determines the task; each combination has its own cache entry.

    Attributes:
        prompt_words, prompt_tokens: words of an opening, and the most tokens that it may have.
        min_new_tokens: EOS is masked before that many tokens, because short texts would pay the least KL penalty.
        max_tokens: longer texts are cut to this many tokens for both models.
        lm_steps, lm_epochs: limits of the language model's training; the first one reached ends it.
        lm_batch, lm_learning_rate: tokens per step, and AdamW's peak rate.
        rm_steps, rm_epochs, rm_batch, rm_learning_rate: the same for the reward model, which starts from the language
            model; the batch is in texts.
        samples: responses of the language model that measure and normalise the reward model.
    """

    prompt_words: Size = 5
    prompt_tokens: Size = 10
    max_new_tokens: Size = 24
    min_new_tokens: Whole = 8
    max_tokens: Size = 64
    layers: Size = 3
    lm_steps: Size = 1200
    lm_epochs: Size = 6
    lm_batch: Size = 1280
    lm_learning_rate: Rate = 2e-3
    rm_steps: Size = 400
    rm_epochs: Size = 3
    rm_batch: Size = 32
    rm_learning_rate: Rate = 5e-4
    samples: Several = 512
    temperature: Positive = 0.7
    kl_coef: NonNegative = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tokens + self.max_new_tokens > self.max_tokens:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} and max_new_tokens={self.max_new_tokens} are together "
                f"more than max_tokens={self.max_tokens}, the length of the texts that the models are trained on"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}"
            )


def load(path: str | Path | None = None, **options: Any) -> TextTask:
    """Make the task of a file of labeled texts (see :func:`read_labelled`), with progress bars, or read it from the
    cache.

    ``options`` are fields of :class:`CorpusConfig`.

    Raises:
        ValueError: no path, a malformed row (file and line), too few texts, or a wrong option.
        FileNotFoundError: there is no such file.
        ImportError: scikit-learn is missing; the message says what to install.
        lm_envs.files.CacheError: the cache folder cannot be written.
    """
    if path is None:
        raise ValueError(
            "corpus is made of a file of your own: give path=FILE.jsonl, rows with 'text' and 'label' (0 or 1)"
        )
    config = make(CorpusConfig, options, "corpus")
    try:
        import sklearn
    except ImportError as error:
        raise ImportError("the judge needs scikit-learn: pip install 'lm-envs[corpus]'") from error
    path = Path(path)
    folder, made, tokenizer = sampling.cached(
        "corpus",
        path,
        config,
        lambda folder: build(read_labelled(path), config, folder),
        [__file__, rng, decoding, logprob_kl, learned, base],
        [sklearn],
    )
    return TextTask(
        name="corpus",
        tokenizer=tokenizer,
        reference=GPT2LMHeadModel.from_pretrained(folder / "policy", dtype=torch.float32),
        prompts=made["prompts"],
        reward=sampling.saved_reward(folder, tokenizer, made["normalise"], "label_reward_model"),
        judge=TextJudge(*made["judge"]),
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        kl_coef=config.kl_coef,
        temperature=config.temperature,
        description=f"continue a text of {path.name}; "
        "reward model and judge learned from different halves of its labels",
        demonstrations=made["demonstrations"],
        stats=made["stats"],
    )


def build(rows: Sequence[Example], config: CorpusConfig, folder: Path) -> dict[str, Any]:
    """Make tokenizer, language model, reward model and judge, measure them on held-out texts, and save them."""
    train = [row for row in rows if row.split == "train"]
    held_out = [row for row in rows if row.split != "train"]
    tokenizer = sampling.make_tokenizer([row.text for row in train], config.vocabulary)
    prompts = _prompts(rows, tokenizer, config)
    demonstrations = encode(tokenizer, train, config.max_tokens)
    judge_half = training_half(rows, 1)
    judge = TextJudge.fit([row.text for row in judge_half], [row.label for row in judge_half])
    shape = (tokenizer, config.max_tokens, (config.hidden, config.layers, config.heads), config.seed)
    options = {"weight_decay": config.weight_decay, "seed": config.seed}
    policy = sampling.small_gpt2(GPT2LMHeadModel, *shape)
    bundles = sampling.token_bundles([(len(text),) for text in demonstrations], config.lm_batch)
    sampling.fit(
        "corpus: language model",
        training.fit_language_model,
        policy,
        demonstrations,
        bundles,
        steps=min(config.lm_steps, config.lm_epochs * len(bundles)),
        learning_rate=config.lm_learning_rate,
        **options,
    )
    reward_model = sampling.small_gpt2(GPT2ForSequenceClassification, *shape)
    reward_model.transformer.load_state_dict(policy.transformer.state_dict())
    initialise_reward_head(reward_model.score, torch.Generator().manual_seed(config.seed))
    reward_half = training_half(rows, 0)
    texts = encode(tokenizer, reward_half, config.max_tokens)
    labels = torch.tensor([row.label for row in reward_half])
    bundles = _bundles(texts, config.rm_batch)
    sampling.fit(
        "corpus: reward model",
        training.fit,
        reward_model,
        lambda chosen: prefix_loss(reward_model, right_pad([texts[i] for i in chosen]), labels[chosen]),
        bundles,
        steps=min(config.rm_steps, config.rm_epochs * len(bundles)),
        learning_rate=config.rm_learning_rate,
        **options,
    )
    samples = sampling.sample(
        policy,
        tokenizer,
        prompts["validation"],
        config.samples,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        batch_size=256,
        title="corpus: samples to normalise by",
    )
    reward = in_units_of(LearnedReward(reward_model, tokenizer, batch_size=256), samples)
    stats = _stats(policy, reward, judge, tokenizer, held_out, samples, config)
    sampling.save(folder, tokenizer, policy=policy, reward_model=reward_model)
    found = {"prompts": prompts, "demonstrations": demonstrations, "stats": stats}
    return found | {"normalise": reward.normalise, "judge": judge.arguments}


def read_labelled(path: str | Path) -> list[Example]:
    """Read rows with ``text``, ``label`` (0 or 1) and an optional ``split`` from any source.

    Each run of white space becomes one space. A repeated text counts once, with its first label.
    :func:`~lm_envs.data.splits.divide` divides texts without ``split``.

    Raises:
        ValueError: a malformed row (the message names file and line), or too few texts: each half of the training
            texts needs two of either label, validation and test one.
    """
    labels: dict[str, int] = {}
    found = []
    for example in Examples(path, "labelled"):
        text = " ".join(example.text.split())
        labels.setdefault(text, example.label)
        found.append((text, example.split))
    splits = divide(found, path)
    rows = [Example("", (text,), label=labels[text], split=split) for text, split in splits.items()]
    for half, whose in enumerate(("reward model", "judge")):
        for label in (0, 1):
            count = sum(row.label == label for row in training_half(rows, half))
            if count < 2:
                raise ValueError(
                    f"{path}: of {len(rows)} different texts, {count} with label {label} fall to the {whose}'s half of "
                    "the training texts: give more texts of either label (some thousands for a useful task)"
                )
    return rows


def training_half(rows: Sequence[Example], half: int) -> list[Example]:
    """Return the training texts whose labels the reward model (half 0) or the judge (half 1) learns from."""
    return [row for row in rows if row.split == "train" and (share(row.text, "half") < 0.5) == (half == 0)]


def openings(rows: Sequence[Example], words: int) -> dict[str, list[str]]:
    """Return the first ``words`` words of each longer text, by split.

    An opening belongs to one split only: test before validation before training.
    """
    found: dict[str, list[str]] = {}
    taken: set[str] = set()
    for name in reversed(SPLITS):
        texts = (row.text.split(" ") for row in rows if row.split == name)
        fresh = dict.fromkeys(" ".join(text[:words]) for text in texts if len(text) > words)
        found[name] = [opening for opening in fresh if opening not in taken]
        taken.update(fresh)
    return {name: found[name] for name in SPLITS}


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Return the token ids of texts, ending in EOS unless they were cut to ``max_tokens``."""
    eos = tokenizer.eos_token_id
    return [[*ids, eos][:max_tokens] for ids in tokenizer([row.text for row in rows])["input_ids"]]


def _prompts(
    rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: CorpusConfig
) -> dict[str, list[list[int]]]:
    prompts = {}
    for name, texts in openings(rows, config.prompt_words).items():
        ids = tokenizer(texts)["input_ids"] if texts else []
        prompts[name] = [list(row) for row in ids if len(row) <= config.prompt_tokens]
        if not prompts[name]:
            raise ValueError(
                f"corpus: no text of {name} goes on after an opening of {config.prompt_words} words that is its own, "
                f"and has at most {config.prompt_tokens} tokens: give more texts, or change either number"
            )
    return prompts


def _bundles(texts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of texts, ``size`` of nearly one length together: with little padding an epoch takes half the time."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def prefix_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Logistic loss of a decoder-style classifier on texts and, in the same forward, on all their prefixes.

    ``mean_i [ l(full_i) / 2 + mean_{t < T_i} l(prefix_i,t) / 2 ]`` with ``l = -log sigmoid(+-score)``. So the score
    also holds for texts that break off, as samples at the length limit do.

    Args:
        ids: ``(N, L)`` int64, right-padded with -1, at least two tokens a row.
        labels: ``(N,)`` 0 or 1.
    """
    present = ids >= 0
    hidden = model.base_model(**observations.model_inputs(ids), use_cache=False).last_hidden_state
    logits = model.score(hidden).squeeze(-1)
    targets = labels[:, None].to(logits.dtype).expand_as(logits)
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    last = present.sum(dim=1) - 1
    before = torch.arange(ids.shape[1], device=ids.device) < last[:, None]
    full = each.gather(1, last[:, None]).squeeze(1)
    prefixes = each.masked_fill(~before, 0.0).sum(dim=1) / last.clamp(min=1)
    return (0.5 * full + 0.5 * prefixes).mean()


@torch.no_grad()
def _stats(
    policy: PreTrainedModel,
    reward: LearnedReward,
    judge: TextJudge,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Example],
    samples: Samples,
    config: CorpusConfig,
) -> dict[str, float]:
    """Measure the models on held-out texts and on the reference's samples for validation prompts.

    ``perplexity_per_word`` does not depend on the tokenizer (an end counts as a word), ``*_threshold`` is the score
    above which a text counts as label 1, and ``sft_*_positive`` the share of samples above it.
    """
    ids = encode(tokenizer, held_out, config.max_tokens)
    labels = np.array([row.label for row in held_out]) == 1
    nats, tokens, scores = 0.0, 0, np.zeros(len(ids))
    for chosen in _bundles(ids, 64):
        batch = right_pad([ids[i] for i in chosen])
        logits = policy(**observations.model_inputs(batch[:, :-1]), use_cache=False).logits
        count = int((batch[:, 1:] >= 0).sum())
        nats += float(training.next_token_loss(logits, batch[:, 1:])) * count
        tokens += count
        scores[chosen] = raw_scores(reward.model, batch).double().numpy()
    words = sum(len(text.split()) + 1 for text in tokenizer.batch_decode(ids, skip_special_tokens=True))
    rewarded, judged = samples.score(reward), samples.score(judge)
    threshold = -reward.normalise[0] / reward.normalise[1]  # where the reward model's own score is 0
    return {
        "perplexity": math.exp(nats / tokens),
        "perplexity_per_word": math.exp(min(nats / words, 700.0)),
        "reward_accuracy": float(((scores > 0) == labels).mean()),
        "judge_accuracy": float(((judge.probability([row.text for row in held_out]) > 0.5) == labels).mean()),
        "reward_threshold": threshold,
        "judge_threshold": judge.threshold,
        "sft_reward_positive": float((rewarded > threshold).mean()),
        "sft_judge_positive": float((judged > judge.threshold).mean()),
        "sft_stopped": float(np.mean([reason == "stop" for reason in samples.finish_reasons])),
        "reward_judge_correlation": float(np.corrcoef(rewarded, judged)[0, 1]) if judged.std() > 0 else 0.0,
    }


class TextJudge:
    """The probability that a text has label 1: logistic regression on TF-IDF weights of words and pairs of words.

    It shares nothing with the reward model. It reads prompt and completion as one text; above :attr:`threshold` the
    text counts as label 1.

    Args:
        terms: the words and pairs, V of them.
        idf, weight: ``(V,)`` float64, inverse document frequencies and weights.
        bias: of the log-odds.
    """

    __name__ = "judge"
    threshold = 0.5

    def __init__(self, terms: Sequence[str], idf: ArrayLike, weight: ArrayLike, bias: float) -> None:
        self.weight, self.bias = np.asarray(weight, dtype=np.float64), bias
        self._vectorizer = _vectorizer(vocabulary=terms)
        self._vectorizer.idf_ = np.asarray(idf, dtype=np.float64)
        self.arguments = [list(terms), np.asarray(idf).tolist(), self.weight.tolist(), bias]  # in JSON's types

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[int]) -> TextJudge:
        """Learn from labeled texts, at least one of each label; ValueError if they have no words."""
        from sklearn.linear_model import LogisticRegression

        # Terms of a single text cannot be told from noise, but a handful of texts may have no others.
        vectorizer = _vectorizer(min_df=2 if len(texts) >= 1000 else 1)
        try:
            features = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ValueError(f"the judge cannot learn from these {len(texts)} texts: {error}") from error
        model = LogisticRegression(C=10.0, max_iter=1000).fit(features, list(labels))
        return cls(
            vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, model.coef_[0], float(model.intercept_[0])
        )

    def probability(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return ``(N,)`` float64 in (0, 1)."""
        log_odds = self._vectorizer.transform(texts) @ self.weight + self.bias
        return np.asarray(1 / (1 + np.exp(-log_odds)))

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Return one probability per sample."""
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return self.probability(texts).tolist() if texts else []


def _vectorizer(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)
