"""A task made of the user's own labeled text: a language model and a byte-level tokenizer trained on it, a reward
model learned from the labels of one half of the training texts, and a judge of another kind learned from the labels
of the other half.

The pipeline that built the Reviews task, with people's labels in the place of simulated annotators. All of it
happens on first use and is cached under the content of the file and every setting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lm_envs import rng, training
from lm_envs.data.conventions import Example
from lm_envs.data.splits import warn_if_few
from lm_envs.kernels import logprob_kl
from lm_envs.model import decoding
from lm_envs.model import tokens as observations
from lm_envs.model.tokens import right_pad
from lm_envs.reward import base, learned
from lm_envs.reward.learned import LearnedReward, initialise_reward_head, raw_scores
from lm_envs.reward.units import Samples, in_units_of
from lm_envs.settings import NonNegative, Positive, Rate, Several, Size, Whole, make
from lm_envs.tasks import corpus_judge, corpus_text, own_text, sampling
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.corpus_judge import TextJudge, require_sklearn
from lm_envs.tasks.corpus_text import openings, read_labelled, training_half


@dataclass(frozen=True)
class CorpusConfig(own_text.OwnTextConfig):
    """Everything but the file that determines the task; changing a field makes another cache entry.

    Attributes:
        seed: of the initial weights, the order of training and the samples.
        vocabulary: tokens at most.
        prompt_words: words of an opening.
        prompt_tokens: openings of more tokens are left out.
        max_new_tokens: the horizon.
        min_new_tokens: EOS is masked before that many tokens: short texts would pay the least KL penalty.
        max_tokens: longer texts are cut to this many tokens for the language model and the reward model.
        hidden, layers, heads: size of the language model, and of the reward model, which starts from it.
        lm_steps, lm_epochs: the language model's training, whichever is over first.
        lm_batch, lm_learning_rate: tokens per step, and AdamW's peak rate.
        rm_steps, rm_epochs: the reward model's training, likewise.
        rm_batch, rm_learning_rate: texts per step, and AdamW's peak rate.
        weight_decay: of both.
        samples: of the language model; they measure and normalise the reward model.
        temperature: of the policy and of the reference.
        kl_coef: default weight of the KL penalty.
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
    weight_decay: NonNegative = 0.1
    samples: Several = 512
    temperature: Positive = 0.7
    kl_coef: NonNegative = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError where a field is out of range."""
        super().__post_init__()
        if self.prompt_tokens + self.max_new_tokens > self.max_tokens:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} and max_new_tokens={self.max_new_tokens} are together "
                f"more than max_tokens={self.max_tokens}, which is what the models are trained on"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}"
            )


def load(path: str | Path | None = None, **options: Any) -> TextTask:
    """The task of a JSONL file of labeled texts; made on first use, which shows progress bars, and read from the
    cache afterwards.

    Args:
        path: the file, see :func:`~lm_envs.tasks.corpus_text.read_labelled`.
        options: fields of :class:`CorpusConfig`.

    Raises:
        ValueError: no path, a malformed row (file and line), too few texts, or an option that does not exist or is
            out of range.
        FileNotFoundError: there is no such file.
        ImportError: scikit-learn is missing; the message says what to install.
        lm_envs.files.CacheError: the cache folder cannot be written.
    """
    if path is None:
        raise ValueError(
            "corpus is made of a file of your own: give path=FILE.jsonl, rows with 'text' and 'label' (0 or 1)"
        )
    config = make(CorpusConfig, options, "corpus")
    require_sklearn()
    import sklearn

    path = Path(path)
    folder = own_text.cached(
        "corpus",
        path,
        config,
        lambda folder: build(read_labelled(path), config, folder),
        [__file__, rng, decoding, logprob_kl, learned, base, corpus_judge, corpus_text],
        [sklearn],
    )
    return read(folder, config, path.name)


def read(folder: Path, config: CorpusConfig, source: str) -> TextTask:
    """The task that :func:`build` left in a folder; ``source`` is what its description calls the text."""
    made = json.loads((folder / "task.json").read_text())
    warn_if_few(source, made["prompts"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "policy")
    return TextTask(
        name="corpus",
        tokenizer=tokenizer,
        reference=GPT2LMHeadModel.from_pretrained(folder / "policy", dtype=torch.float32),
        prompts=made["prompts"],
        reward=LearnedReward(
            GPT2ForSequenceClassification.from_pretrained(folder / "reward_model", dtype=torch.float32),
            tokenizer,
            normalise=tuple(made["normalise"]),
            batch_size=256,
            name="label_reward_model",
        ),
        judge=TextJudge.load(folder / "judge"),
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        kl_coef=config.kl_coef,
        temperature=config.temperature,
        description=f"continue a text of {source}; reward model and judge learned from different halves of its labels",
        demonstrations=made["demonstrations"],
        stats=made["stats"],
    )


def build(rows: Sequence[Example], config: CorpusConfig, folder: Path) -> None:
    """Make tokenizer, language model, reward model and judge, measure them on held-out texts, and save them."""
    train = [row for row in rows if row.split == "train"]
    held_out = [row for row in rows if row.split != "train"]
    tokenizer = own_text.make_tokenizer([row.text for row in train], config.vocabulary)
    prompts = _prompts(rows, tokenizer, config)
    demonstrations = encode(tokenizer, train, config.max_tokens)
    judge_half = training_half(rows, 1)
    judge = TextJudge.fit([row.text for row in judge_half], [row.label for row in judge_half])
    with sampling.progress_bar() as bar:
        policy = _initial(GPT2LMHeadModel, config, tokenizer)
        bundles = own_text.token_bundles([(len(text),) for text in demonstrations], config.lm_batch)
        steps = min(config.lm_steps, config.lm_epochs * len(bundles))
        training.fit_language_model(
            policy,
            demonstrations,
            bundles,
            steps=steps,
            learning_rate=config.lm_learning_rate,
            weight_decay=config.weight_decay,
            seed=config.seed,
            progress=sampling.line_of(bar, "corpus: language model", steps),
        )
        reward_model = _initial(GPT2ForSequenceClassification, config, tokenizer)
        reward_model.transformer.load_state_dict(policy.transformer.state_dict())
        initialise_reward_head(reward_model.score, torch.Generator().manual_seed(config.seed))
        reward_half = training_half(rows, 0)
        _fit_reward_model(
            reward_model,
            encode(tokenizer, reward_half, config.max_tokens),
            np.array([row.label for row in reward_half]),
            config,
            bar,
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
            progress=sampling.line_of(bar, "corpus: samples to normalise by", config.samples),
        )
    reward = in_units_of(LearnedReward(reward_model, tokenizer, batch_size=256), samples)
    stats = _stats(policy, reward, judge, tokenizer, held_out, samples, config)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    reward_model.save_pretrained(folder / "reward_model")
    tokenizer.save_pretrained(folder / "reward_model")
    judge.save(folder / "judge")
    made = {"prompts": prompts, "demonstrations": demonstrations, "stats": stats, "normalise": reward.normalise}
    (folder / "task.json").write_text(json.dumps(made))


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Texts as token ids that end in EOS, cut to ``max_tokens`` (then without it)."""
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
    """Indices of texts of nearly one length together, ``size`` at a time; without padding an epoch takes half."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def prefix_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Logistic loss of a decoder-style classifier that reads texts and, in the same forward, all their prefixes.

    ``mean_i [ l(full_i) / 2 + mean_{t < T_i} l(prefix_i,t) / 2 ]`` with ``l = -log sigmoid(+-score)``. A causal
    model's state at place t has seen the prefix only, so the score means something on texts that break off, as
    samples at the length limit do.

    Args:
        ids: ``(N, L)`` int64, right-padded with -1, at least two tokens a row.
        labels: ``(N,)`` 0 or 1.
    """
    present = ids >= 0
    hidden = model.base_model(**observations.model_inputs(ids), use_cache=False).last_hidden_state
    logits = model.score(hidden).squeeze(-1)
    each = F.binary_cross_entropy_with_logits(
        logits, labels[:, None].to(logits.dtype).expand_as(logits), reduction="none"
    )
    last = present.sum(dim=1) - 1
    before = torch.arange(ids.shape[1], device=ids.device) < last[:, None]
    full = each.gather(1, last[:, None]).squeeze(1)
    prefixes = each.masked_fill(~before, 0.0).sum(dim=1) / last.clamp(min=1)
    return (0.5 * full + 0.5 * prefixes).mean()


def _fit_reward_model(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    labels: NDArray[np.int64],
    config: CorpusConfig,
    bar: Progress,
) -> None:
    bundles = _bundles(texts, config.rm_batch)

    def loss(rows: list[int]) -> Tensor:
        return prefix_loss(model, right_pad([texts[i] for i in rows]), torch.from_numpy(labels[rows]))

    steps = min(config.rm_steps, config.rm_epochs * len(bundles))
    training.fit(
        model,
        loss,
        bundles,
        steps=steps,
        learning_rate=config.rm_learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
        progress=sampling.line_of(bar, "corpus: reward model", steps),
    )


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
    """Figures on held-out texts, and of the reference's samples of validation prompts.

    ``perplexity`` per token, ``perplexity_per_word`` whatever the tokenizer (an end counts as a word),
    ``*_accuracy`` on whole held-out texts, ``*_threshold`` above which a score means label 1, ``sft_*_positive`` the
    share of samples above it, ``sft_stopped`` of those that end by themselves.
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


def _initial(kind: type[sampling.Model], config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> sampling.Model:
    return sampling.small_gpt2(
        kind, tokenizer, config.max_tokens, config.hidden, config.layers, config.heads, config.seed
    )
