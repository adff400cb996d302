"""A task made from a user's parallel text: an encoder-decoder trained on it, with sentence BLEU as the reward.

The literature trains by maximum likelihood first, then by a policy gradient on the metric with the likelihood of the
references mixed in (Ranzato et al. 2016, arXiv:1511.06732; Wu et al. 2016, arXiv:1609.08144, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import decoders
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, BartConfig, PreTrainedTokenizerFast, T5Config

from lm_envs import training
from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Examples
from lm_envs.data.splits import SPLITS, divide
from lm_envs.model import decoding, encoder_decoder, forwards, kv_cache, kv_cache_cross
from lm_envs.model.decoding import greedy
from lm_envs.model.forwards import response_forward
from lm_envs.model.tokens import left_pad, right_pad
from lm_envs.reward.base import WeightedSum
from lm_envs.reward.metrics import SentenceBLEU, SentenceChrF, TextMetric
from lm_envs.settings import NonNegative, Positive, Rate, Share, Size, make
from lm_envs.tasks import sampling
from lm_envs.tasks.base import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TranslationConfig(sampling.OwnTextConfig):
    """Everything but the file that determines the task; each combination has its own cache entry.

    Attributes:
        architecture: "bart" (absolute positions, normalized after each block) or "t5" (relative, before).
        prompt_tokens: pairs with a longer prompt are left out.
        max_new_tokens: the horizon; pairs with a longer first reference are left out of training.
        layers: of the encoder, and of the decoder.
        sft_epochs: of maximum likelihood on the training pairs.
        sft_batch, sft_learning_rate: target tokens per step, and AdamW's peak rate.
        label_smoothing: share of the target's probability that all tokens get in equal parts.
        kl_coef: default weight of the KL penalty, in BLEU points per nat. The literature has none.
    """

    architecture: Literal["bart", "t5"] = "bart"
    prompt_tokens: Size = 40
    max_new_tokens: Size = 40
    layers: Size = 2
    sft_epochs: Size = 8
    sft_batch: Size = 1024
    sft_learning_rate: Rate = 2e-3
    label_smoothing: Share = 0.1
    temperature: Positive = 1.0
    kl_coef: NonNegative = 0.0


def load(path: str | Path | None = None, **options: Any) -> TextTask:
    """Make the task of a file of pairs (see :func:`read_parallel`), with a progress bar, or read it from the cache.

    ``options`` are fields of :class:`TranslationConfig`.

    Raises:
        ValueError: no path, a malformed row (file and line), too few pairs, or a wrong option.
        FileNotFoundError: there is no such file.
        ImportError: sacreBLEU is missing; the message says what to install.
        lm_envs.files.CacheError: the cache folder cannot be written.
    """
    if path is None:
        raise ValueError("translation is made of a file of your own: give path=FILE.jsonl, rows with prompt, reference")
    config = make(TranslationConfig, options, "translation")
    SentenceBLEU()  # raises now, not after training, if sacreBLEU is missing
    path = Path(path)
    folder, made, tokenizer = sampling.cached(
        "translation",
        path,
        config,
        lambda folder: build(read_parallel(path), config, folder),
        [__file__, kv_cache_cross, decoding, encoder_decoder, kv_cache, forwards],
    )
    return TextTask(
        name="translation",
        tokenizer=tokenizer,
        reference=AutoModelForSeq2SeqLM.from_pretrained(folder / "policy", dtype=torch.float32),
        prompts=made["prompts"],
        reward=WeightedSum([(100.0, SentenceBLEU())]),
        judge=WeightedSum([(100.0, SentenceChrF())]),
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=config.max_new_tokens,
        kl_coef=config.kl_coef,
        temperature=config.temperature,
        description=f"translate {path.name}; the reward is sentence BLEU, the judge chrF",
        responses=[(prompt, response) for prompt, response in made["responses"]],
        corpus_metric=CorpusBLEU(),
        columns={split: {"reference": texts} for split, texts in made["references"].items()},
        stats=made["stats"],
    )


def build(pairs: Sequence[Example], config: TranslationConfig, folder: Path) -> dict[str, Any]:
    """Make the tokenizer and the model, measure it on validation pairs, and save them."""
    train = [pair for pair in pairs if pair.split == "train"]
    texts = [str(text) for pair in train for text in (pair.prompt, *pair.completions)]
    tokenizer = make_tokenizer(texts, config.vocabulary)
    encoded = list(zip(pairs, tokenizer([str(pair.prompt) for pair in pairs])["input_ids"], strict=True))
    encoded = [(pair, list(ids)) for pair, ids in encoded if len(ids) <= config.prompt_tokens]
    prompts = {name: [ids for pair, ids in encoded if pair.split == name] for name in SPLITS}
    known = [(pair.split, list(map(str, pair.completions))) for pair, _ in encoded]
    references = {name: [texts for split, texts in known if split == name] for name in SPLITS}
    for name in SPLITS:
        if not prompts[name]:
            raise ValueError(f"translation: no prompt of {name} has at most prompt_tokens={config.prompt_tokens}")
    targets = tokenizer([several[0] for several in references["train"]])["input_ids"]
    pairs_of_ids = zip(prompts["train"], targets, strict=True)
    eos = [tokenizer.eos_token_id]
    responses = [(ids, target + eos) for ids, target in pairs_of_ids if len(target) < config.max_new_tokens]
    if not responses:
        raise ValueError(f"translation: no reference has at most max_new_tokens={config.max_new_tokens} tokens")
    model = initial(config, tokenizer)
    _fit(model, responses, config)
    sampling.save(folder, tokenizer, policy=model)
    found = greedy(model, prompts["validation"], tokenizer.eos_token_id, max_new_tokens=config.max_new_tokens)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    metrics: dict[str, TextMetric] = {"bleu": SentenceBLEU(), "chrf": SentenceChrF()}
    stats = {f"sft_validation_{name}": m.corpus(texts, references["validation"]) for name, m in metrics.items()}
    return {"prompts": prompts, "references": references, "responses": responses, "stats": stats}


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a :func:`lm_envs.tasks.sampling.make_tokenizer` whose decoded texts begin without a space.

    Its one special token ends responses, pads, and starts the decoder, as BART's EOS does.
    """
    tokenizer = sampling.make_tokenizer(texts, vocabulary, padding_side="right")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def initial(config: TranslationConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a model with weights drawn from the seed; no global generator changes."""
    ids = ("eos_token_id", "pad_token_id", "decoder_start_token_id")
    tokens: dict[str, Any] = {"vocab_size": len(tokenizer), **dict.fromkeys(ids, tokenizer.eos_token_id)}
    made: BartConfig | T5Config
    if config.architecture == "bart":
        sizes = {"layers": config.layers, "attention_heads": config.heads, "ffn_dim": 4 * config.hidden}
        made = BartConfig(
            **tokens,
            **{f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in sizes.items()},
            d_model=config.hidden,
            max_position_embeddings=max(config.prompt_tokens, config.max_new_tokens),
            activation_function="relu",
            dropout=0.0,
            init_std=config.hidden**-0.5,  # BART's 0.02 is for a width of 1024; here it would learn late
            forced_eos_token_id=None,
        )
    else:
        made = T5Config(
            **tokens,
            d_model=config.hidden,
            d_kv=config.hidden // config.heads,
            d_ff=4 * config.hidden,
            num_layers=config.layers,
            num_heads=config.heads,
            dropout_rate=0.0,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AutoModelForSeq2SeqLM.from_config(made).eval()


def _fit(model: PreTrainedModel, responses: Sequence[tuple[list[int], list[int]]], config: TranslationConfig) -> None:
    bundles = sampling.token_bundles([(len(target), len(prompt)) for prompt, target in responses], config.sft_batch)

    def loss(rows: list[int]) -> Tensor:
        prompts = [responses[i][0] for i in rows]
        target = right_pad([responses[i][1] for i in rows])
        prompt = torch.from_numpy(left_pad(prompts, max(map(len, prompts))))
        logits = response_forward(model, prompt, target).logits()
        present = target >= 0
        return F.cross_entropy(logits[present], target[present], label_smoothing=config.label_smoothing)

    sampling.fit(
        "translation: SFT",
        training.fit,
        model,
        loss,
        bundles,
        steps=config.sft_epochs * len(bundles),
        learning_rate=config.sft_learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
    )


def read_parallel(path: str | Path) -> list[Example]:
    """Read rows with ``prompt``, ``reference`` (a text or a list of texts) and an optional ``split`` from any source,
    as examples whose completions are the references. Each run of white space becomes one space.

    A repeated prompt counts once, with all its references. :func:`~lm_envs.data.splits.divide` makes missing splits.

    Raises:
        ValueError: a malformed row (the message names file and line), or a split without prompts.
    """
    found: list[tuple[str, str]] = []
    references: dict[str, dict[str, None]] = {}
    for example in Examples(path, "parallel"):
        prompt, *texts = (" ".join(str(text).split()) for text in (example.prompt, *example.completions))
        references.setdefault(prompt, {}).update(dict.fromkeys(texts))
        found.append((prompt, example.split))
    return [Example(prompt, tuple(references[prompt]), split=split) for prompt, split in divide(found, path).items()]


class CorpusBLEU(SentenceBLEU):
    """Corpus BLEU as papers report it, out of 100, and the difference between two systems."""

    def gain(
        self,
        ours: Sequence[str],
        theirs: Sequence[str],
        references: Sequence[Sequence[str]],
        samples: int = 1000,
        seed: int = 0,
    ) -> tuple[float, float]:
        """Return BLEU of ours minus theirs, and its standard error by paired bootstrap (Koehn 2004).

        Corpus BLEU is a function of counts summed over sentences, so resampling a test set takes one sum.
        """
        counts = [self._counts(texts, references) for texts in (ours, theirs)]
        generator = np.random.default_rng(seed)
        gains = []
        for _ in range(samples):
            drawn = np.bincount(generator.integers(len(ours), size=len(ours)), minlength=len(ours))
            gains.append(_bleu(drawn @ counts[0]) - _bleu(drawn @ counts[1]))
        return self.corpus(ours, references) - self.corpus(theirs, references), float(np.std(gains, ddof=1))

    def _counts(self, completions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.int64]:
        """Return ``(N, 10)``: matched and all n-grams of orders 1 to 4, lengths of completion and of reference."""
        rows = map(self._sentence.sentence_score, completions, map(list, references))
        return np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows])


def _bleu(counts: NDArray[np.int64]) -> float:
    from sacrebleu.metrics import BLEU

    correct, total, (sys_len, ref_len) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return float(BLEU.compute_bleu(correct, total, sys_len, ref_len, smooth_method="exp").score)
