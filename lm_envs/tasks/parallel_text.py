"""Parallel text of the user's own: reading it, dividing it, and measuring responses against its references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.jsonl import read_jsonl
from lm_envs.tasks.splits import SPLITS, SplitColumn, divide
from lm_envs.text_metrics import TextMetric


@dataclass(frozen=True)
class Pair:
    """One source text.

    Attributes:
        prompt: the source, with each run of white space as one space.
        references: its translations, likewise; one or more.
        split: ``"train"``, ``"validation"`` or ``"test"``.
    """

    prompt: str
    references: tuple[str, ...]
    split: str


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a JSONL file of rows with ``prompt``, ``reference`` (a text, or a list of them) and perhaps ``split``.

    A prompt that occurs again counts once, with all its references. Splits that no row names are divided off by
    :func:`~lm_envs.tasks.splits.divide`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a malformed row (the message names file and line), or a split without pairs.
    """
    splits, found = SplitColumn(), []
    references: dict[str, dict[str, None]] = {}
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        prompt = _text(row.get("prompt"), "prompt", where)
        given = row.get("reference")
        several = given if isinstance(given, list) and given else [given]
        references.setdefault(prompt, {}).update({_text(text, "reference", where): None for text in several})
        found.append((prompt, splits.read(row, where)))
    pairs = [Pair(prompt, tuple(references[prompt]), split) for prompt, split in divide(found).items()]
    for name in SPLITS:
        if not any(pair.split == name for pair in pairs):
            raise ValueError(f"{path}: {len(pairs)} different prompts leave none for {name}: give more of them")
    return pairs


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{name}' must be a string, not {value!r}")
    text = " ".join(value.split())
    if not text:
        raise ValueError(f"{where}: '{name}' is empty")
    return text


class AgainstReferences:
    """A reward: a text metric, with the references found by the prompt's text.

    Args:
        metric: scores a completion against references, in [0, 1].
        references: by prompt, as the task's tokenizer decodes it.
        scale: multiplies the score.
    """

    def __init__(self, metric: TextMetric, references: Mapping[str, Sequence[str]], scale: float = 1.0) -> None:
        self.metric, self.references, self.scale = metric, references, scale
        self.__name__ = metric.__name__

    def of(self, prompts: Sequence[str]) -> list[Sequence[str]]:
        """The references of each prompt.

        Raises:
            ValueError: a prompt has none.
        """
        for prompt in prompts:
            if prompt not in self.references:
                raise ValueError(f"reward {self.__name__!r}: there is no reference for the prompt {prompt!r}")
        return [self.references[prompt] for prompt in prompts]

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """A score per completion, in [0, scale]."""
        found = self.metric(completions, **{self.metric.column: self.of(prompts)})
        return [self.scale * score for score in found if score is not None]


class CorpusBLEU(AgainstReferences):
    """Corpus BLEU as papers report it, out of 100, and whether one system's is higher than another's."""

    name = "BLEU"

    def corpus(self, prompts: Sequence[str], completions: Sequence[str]) -> float:
        """Of all completions together; sacreBLEU's standard settings."""
        return self.metric.corpus(completions, self.of(prompts))

    def gain(
        self, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str], samples: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """How much higher ours is, and the standard error of that by paired bootstrap (Koehn 2004, section 4).

        Corpus BLEU is a function of counts that are summed over sentences, so a resampled test set costs a sum.
        """
        counts = [self._counts(prompts, texts) for texts in (ours, theirs)]
        generator = np.random.default_rng(seed)
        gains = []
        for _ in range(samples):
            drawn = np.bincount(generator.integers(len(prompts), size=len(prompts)), minlength=len(prompts))
            gains.append(_bleu(drawn @ counts[0]) - _bleu(drawn @ counts[1]))
        return self.corpus(prompts, ours) - self.corpus(prompts, theirs), float(np.std(gains, ddof=1))

    def _counts(self, prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.int64]:
        """``(N, 10)``: matched and all n-grams of orders 1 to 4, lengths of completion and of reference."""
        from sacrebleu.metrics import BLEU

        bleu = BLEU(effective_order=True)
        rows = [
            bleu.sentence_score(text, list(references))
            for text, references in zip(completions, self.of(prompts), strict=True)
        ]
        return np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows])


def _bleu(counts: NDArray[np.int64]) -> float:
    from sacrebleu.metrics import BLEU

    correct, total, (sys_len, ref_len) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return float(BLEU.compute_bleu(correct, total, sys_len, ref_len, smooth_method="exp").score)
