"""Parallel text of the user's own: reading it, dividing it, and the BLEU of a whole corpus of responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_envs.data.jsonl import read_jsonl
from lm_envs.data.splits import SPLITS, SplitColumn, divide
from lm_envs.reward.metrics import SentenceBLEU


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
    :func:`~lm_envs.data.splits.divide`.

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


class CorpusBLEU(SentenceBLEU):
    """BLEU of whole corpora as papers report it, out of 100, and whether one system's is higher than another's."""

    def gain(
        self,
        ours: Sequence[str],
        theirs: Sequence[str],
        references: Sequence[Sequence[str]],
        samples: int = 1000,
        seed: int = 0,
    ) -> tuple[float, float]:
        """How much higher ours is, and the standard error of that by paired bootstrap (Koehn 2004).

        Corpus BLEU is a function of counts that are summed over sentences, so a resampled test set costs a sum.
        """
        counts = [self._counts(texts, references) for texts in (ours, theirs)]
        generator = np.random.default_rng(seed)
        gains = []
        for _ in range(samples):
            drawn = np.bincount(generator.integers(len(ours), size=len(ours)), minlength=len(ours))
            gains.append(_bleu(drawn @ counts[0]) - _bleu(drawn @ counts[1]))
        return self.corpus(ours, references) - self.corpus(theirs, references), float(np.std(gains, ddof=1))

    def _counts(self, completions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.int64]:
        """``(N, 10)``: matched and all n-grams of orders 1 to 4, lengths of completion and of reference."""
        rows = [
            self._sentence.sentence_score(text, list(known))
            for text, known in zip(completions, references, strict=True)
        ]
        return np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows])


def _bleu(counts: NDArray[np.int64]) -> float:
    from sacrebleu.metrics import BLEU

    correct, total, (sys_len, ref_len) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return float(BLEU.compute_bleu(correct, total, sys_len, ref_len, smooth_method="exp").score)
